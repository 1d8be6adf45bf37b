#!/usr/bin/env bash
# Formatter, linter and tests: scripts/test.sh [--extended] [pytest's arguments]
# --extended adds what is long, or needs root, a browser or more packages (requirements-extended.txt, installed for it).
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    exit
fi
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

arguments=()
for argument in "$@"; do
    if [ "$argument" = --extended ]; then
        install_requirements requirements-extended.txt
        arguments+=(-m "extended or not extended")
    else
        arguments+=("$argument")
    fi
done

cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One test process per core, one thread each: the models are tiny, and threads beyond the cores only wait for each other.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n auto --maxprocesses 8 ${arguments[@]+"${arguments[@]}"}
