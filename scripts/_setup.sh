# shellcheck shell=bash
# The project's Python environment, for the other scripts to source: the active virtual (or conda) environment, else
# .venv at the repository's root, made on first use. requirements.txt is installed when it has changed.
# Afterwards ROOT is the repository, PYTHON the environment's interpreter, and its programs come first on PATH.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

if [ -n "${VIRTUAL_ENV:-}" ]; then
    environment="$VIRTUAL_ENV"
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    environment="$CONDA_PREFIX"
else
    environment="$ROOT/.venv"
    if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then # missing, or left half made
        base="$(find_python)" || fail "Python 3.10 or newer is needed; found: $(python3 --version 2>&1 || echo none)"
        echo "making a virtual environment in $environment"
        "$base" -m venv --clear "$environment" ||
            fail "could not make $environment with '$base -m venv' (on Debian or Ubuntu: apt install python3-venv)"
    fi
fi
PYTHON="$environment/bin/python"
[ -x "$PYTHON" ] || fail "the active environment $environment has no bin/python: activate another one, or deactivate it"
new_enough "$PYTHON" || fail "Python 3.10 or newer is needed; $PYTHON is $("$PYTHON" --version 2>&1)"
export PATH="$environment/bin:$PATH"

# install_requirements FILE: the stamp holds the list that was installed last, and not a mere "done", so that a changed
# list is noticed.
install_requirements() {
    local stamp="$environment/.${1%.txt}-installed"
    if ! cmp -s "$ROOT/$1" "$stamp"; then
        echo "installing $1 into $environment (the first time, torch takes a while)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$1" ||
            fail "installing $1 failed; pip says why above"
        cp "$ROOT/$1" "$stamp" 2>/dev/null || true # a read-only environment is asked again next time
    fi
}
install_requirements requirements.txt
