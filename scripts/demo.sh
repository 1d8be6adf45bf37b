#!/usr/bin/env bash
# The demo: sets up, builds a small set of real photographs, trains the ordinary schedule and EfficientTrain++ on it, and
# prints accuracy, compute and time side by side: scripts/demo.sh [--seeds N] [--data DIR] [--output DIR]
# A few minutes on two CPU cores, after the installation. It can be interrupted: the same command resumes.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$ROOT"
case " $* " in
*" --data"* | *" -h "* | *" --help "*) ;;
*) "$PYTHON" scripts/demo_data.py data/demo --val 100 ;;
esac
exec "$PYTHON" scripts/demo.py "$@"
