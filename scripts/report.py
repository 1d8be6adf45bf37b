"""Writes a run's report.html again: python scripts/report.py OUTPUT_DIR"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.report import write_report
from utils import die


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        return die("usage: python scripts/report.py OUTPUT_DIR", 2)
    try:
        print(write_report(Path(argv[0])))
    except OSError as error:
        return die(f"{argv[0]} is no run's output folder: {error.strerror} ({error.filename})")
    except ValueError as error:
        return die(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
