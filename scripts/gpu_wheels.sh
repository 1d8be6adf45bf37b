#!/usr/bin/env bash
# Collects what a GPU machine without a registry lacks, as wheels for its Python: scripts/gpu_wheels.sh [DIR]
#
#   DIR  where they go (wheels/ in the repository, where scripts/gpu_check.sh finds them)
#
# The machine has torch, torchvision, timm and numpy; everything else that requirements.txt names for running (not for
# the demo's picture and the tests) is collected for Linux on x86-64, Python 3.12 (PYTHON_VERSION=3.11 for another).
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit
fi
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${1:-$ROOT/wheels}"
mkdir -p "$folder"
# Down to the demo's section; what the machine has is skipped, for other versions must not come along.
sed '/^# The demo/,$d; s/ *#.*//; /^$/d' "$ROOT/requirements.txt" |
    grep -vE '^(torch|torchvision|timm|numpy|huggingface_hub|safetensors|pyyaml)[>=<]' >"$folder/requirements.txt"
"${PYTHON:-python3}" -m pip download --disable-pip-version-check --quiet --only-binary :all: --no-deps \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 \
    -r "$folder/requirements.txt" docstring-parser typeshed-client importlib-resources protobuf packaging \
    typing-extensions typing-inspection --dest "$folder"
echo "$(find "$folder" -name '*.whl' | wc -l) wheels in $folder"
