"""What the user sees: log.txt (JSON lines), curves, and the progress line with the ETA of the whole run."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from config.files import read_bytes
from curriculum import Pass, Plan
from engine import Training, total_norm
from models.run_files import parse_record
from training.curves import Curves, TensorBoard
from utils import duration_text, unwrap, write_text

ROUNDING = 1e-9  # progress that rounding may add


class RunLog:
    """``log.txt`` and ``tensorboard/`` in the output folder, and other curves. Does nothing with ``folder`` None, as in
    processes other than the main one.

    A full or broken disk does not end the run: records that could not be written are kept and written with the next.

    Args:
        folder: the output folder.
        step: optimizer steps done.
        logged: progress up to which records stay; on resume, later ones are cut away, for they will come again.
        unwritten: lines that the run before could not write, from its checkpoint.
        curves: where the numbers are drawn beside TensorBoard.
    """

    def __init__(
        self, folder: Path | None, step: int, logged: float, unwritten: str = "", curves: Sequence[Curves] = ()
    ) -> None:
        self.path = folder / "log.txt" if folder else None
        self.waiting = ""
        self.curves: list[Curves] = []
        if folder is None:
            return
        self._cut(logged, unwritten)
        self.curves = [TensorBoard(folder / "tensorboard", step), *curves]

    def _cut(self, logged: float, unwritten: str) -> None:
        """A damaged line stays where it is; the piece that a kill left of the last one is the start of one to come."""
        before = read_bytes(self.path) if self.path.exists() else b""
        lines = [line.decode("utf-8", "surrogateescape") for line in io.BytesIO(before)]
        records = [parse_record(line) for line in lines]
        if lines and records[-1] is None and not lines[-1].endswith("\n"):
            del lines[-1]
        kept = [
            line for line, record in zip(lines, records) if record is None or record["progress"] <= logged + ROUNDING
        ]
        if damaged := sum(parse_record(line) is None for line in kept):
            print(
                f"warning: {self.path} has {damaged} damaged line{'s' * (damaged > 1)}, kept and passed over",
                flush=True,
            )
        kept += [line for line in unwritten.splitlines(keepends=True) if line not in kept]
        after = "".join(kept).encode("utf-8", "surrogateescape")
        if after != before or not self.path.exists():
            write_text(self.path, "".join(kept))

    def epoch(self, record: dict[str, Any]) -> None:
        """Appends one epoch's record and draws its numbers."""
        if self.path is None:
            return
        self.waiting += json.dumps(record) + "\n"
        try:
            self._write_waiting()
        except OSError as error:
            print(
                f"warning: {self.path} cannot be written ({error.strerror}); its records are kept in the checkpoints, "
                "and written with the next",
                flush=True,
            )
        numbers = {key: value for key, value in record.items() if isinstance(value, float | int) and key != "step"}
        self._draw("epoch", record["step"], numbers)

    def _write_waiting(self) -> None:
        """All of it or, on an error, nothing: half a line would spoil the next one."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size, content = os.fstat(handle).st_size, self.waiting.encode()
            try:
                if os.write(handle, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        self.waiting = ""

    def interval(self, step: int, scalars: dict[str, float]) -> None:
        """Draws the numbers of a log interval."""
        self._draw("train", step, scalars)

    def _draw(self, group: str, step: int, scalars: dict[str, float]) -> None:
        for place in self.curves:
            place.draw(step, {f"{group}/{key}": value for key, value in scalars.items()})

    def picture(self, step: int, name: str, pixels: torch.Tensor) -> None:
        """Shows uint8 (3, H, W) beside the curves."""
        for place in self.curves:
            place.picture(step, name, pixels)

    def close(self) -> None:
        """Raises OSError if records are still not written."""
        for place in self.curves:
            place.close()
        if self.path is not None and self.waiting:
            self._write_waiting()


class Progress:
    """Measures speed and says when the run will end: each stage has its own speed, measured once it runs.

    A stage that has not run yet is assumed to take time in proportion to its pixels, from the one that ran last.
    Compiling, which the first step at each input size does, counts once for each size that is to come.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seconds_per_step: dict[int, float] = {}  # by stage
        self.evaluation_seconds = 0.0  # the last evaluation's
        self.compile_seconds = 0.0  # the last input size's
        self.compiling = False  # whether the next step does
        self.mark()

    def mark(self) -> None:
        """Starts an interval of training (after anything that is not training)."""
        self._time, self._steps = time.perf_counter(), 0

    def step(self) -> bool:
        """Counts a step. Whether it was one that compiled, which says nothing of the speed."""
        if self.compiling:
            self.compile_seconds, self.compiling = time.perf_counter() - self._time, False
            self.mark()
            return True
        self._steps += 1
        return False

    def interval(self, epoch: Pass) -> float:
        """Ends the interval and starts another. Images per second over all devices."""
        seconds = max(time.perf_counter() - self._time, 1e-9)
        speed = self._steps * epoch.batch_size / seconds
        if self._steps:
            self.seconds_per_step[epoch.stage] = seconds / self._steps
        self.mark()
        return speed

    def eta(self, step: int, epoch: Pass, evaluations_left: float) -> float:
        """Seconds to the end of the run after ``step`` optimizer steps; infinite before anything was measured."""
        known = self.seconds_per_step.get(epoch.stage)
        if known is None:
            return float("inf")
        per_pixel = known / (epoch.batch_size * epoch.input_size**2)
        sizes = [stage.input_size for stage in self.plan.stages[epoch.stage :]]
        total = evaluations_left * self.evaluation_seconds
        total += self.compile_seconds * sum(a != b for a, b in itertools.pairwise(sizes))
        for number, stage in enumerate(self.plan.stages):
            left = stage.first_step + stage.steps - max(step, stage.first_step)
            if left > 0:
                guess = per_pixel * stage.batch_size * stage.input_size**2
                total += left * self.seconds_per_step.get(number, guess)
        return total


def progress_line(
    plan: Plan, epoch: Pass, step: int, loss: float, lr: float, images_per_s: float, eta: float, device: torch.device
) -> str:
    """One line: where the run is, what the network sees, how it does, how fast, and until when."""
    magnitude = "-" if epoch.magnitude is None else f"{epoch.magnitude:.1f}"
    return (
        f"stage {epoch.stage + 1}/{len(plan.stages)}  pass {epoch.index + 1}/{len(plan)}  "
        f"step {step}/{plan.total_steps} ({100 * plan.progress(step):.1f} %)  B {epoch.input_size}  m {magnitude}  "
        f"loss {loss:.4f}  lr {lr:.2e}  {images_per_s:,.0f} images/s  mem {memory_gib(device):.1f} GiB  "
        f"eta {duration_text(eta)}"
    )


def measure(training: Training) -> dict[str, float]:
    """What is worth a curve beside loss and speed, as far as it is to be had. Waits for the device."""
    found = {"weight_norm": total_norm([*unwrap(training.model).parameters()]).item()}
    if training.amp == "fp16":
        found["loss_scale"] = training.scaler.get_scale()
    found["memory_gib"] = memory_gib(training.device)
    if training.device.type == "cuda":
        with suppress(Exception):  # it takes the package nvidia-ml-py, and a device that is not partitioned (MIG)
            found["gpu_utilization"] = float(torch.cuda.utilization(training.device))
    return found


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the device where it tells (CUDA), else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def spread(values: Sequence[float], digits: int = 2) -> str:
    """58.41 +- 0.52: the mean and, of several, the sample's standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
