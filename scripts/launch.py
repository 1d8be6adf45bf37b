"""torchrun, whose last line is ours (scripts/train.sh, scripts/slurm.sh): what went wrong, with main.py's exit code.

python scripts/launch.py [torchrun's options] main.py [main.py's flags]
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import STOPPED


def main(argv: list[str]) -> int:
    try:
        torchrun(argv)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: (said(item[1]) is None, item[1].timestamp))
        rank, failure = failures[0]
        if any(other.exitcode == STOPPED for _, other in failures):
            return STOPPED  # the run has said that it saved
        print(f"{error}\n{said(failure) or f'error: [rank {rank}] {failure.message}'}", file=sys.stderr, flush=True)
        return max(failure.exitcode, 1)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}: the same command resumes from what was saved", file=sys.stderr)
        return STOPPED
    return 0


def said(failure: ProcessFailure) -> str | None:
    """What main.py said when it failed; None for a process that could not say anything."""
    return failure.message["message"] if isinstance(failure.message, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
