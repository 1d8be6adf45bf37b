"""The loss, the gradient's norm, and what goes wrong with them: kept on the device, read at log steps, reported so
that it can be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from curriculum import CurriculumSampler, Plan
from curriculum.sampler import SAMPLE, derive_seed
from datasets import Source
from models import checkpoints
from utils import all_min, all_sum, write_text

NEVER = 1 << 62
MAX_STREAK = 30  # skipped steps in a row: fp16's scale has then fallen by 2^30, and is not what is wrong
MAX_SKIPPED = 0.01  # share of the run's steps that --on_nonfinite skip skips at most


def max_skipped(plan: Plan) -> float:
    """Optimizer steps that ``--on_nonfinite skip`` skips at most."""
    return max(MAX_STREAK, MAX_SKIPPED * plan.total_steps)


class NonFinite(RuntimeError):
    """The loss or the gradient became NaN or infinite, at optimizer step ``step`` (from 0)."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class LossMeter:
    """Sums of losses and gradient norms since :meth:`reset`, and steps that went wrong since the start. No step waits
    for the device.

    Args:
        device: where the losses are.
        skips: whether the optimizer skips steps with a non-finite gradient: by fp16's scaler, as its normal
            work, or as ``--on_nonfinite skip`` asks. Otherwise the first one is an error.
        tolerates_loss: the same for a non-finite loss, as ``--on_nonfinite skip`` asks.
        max_skipped: skipped steps, in all, that become an error.
    """

    def __init__(
        self, device: torch.device, skips: bool = False, tolerates_loss: bool = False, max_skipped: float = NEVER
    ) -> None:
        # Double precision makes the mean independent of where a run was interrupted; MPS has none.
        self.sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        # Of the steps whose gradient was finite: its norms' sum, and their number; and both when they were last read.
        self.norms, self._read = torch.zeros_like(self.sums), (0.0, 0.0)
        # First step that is an error; skipped steps: in a row until now, most in a row, in all, and the last of them.
        self.trouble = torch.tensor([NEVER, 0, 0, 0, 0], device=device)
        self.skips, self.tolerates_loss, self.max_skipped = skips, tolerates_loss, max_skipped

    def add(self, loss: torch.Tensor, images: int, step: int) -> None:
        """The mean loss of ``images`` images of optimizer step ``step``."""
        loss = loss.detach().to(self.sums.dtype)
        finite = torch.isfinite(loss)
        self.sums[0] += torch.where(finite, loss * images, 0.0)
        self.sums[1] += images * finite
        if not self.tolerates_loss:
            self._note_error(finite, step)

    def add_gradient(self, norm: torch.Tensor, step: int) -> None:
        """The gradient's norm at optimizer step ``step``, the same on all processes."""
        finite = torch.isfinite(norm)
        self.norms[0] += torch.where(finite, norm, 0.0)
        self.norms[1] += finite
        if not self.skips:
            return self._note_error(finite, step)
        bad = (~finite).to(self.trouble.dtype)
        self.trouble[1] = (self.trouble[1] + 1) * bad
        self.trouble[2] = torch.maximum(self.trouble[1], self.trouble[2])
        self.trouble[3] += bad
        self.trouble[4] = torch.where(finite, self.trouble[4], step)

    def _note_error(self, finite: torch.Tensor, step: int) -> None:
        self.trouble[0] = torch.where(finite, self.trouble[0], self.trouble[0].clamp(max=step))

    def mean(self) -> float:
        """Mean over the images of all processes. Waits for the device.

        Raises:
            NonFinite: on every process alike, if there was an error or too much was skipped.
        """
        total, images = all_sum(self.sums.clone()).tolist()
        first_error = all_min(self.trouble[:1].clone()).item()
        _, _, streak, skipped, last = self.trouble.tolist()
        if first_error < NEVER:
            raise NonFinite("the loss or its gradient is not finite", first_error)
        if streak >= MAX_STREAK:
            raise NonFinite(f"{streak} optimizer steps in a row were skipped for a gradient that is not finite", last)
        if skipped > self.max_skipped:
            raise NonFinite(f"{skipped} optimizer steps were skipped for a gradient that is not finite", last)
        return total / max(images, 1)

    def gradient_norm(self) -> tuple[float | None, float | None]:
        """Mean norm of the gradient since the last call, and since :meth:`reset`. Waits for the device.

        Steps whose gradient was not finite do not count; None: there were no others.
        """
        total, steps = self.norms.tolist()
        (before, seen), self._read = self._read, (total, steps)
        return (total - before) / (steps - seen) if steps > seen else None, total / steps if steps else None

    def reset(self) -> None:
        self.sums.zero_()
        self.norms.zero_()
        self._read = (0.0, 0.0)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; a collective operation."""
        loss, gradient = all_sum(self.sums.clone()).tolist(), self.norms.tolist()
        return {"loss": loss, "gradient": gradient, "skipped": self.trouble[1:].tolist()}

    def load(self, state: dict[str, Any], is_main: bool) -> None:
        if is_main:  # sums of the epoch in progress, of all processes
            self.sums += torch.tensor(state["loss"], dtype=self.sums.dtype).to(self.sums.device)
        self._read = tuple(state.get("gradient", (0.0, 0.0)))
        self.norms += torch.tensor(self._read, dtype=self.norms.dtype).to(self.norms.device)
        self.trouble[1:] = torch.tensor(state.get("skipped", [0] * 4)).to(self.trouble.device)


def snapshot(error: NonFinite, output: Path, sampler: CurriculumSampler, source: Source) -> str:
    """Writes what is needed to see a bad step again, and returns the message about it, one line.

    ``nonfinite-<step>/`` in the output folder holds ``images.json``, the step's images (of all processes) with size,
    magnitude and seeds, and ``checkpoint.pth``, the newest good checkpoint before it: a run that resumes there
    meets the step again. With replay, only the freshly loaded images are listed.
    """
    step = error.step
    epoch, place = sampler.plan.locate(step)
    fresh = epoch.batch_size // epoch.replay
    indices = sampler.permutation(epoch)[place * fresh : (place + 1) * fresh].tolist()
    names = [source.name(index) for index in indices]
    folder = output / f"nonfinite-{step}"
    message = (
        f"{error} at step {step} (stage {epoch.stage + 1}, pass {epoch.index + 1}, input size {epoch.input_size}, "
        f"learning rate {sampler.plan.lr_at(step):.2e}); its images are {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    )
    mend = (
        "lower --lr, set --clip_grad or use --amp bf16 or none (each with --allow_change lr, clip_grad or amp), or "
        "skip such steps with --on_nonfinite skip"
    )
    try:
        folder.mkdir(exist_ok=True)
        found = checkpoints.newest(output)
        if found is not None and found[1]["step"] <= step:
            checkpoints.link(found[0], folder / "checkpoint.pth")
        content = {
            "step": step,
            "stage": epoch.stage,
            "epoch": epoch.index,
            "input_size": epoch.input_size,
            "magnitude": epoch.magnitude,
            "run_seed": sampler.seed,
            "images": [
                {"name": name, "index": index, "seed": derive_seed(sampler.seed, SAMPLE, epoch.index, index)}
                for name, index in zip(names, indices)
            ],
        }
        write_text(folder / "images.json", json.dumps(content, indent=1) + "\n")
    except (OSError, ValueError) as failure:
        return f"{message}; no snapshot could be written ({failure}); {mend}"
    return f"{message}; all of them, and the checkpoint to meet it again from, are in {folder}; {mend}"
