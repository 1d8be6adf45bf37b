"""When checkpoints are written, and what happens when they cannot be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import checkpoints
from curriculum import Plan, parse_duration
from utils import Topology, all_sum

MAX_FAILURES = 3  # failed writes in a row after which a run stops: it would otherwise train on with nothing to keep


def parse_interval(text: str | float) -> float | None:
    """``30 minutes`` -> seconds; None for a duration of the plan (:func:`curriculum.parse_duration`).

    Raises:
        ValueError: neither.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(?:min|minutes?)\s*", str(text))
    if match is None:
        try:
            parse_duration(text)
        except ValueError as error:
            raise ValueError(f"--save_interval: {error}, or 30 minutes") from None
        return None
    try:
        return 60 * float(match[1])
    except ValueError:
        raise ValueError(f"--save_interval {text!r} is not understood; write e.g. 30 minutes") from None


class Saver:
    """Writes the checkpoints of a run. Every process calls every method alike; the main one writes.

    Args:
        output: the output folder.
        interval: ``--save_interval``: a duration of the plan, or minutes.
        keep: how many checkpoint-<step>.pth stay.
        plan, topology: of the run.
    """

    def __init__(self, output: Path, interval: str | float, keep: int, plan: Plan, topology: Topology) -> None:
        self.output, self.interval, self.keep, self.plan, self.topology = output, interval, keep, plan, topology
        self.seconds = parse_interval(interval)
        self.failures = 0
        self.newest: tuple[int, int] | None = None  # step and epoch of the last one written
        self._saved = time.monotonic()

    def due(self, step: int, since: int | None = None) -> bool:
        """Whether the plan's interval elapsed with ``step``, or after ``since``."""
        return self.seconds is None and self.plan.due(self.interval, step, since)

    def wanted(self) -> bool:
        """Whether this process's clock asks for one; the main process's counts, and all have to agree on the step."""
        return self.seconds is not None and self.topology.is_main and time.monotonic() - self._saved >= self.seconds

    def save(self, make: Callable[[], dict[str, Any]], place: tuple[int, int], best: bool, required: bool) -> None:
        """Writes checkpoint-last and -<step>, and -best if ``best``.

        Args:
            make: returns the payload; called by the main process.
            place: steps done and the first epoch not finished. The same place is written once.
            required: whether the run ends here, so that a failure cannot be made good later.

        Raises:
            OSError: on every process, for a failure that was the last of MAX_FAILURES or is ``required``.
        """
        self._saved = time.monotonic()
        if place == self.newest and not best:
            return
        reason = ""
        if self.topology.is_main:
            try:
                self._write(make(), place[0], best)
            except OSError as error:
                reason = error.strerror or str(error)
        failed = all_sum(torch.tensor(float(bool(reason)), device=self.topology.device)).item() > 0
        self.failures = self.failures + 1 if failed else 0
        if not failed:
            self.newest = place
        elif required or self.failures >= MAX_FAILURES:
            raise OSError(
                f"the checkpoint of step {place[0]} could not be written to {self.output}"
                f"{': ' * bool(reason)}{reason}; {self._left()}. Mend the storage and launch the same command again"
            )
        elif self.topology.is_main:
            print(
                f"warning: the checkpoint of step {place[0]} could not be written to {self.output}: {reason}; "
                f"{self._left()}. Training goes on; failure {self.failures} of {MAX_FAILURES} in a row",
                flush=True,
            )

    def _left(self) -> str:
        return f"the newest good one is of step {self.newest[0]}" if self.newest else "this run has written none yet"

    def _write(self, payload: dict[str, Any], step: int, best: bool) -> None:
        # The best one first: a kill between the two leaves it as the newest, to go on from.
        written = self.output / (checkpoints.BEST if best else checkpoints.LAST)
        checkpoints.save(written, payload)
        if best:
            checkpoints.link(written, self.output / checkpoints.LAST)
        if self.keep:
            numbered = self.output / f"checkpoint-{step}.pth"
            checkpoints.link(written, numbered)
            checkpoints.prune(self.output, self.keep, trusted=numbered)
