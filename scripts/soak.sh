#!/usr/bin/env bash
# Many short runs with random faults (kills, signals, full disks, damaged files, second writers, changed settings, lost
# output, hangs); each has to end as if nothing had been. Prints every run's seed, and a summary:
# scripts/soak.sh [--runs 200] [--minutes 60] [--seed 0] [--jobs 2]
#
#   --runs N     runs, each with one to three faults
#   --minutes M  no more are begun after this
#   --seed S     the runs' seeds start here; --only S does one of them again and keeps its folder
#   --jobs J     runs at a time
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit
fi
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1
exec env PYTHONPATH="$ROOT" "$PYTHON" tests/soak.py "$@"
