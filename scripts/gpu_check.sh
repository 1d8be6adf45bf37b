#!/usr/bin/env bash
# Checks on this machine what only a GPU shows (docs/gpu.md): scripts/gpu_check.sh [--quick] [--output DIR] [--only NAME]
#
#   --quick       small models and images: does everything run; without a GPU, what needs none
#   --output DIR  folder for gpu_check.json (output/gpu_check); the table comes last on standard output
#   --only NAME   checks whose name holds NAME
#
# Needs no registry: the active environment is taken as it is, and where a folder wheels/ (scripts/gpu_wheels.sh) lies in
# the repository, what is missing is installed from it.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit
fi
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
if [ -d "$ROOT/wheels" ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$ROOT/wheels" \
        -r "$ROOT/wheels/requirements.txt"
fi
exec "$PYTHON" "$ROOT/scripts/gpu_check.py" "$@"
