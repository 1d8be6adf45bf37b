#!/usr/bin/env bash
# The fast tests at both ends of what requirements.txt allows: scripts/matrix.sh [oldest|newest] [pytest's arguments]
#
#   oldest  Python 3.10 (OLDEST_PYTHON=PATH for another) and exactly the lower bounds
#   newest  the newest Python on PATH (NEWEST_PYTHON=PATH for another) and the newest releases
#
# Without either: both. Their virtual environments are kept in build/matrix/ (6 GB each, torch's CUDA build included).
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit
fi
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Every package, a few minutes on one core: no servers, several processes, documentation or fuzzing.
FAST=(
    plan operators sampler augment resize summary doctests # curriculum
    config devices
    inputs inputs_sources inputs_device finish folder parquet labels
    checkpoints weights models_factory graphs layer_decay flops
    training resume evaluation report
    dense_transforms dense_score dense_detectors dense_bodies dense_graphs dense_training
)

tests=("${FAST[@]/#/tests/test_}")
tests=("${tests[@]/%/.py}")

ends=(oldest newest) status=0
case "${1:-}" in
oldest | newest) ends=("$1") && shift ;;
esac

# python_for END: the interpreter, in the order in which they are looked for.
python_for() {
    local candidate candidates=("${OLDEST_PYTHON:-python3.10}")
    [ "$1" = oldest ] || candidates=(${NEWEST_PYTHON:+"$NEWEST_PYTHON"} python3.14 python3.13 python3.12 python3.11 python3)
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "error: no ${candidates[*]}: install it, or name an interpreter (scripts/matrix.sh --help)" >&2
    return 1
}

for end in "${ends[@]}"; do
    environment="$ROOT/build/matrix/$end"
    if [ ! -x "$environment/bin/python" ]; then
        base="$(python_for "$end")"
        "$base" -m venv --clear "$environment"
    fi
    wanted="$environment/wanted.txt"
    versions=''
    [ "$end" = newest ] || versions='s/,<.*//; s/>=/==/' # each lower bound is the version
    sed "s/ *#.*//; /^\$/d; $versions" "$ROOT/requirements.txt" >"$wanted"
    if ! cmp -s "$wanted" "$environment/installed.txt"; then
        echo "installing the $end packages into $environment"
        # uv finds releases that agree in seconds; pip tries them one by one, hundreds of boto3 among them.
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check uv
        "$environment/bin/python" -m uv pip install --quiet --python "$environment/bin/python" --upgrade -r "$wanted"
        cp "$wanted" "$environment/installed.txt"
    fi
    "$environment/bin/python" -c "
import platform, importlib.metadata
names = ('torch', 'torchvision', 'timm', 'numpy')
print('$end: Python', platform.python_version(), *(f'{name} {importlib.metadata.version(name)}' for name in names))"
    (cd "$ROOT" && OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -p no:cacheprovider \
        "${tests[@]}" "$@") || status=1
done
exit "$status"
