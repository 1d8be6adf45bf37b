"""Moved: the report is written by scripts/report.py."""

import sys

sys.exit("error: report.py has moved; run python scripts/report.py " + " ".join(sys.argv[1:] or ["OUTPUT_DIR"]))
