"""torchrun, whose last line is ours (scripts/train.sh, scripts/slurm.sh): what went wrong, with main.py's exit code.

python scripts/launch.py [torchrun's options] main.py [main.py's flags]

With a range of machines (--nnodes 1:4) the run is elastic: it goes on whenever machines leave or join.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args, parse_min_max_nnodes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import LOST, STOPPED


def main(argv: list[str]) -> int:
    options = parse_args(argv)
    most = parse_min_max_nnodes(options.nnodes)[1]
    if ":" in options.nnodes and most > 1:  # 1:1 is torchrun's default
        be_elastic(most)
    try:
        torchrun(argv)
    except (ChildFailedError, Leaves) as error:
        failures = sorted(error.failures.items(), key=lambda item: (said(item[1]) is None, item[1].timestamp))
        rank, failure = failures[0]
        if any(other.exitcode == STOPPED for _, other in failures) and not isinstance(error, Leaves):
            return STOPPED  # the run has said that it saved
        print(f"{error}\n{said(failure) or f'error: [rank {rank}] {failure.message}'}", file=sys.stderr, flush=True)
        return max(failure.exitcode, 1)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}: the same command resumes from what was saved", file=sys.stderr)
        return STOPPED
    except RendezvousError as error:
        print(
            f"error: no meeting with the other machines at {options.rdzv_endpoint}: the run has ended there, or nobody "
            f"answers; the same command resumes from what was saved ({type(error).__name__}: {error})",
            file=sys.stderr,
        )
        return 1
    return 0


def be_elastic(nodes: int) -> None:
    """Tells the workers that they may come to be on as many as ``nodes`` machines, and torchrun what ends a run."""
    os.environ["ELASTIC_NODES"] = str(nodes)
    # Or else torchrun keeps the workers' first meeting point, which a machine that joins later does not know.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launcher.LocalElasticAgent = Agent


class Leaves(SignalException):
    """This machine leaves an elastic run. After any other exception torchrun would end the run on all machines."""

    def __init__(self, failures: dict[int, ProcessFailure]) -> None:
        super().__init__("this machine leaves the run", signal.SIGTERM)
        self.failures = failures


class Agent(LocalElasticAgent):
    """Starts workers again that were stopped, killed, or lost those of other machines; what a worker itself says that
    went wrong would go wrong again, and ends its machine's part."""

    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        lines = [line for line in map(said, result.failures.values()) if line is not None]
        if any(not any(lost in line for lost in LOST) for line in lines):
            raise Leaves(result.failures)
        return result


def said(failure: ProcessFailure) -> str | None:
    """What main.py said when it failed; None for a process that could not say anything."""
    return failure.message["message"] if isinstance(failure.message, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
