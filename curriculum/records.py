"""What a plan is made of: stages, and the epoch records that the trainer, the sampler and the logs go by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from curriculum.presets import Curriculum


@dataclass(frozen=True)
class Pass:
    """One pass over the training set, or the last, shortened pass of a stage.

    Attributes:
        index: its place in the plan, from 0.
        stage: the curriculum stage it belongs to, from 0.
        input_size: B, pixels a side.
        magnitude: RandAugment magnitude (0 to 10), None for no RandAugment.
        batch_size: images per optimizer step, over all devices.
        replay: of these, one in ``replay`` is loaded; the rest come from the replay buffer (1: all are loaded).
        steps: optimizer steps in it.
        start, stop: the stretch of training progress it covers, shares of the plan's clock in [0, 1].
        first_step: optimizer steps of the run before it.
        radius, mixing: of its :class:`~curriculum.presets.Segment`.

    >>> from curriculum import build_plan
    >>> first = next(iter(build_plan("efficienttrain++", epochs=2, num_images=800, batch_size=8, base_size=64)))
    >>> first.index, first.input_size, first.steps, first.start
    (0, 32, 100, 0.0)
    """

    index: int
    stage: int
    input_size: int
    magnitude: float | None
    batch_size: int
    replay: int
    steps: int
    start: float
    stop: float
    first_step: int
    radius: float | None = None
    mixing: float = 1.0


@dataclass(frozen=True)
class Stage:
    """The epochs that are shown alike, at one input size. ``first_step`` is in optimizer steps, ``start`` and ``stop``
    are progress."""

    input_size: int
    batch_size: int
    replay: int
    steps: int
    steps_per_pass: int
    first_step: int
    start: float
    stop: float
    radius: float | None = None
    mixing: float = 1.0

    @property
    def passes(self) -> float:
        """Passes over the training set; the last is usually shortened."""
        return self.steps / self.steps_per_pass


def make_stages(
    curriculum: Curriculum,
    epochs: float,
    num_images: int,
    batch_size: int,
    early_large_batch: bool,
    replay: Sequence[int],
) -> tuple[Stage, ...]:
    """The curriculum's stages in optimizer steps; see :func:`curriculum.build_plan`, whose arguments these are.

    Raises:
        ValueError: a stage too short for one step.
    """
    base = curriculum.base_size
    budget = epochs * (num_images // batch_size)  # in full-size steps of the base batch
    spent, first_step, rows = 0.0, 0, []
    for segment, factor in zip(curriculum.stages, chain(replay, repeat(1))):
        size = segment.input_size
        pixels = (size / base) ** 2
        batch = batch_size * 2 ** max(0, round(-math.log2(pixels))) if early_large_batch else batch_size
        cost = batch / batch_size * (pixels if curriculum.clock == "compute" else 1)
        steps = math.floor((segment.until * budget - spent) / cost + 1e-9)
        if steps < 1 or batch > num_images:
            raise ValueError(
                f"`epochs` {epochs:g} is too short for curriculum {curriculum.name}: the stage at input size {size} "
                f"gets {max(steps, 0)} optimizer steps of {batch} of the {num_images} images; raise `epochs`, lower "
                "`batch_size`, or choose `curriculum` none"
            )
        rows.append((size, batch, factor, steps, num_images * factor // batch, first_step, spent))
        spent, first_step = spent + steps * cost, first_step + steps
    ends = [*(row[-1] / spent for row in rows[1:]), 1.0]
    return tuple(
        Stage(*row[:-1], start=row[-1] / spent, stop=end, radius=segment.radius, mixing=segment.mixing)
        for row, end, segment in zip(rows, ends, curriculum.stages)
    )


def make_records(stages: tuple[Stage, ...], curriculum: Curriculum, max_magnitude: float) -> tuple[Pass, ...]:
    """The passes over the data that the stages are made of, the last of a stage shortened."""
    records: list[Pass] = []
    for number, stage in enumerate(stages):
        per_step = (stage.stop - stage.start) / stage.steps
        for done in range(0, stage.steps, stage.steps_per_pass):
            steps = min(stage.steps_per_pass, stage.steps - done)
            start = stage.start + done * per_step
            last = done + steps == stage.steps
            records.append(
                Pass(
                    index=len(records),
                    stage=number,
                    input_size=stage.input_size,
                    magnitude=_magnitude(curriculum, start, per_step, max_magnitude),
                    batch_size=stage.batch_size,
                    replay=stage.replay,
                    steps=steps,
                    start=start,
                    stop=stage.stop if last else stage.start + (done + steps) * per_step,
                    first_step=stage.first_step + done,
                    radius=stage.radius,
                    mixing=stage.mixing,
                )
            )
    return tuple(records)


def _magnitude(curriculum: Curriculum, progress: float, per_step: float, maximum: float) -> float | None:
    """RandAugment magnitude of an epoch record that starts at ``progress`` (ICCV Section 4.2: m = progress x m0)."""
    if curriculum.magnitude == "none":
        return None
    if curriculum.magnitude == "linear":
        return maximum * progress
    if curriculum.magnitude == "steps":
        values = curriculum.magnitude_steps
        # Stages end up to a step early: a record that starts less than a step before its segment belongs to it.
        return values[min(int((progress + per_step) * len(values)), len(values) - 1)]
    return maximum
