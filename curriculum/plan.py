"""The plan: a pure function turns a few settings into every optimizer step of the run; everything else reads it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from curriculum.durations import parse_duration
from curriculum.presets import Curriculum, resolve
from curriculum.records import Pass, Stage, make_records, make_stages

SCHEDULES = ("cosine", "steps", "poly")
STEP_FACTOR = 0.1  # of the learning rate, at each of lr_steps


@dataclass(frozen=True, repr=False)
class Plan:
    """The whole run. Made by :func:`build_plan`; iterating it gives its :class:`Pass` records in order."""

    curriculum: Curriculum
    epochs: float
    num_images: int
    batch_size: int
    lr: float
    min_lr: float
    weight_decay: float
    weight_decay_end: float
    warmup: str | float
    max_magnitude: float
    lr_rule: str
    schedule: str
    lr_steps: tuple[str | float, ...]
    stages: tuple[Stage, ...]
    records: tuple[Pass, ...]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        """A line for the run and one for each stage; `curriculum.table` says more."""
        stages = [
            f"  B {stage.input_size}: {stage.passes:.1f} passes, {stage.steps:,} steps of {stage.batch_size:,} images"
            for stage in self.stages
        ]
        head = f"Plan: {self.curriculum.name}, {self.epochs:g} epochs at base size {self.base_size}"
        return "\n".join([f"{head}, {self.num_images:,} images, {self.total_steps:,} steps", *stages])

    @property
    def base_size(self) -> int:
        return self.curriculum.base_size

    @property
    def operator(self) -> str:
        return self.curriculum.operator

    def loaded_size(self, size: int) -> int:
        """Pixels a side at which images are loaded for input size ``size``: ``fourier`` reduces them on the device."""
        return self.base_size if self.operator == "fourier" else size

    @cached_property
    def total_steps(self) -> int:
        return self.stages[-1].first_step + self.stages[-1].steps

    @cached_property
    def _first_steps(self) -> list[int]:
        return [record.first_step for record in self.records]

    def locate(self, step: int) -> tuple[Pass, int]:
        """The epoch record that optimizer step ``step`` (from 0) belongs to, and its place inside the record."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the plan's {self.total_steps} steps")
        record = self.records[bisect.bisect_right(self._first_steps, step) - 1]
        return record, step - record.first_step

    def progress(self, step: float) -> float:
        """Share of the plan's clock spent before optimizer step ``step``; 1 at the end."""
        for stage in self.stages:
            if step < stage.first_step + stage.steps:
                return stage.start + (stage.stop - stage.start) * (step - stage.first_step) / stage.steps
        return 1.0

    def equivalent_epochs(self, step: int) -> float:
        """Compute spent before optimizer step ``step``, in epochs at the base size (by pixels)."""
        images = 0.0
        for stage in self.stages:
            done = min(max(step - stage.first_step, 0), stage.steps)
            images += done * stage.batch_size * (stage.input_size / self.base_size) ** 2
        return images / (self.num_images // self.batch_size * self.batch_size)

    # -- schedules: continuous functions of progress -------------------------------------------------------------

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step``: linear warm-up from 0, then as ``schedule`` says.

        ``cosine`` begins where warm-up ends, and goes to ``min_lr``. The others go by the whole clock, as in
        mmsegmentation and mmdetection, and warm-up is a factor on them: ``poly`` falls linearly to ``min_lr``, and
        ``steps`` to a tenth of what it was after each of ``lr_steps``.

        With a larger batch at a small size (``early_large_batch``) it is scaled by the square root of the batch's
        ratio, or by the ratio itself, as ``lr_rule`` says.
        """
        progress, warm = self.progress(step), self.warmup_progress
        ramp = progress / warm if progress < warm else 1.0
        if self.schedule == "steps":
            lr = ramp * self.lr * STEP_FACTOR ** bisect.bisect_right(self._drops, step)
        elif self.schedule == "poly":
            lr = ramp * (self.min_lr + (1 - progress) * (self.lr - self.min_lr))
        elif progress < warm:
            lr = ramp * self.lr
        else:
            lr = self.min_lr + _cosine((progress - warm) / (1 - warm)) * (self.lr - self.min_lr)
        ratio = self.locate(step)[0].batch_size / self.batch_size
        return lr * (math.sqrt(ratio) if self.lr_rule == "sqrt" else ratio)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of optimizer step ``step``: a cosine from ``weight_decay`` to ``weight_decay_end``."""
        end = self.weight_decay_end
        return end + _cosine(self.progress(step)) * (self.weight_decay - end)

    @cached_property
    def _drops(self) -> list[int]:
        """The steps from which the learning rate is a tenth of what it was."""
        return [self.first_after(duration) for duration in self.lr_steps]

    @cached_property
    def warmup_progress(self) -> float:
        """The share of the clock that warm-up takes."""
        value, unit = parse_duration(self.warmup)
        if unit == "epochs":
            return value / self.epochs
        if unit == "%":
            return value / 100
        if unit == "passes":  # -> steps
            steps = 0.0
            for stage in self.stages:
                part = min(value, stage.passes)
                steps, value = steps + part * stage.steps_per_pass, value - part
            return self.progress(steps) if value <= 0 else math.inf
        return self.progress(value)

    # -- durations -----------------------------------------------------------------------------------------------

    def measure(self, step: int, unit: str) -> float:
        """How many ``epochs`` (of the plan's clock), ``passes``, ``%`` or ``steps`` lie before step ``step``."""
        if unit == "steps":
            return float(step)
        if unit == "passes":
            return sum(
                min(max(step - stage.first_step, 0), stage.steps) / stage.steps_per_pass for stage in self.stages
            )
        return self.progress(step) * (self.epochs if unit == "epochs" else 100)

    def due(self, duration: str | float, step: int, since: int | None = None) -> bool:
        """Whether, with ``step`` steps done, a multiple of ``duration`` was completed after ``since`` (step - 1)."""
        value, unit = parse_duration(duration)
        if value == 0:
            return False
        # A multiple that rounding leaves a hair short still counts.
        before, after = (
            math.floor(self.measure(s, unit) / value + 1e-9) for s in (step - 1 if since is None else since, step)
        )
        return after > before

    def first_after(self, duration: str | float) -> int:
        """The number of optimizer steps with which ``duration`` has passed; all of them for one beyond the end."""
        value, unit = parse_duration(duration)
        steps = range(self.total_steps)
        return bisect.bisect_left(steps, value - 1e-9, key=lambda step: self.measure(step, unit))


def _cosine(x: float) -> float:
    """1 at x = 0, 0 at x = 1."""
    return 0.5 * (1 + math.cos(math.pi * min(max(x, 0.0), 1.0)))


def build_plan(
    curriculum: str | dict | Curriculum = "efficienttrain++",
    *,
    epochs: float | str,
    num_images: int,
    batch_size: int,
    base_size: int = 224,
    size_multiple: int = 16,
    lr: float = 4e-3,
    min_lr: float = 1e-6,
    warmup: str | float = "5%",
    weight_decay: float = 0.05,
    weight_decay_end: float | None = None,
    magnitude: str | None = None,
    max_magnitude: float = 9.0,
    operator: str | None = None,
    early_large_batch: bool = False,
    lr_rule: str = "sqrt",
    schedule: str = "cosine",
    lr_steps: Sequence[str | float] = (),
    replay: Sequence[int] = (),
) -> Plan:
    """Plans a run.

    A full pass is ``floor(num_images / batch_size)`` optimizer steps and the budget ``epochs`` times as many, in
    full-size steps under the compute clock, where a step at B costs (B / base)^2, and in any steps under the epoch
    clock. Stages end where the curriculum says, to the step; what a stage leaves over is carried into the next, so
    that the whole run costs the budget to within one full-size step.

    Args:
        curriculum: a preset (``curriculum.PRESETS``), the content of a curriculum file, or a :class:`Curriculum`.
        epochs: the budget: passes under the epoch clock, full-size passes' worth of compute under the compute clock.
            ``160000 steps``: as many full-size steps.
        num_images: size of the training set.
        batch_size: images per optimizer step, over all devices.
        base_size: the full input size g, pixels.
        size_multiple: what the model's input size must be a multiple of (32 for Swin, the patch for ViTs, else 16).
        lr, min_lr: peak and final learning rate.
        warmup: a duration (:func:`parse_duration`) of linear warm-up from 0.
        weight_decay, weight_decay_end: cosine between the two; end None keeps it constant.
        magnitude: overrides the curriculum's RandAugment schedule (``linear``, ``steps``, ``constant``, ``none``).
        max_magnitude: where that schedule ends, 0 to 10.
        operator: overrides the curriculum's low-frequency operator.
        early_large_batch: larger batches at small sizes, so that many devices stay busy (EfficientTrain++ Section 5.3):
            (base / B)^2, rounded to a power of two, times ``batch_size``.
        lr_rule: ``sqrt`` or ``linear``: how the learning rate follows such a batch.
        schedule: of the learning rate after warm-up, one of ``SCHEDULES`` (:meth:`Plan.lr_at`).
        lr_steps: durations after which ``steps`` lowers it.
        replay: for each stage (1 for those not given), how many times a loaded image is used on average; a pass over
            the training set then takes that many times the steps (EfficientTrain++ Section 5.3).

    Raises:
        ValueError: a setting out of range, fewer images than a batch, or a stage too short for one step.

    >>> plan = build_plan("efficienttrain++", epochs=200, num_images=1281167, batch_size=4096)
    >>> [(stage.input_size, round(stage.passes, 1)) for stage in plan.stages]
    [(96, 217.8), (160, 156.8), (224, 80.0)]
    """
    if num_images < batch_size:
        raise ValueError(
            f"the training set has {num_images} images but `batch_size` is {batch_size}: "
            f"lower it to at most {num_images}"
        )
    epochs = _in_epochs(epochs, num_images // batch_size if batch_size > 0 else 1)
    for name, value, low, high in (
        ("epochs", epochs, 0, math.inf),
        ("batch_size", batch_size, 0, math.inf),
        ("base_size", base_size, 0, math.inf),
        ("lr", lr, 0, math.inf),
    ):
        if not low < value < high:
            raise ValueError(f"`{name}` is {value}; it must be a positive number")
    if not 0 <= max_magnitude <= 10:
        raise ValueError(f"`max_magnitude` is {max_magnitude}; RandAugment's range is 0 to 10")
    if lr_rule not in ("sqrt", "linear"):
        raise ValueError(f"`lr_rule` is {lr_rule!r}; choose sqrt or linear")
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule` is {schedule!r}; choose {', '.join(SCHEDULES)}")
    if (schedule == "steps") != bool(lr_steps):
        raise ValueError(
            "`schedule` steps needs `lr_steps`, e.g. 8 11"
            if schedule == "steps"
            else f"`lr_steps` is for the schedule steps, but `schedule` is {schedule}"
        )

    chosen = resolve(curriculum, base_size, size_multiple)
    changes = {key: value for key, value in (("operator", operator), ("magnitude", magnitude)) if value is not None}
    chosen = Curriculum(**{**vars(chosen), **changes})  # checks the overrides as it checks a file

    if any(factor < 1 for factor in replay):
        raise ValueError(f"`replay` is {list(replay)}; each stage's factor is a whole number from 1")
    stages = make_stages(chosen, epochs, num_images, batch_size, early_large_batch, replay)
    plan = Plan(
        curriculum=chosen,
        epochs=epochs,
        num_images=num_images,
        batch_size=batch_size,
        lr=lr,
        min_lr=min_lr,
        weight_decay=weight_decay,
        weight_decay_end=weight_decay if weight_decay_end is None else weight_decay_end,
        warmup=warmup,
        max_magnitude=max_magnitude,
        lr_rule=lr_rule,
        schedule=schedule,
        lr_steps=tuple(lr_steps),
        stages=stages,
        records=make_records(stages, chosen, max_magnitude),
    )
    if plan.warmup_progress >= 1:
        raise ValueError(f"`warmup` {warmup} is not shorter than the run of {epochs:g} epochs; write e.g. 10%")
    drops, durations = plan._drops, [parse_duration(duration) for duration in lr_steps]
    shares = all(unit == "%" and 0 < value < 100 for value, unit in durations)  # few steps may not tell them apart
    if any(not 0 < drop < plan.total_steps + shares for drop in drops) or drops != sorted(
        drops if shares else {*drops}
    ):
        raise ValueError(
            f"`lr_steps` {' '.join(map(str, lr_steps))}: they must rise, within the run of {epochs:g} epochs"
        )
    return plan


def _in_epochs(epochs: float | str, steps_per_epoch: int) -> float:
    """The budget in epochs, of a number of epochs or ``N steps``."""
    value, unit = parse_duration(epochs) if isinstance(epochs, str) else (epochs, "epochs")
    if unit not in ("epochs", "steps"):
        raise ValueError(f"`epochs` is {epochs!r}; write a number of epochs, or e.g. 160000 steps")
    return value / steps_per_epoch if unit == "steps" else value
