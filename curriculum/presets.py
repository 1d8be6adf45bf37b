"""The published curricula: which input size B when, on which clock, with which operator and RandAugment schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from curriculum.operators import OPERATORS

MAGNITUDES = ("linear", "steps", "constant", "none")
CLOCKS = ("epochs", "compute")


class Segment(NamedTuple):
    """A stretch of a curriculum's clock, and what the network is shown in it.

    Attributes:
        until: the share of the clock at which it ends, (0, 1].
        input_size: B, pixels a side at the curriculum's base size.
        radius: images are low-pass filtered by a disc of this radius in the spectrum (cycles per image side at the
            base size, see :func:`curriculum.low_pass`); None for no filter. For the studies of ICCV Table 2.
        mixing: factor on the alphas of mixup and cutmix, [0, 1]; 0 is no mixing. For progressive learning.
    """

    until: float
    input_size: int
    radius: float | None = None
    mixing: float = 1.0


@dataclass(frozen=True)
class Curriculum:
    """What the network is shown as training proceeds.

    Attributes:
        name: what logs and plan.json call it.
        clock: ``epochs`` (one pass over the data costs 1) or ``compute`` (a pass at size B costs (B / base)^2).
        stages: :class:`Segment` s, or tuples of their leading fields; ``until`` rises to 1.
        base_size: the full size for which those sizes were chosen; another base scales them in proportion.
        operator: how an image is reduced to B, one of ``OPERATORS``.
        magnitude: RandAugment schedule, one of ``MAGNITUDES``: ``linear`` 0 -> max with progress, ``steps`` (the
            staircase of the authors' scripts), ``constant`` (max throughout) or ``none`` (no RandAugment).
        magnitude_steps: the staircase's values, equal shares of the clock each.

    >>> from curriculum import build_plan
    >>> mine = Curriculum("mine", "compute", ((0.3, 128), (1.0, 224)))
    >>> [stage.input_size for stage in build_plan(mine, epochs=5, num_images=800, batch_size=8).stages]
    [128, 224]
    """

    name: str
    clock: str
    stages: tuple[Segment, ...]
    base_size: int = 224
    operator: str = "lanczos"
    magnitude: str = "linear"
    magnitude_steps: tuple[float, ...] = tuple(float(m) for m in range(10))

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(Segment(*stage) for stage in self.stages))
        for setting, value, allowed in (
            ("clock", self.clock, CLOCKS),
            ("operator", self.operator, OPERATORS),
            ("magnitude", self.magnitude, MAGNITUDES),
        ):
            if value not in allowed:
                raise ValueError(f"curriculum {self.name}: {setting} is {value!r}; choose one of {', '.join(allowed)}")
        untils = [stage.until for stage in self.stages]
        if not untils or untils[-1] != 1 or any(b <= a for a, b in zip([0.0, *untils], untils)):
            raise ValueError(
                f"curriculum {self.name}: the stages' `until` must rise from above 0 and end at 1, got {untils}"
            )
        if not isinstance(self.base_size, int) or self.base_size < 1:
            raise ValueError(f"curriculum {self.name}: base_size is {self.base_size!r}; it must be a positive number")
        if any(not 1 <= stage.input_size <= self.base_size for stage in self.stages):
            raise ValueError(
                f"curriculum {self.name}: input sizes must be positive and at most base_size, {self.base_size}; got "
                f"{', '.join(str(stage.input_size) for stage in self.stages)}"
            )
        for stage in self.stages:
            if stage.radius is not None and not stage.radius >= 0:
                raise ValueError(f"curriculum {self.name}: a stage's radius is {stage.radius}; it must be at least 0")
            if not 0 <= stage.mixing <= 1:
                raise ValueError(f"curriculum {self.name}: a stage's mixing is {stage.mixing}; it lies in [0, 1]")
        if not self.magnitude_steps or not all(0 <= value <= 10 for value in self.magnitude_steps):
            raise ValueError(
                f"curriculum {self.name}: magnitude_steps is {list(self.magnitude_steps)}; it must be a list of "
                "RandAugment magnitudes, 0 to 10 each"
            )


def round_to(value: float, multiple: int) -> int:
    """Nearest positive multiple; halves round up (96 * 192 / 224 = 82.3 -> 80; 88 -> 96 for multiple 16)."""
    return max(multiple, math.floor(value / multiple + 0.5) * multiple)


def _efficienttrain(base: int, multiple: int) -> Curriculum:
    """EfficientTrain, ICCV 2023 Table 5: 160 / (160 + g) / 2 / g at 0-60-80-100 % of the epochs."""
    first, second = (160, (160 + base) / 2) if base >= 224 else (160 * base / 224, 192 * base / 224)
    sizes = (round_to(first, multiple), round_to(second, multiple), base)
    return Curriculum(
        "efficienttrain",
        "epochs",
        tuple(zip((0.6, 0.8, 1.0), sizes)),
        base_size=base,
        operator="fourier",
        magnitude_steps=(1.0, 3.0, 5.0, 7.0, 9.0),  # the staircase of the ICCV code
    )


def _linear(base: int, multiple: int) -> Curriculum:
    """ICCV Table 13(c): B rises linearly to the base size at the cost of EfficientTrain.

    From x g to g the mean cost is (x^2 + x + 1) / 3; x = 0.5996 makes it EfficientTrain's 0.653 at base 224.
    """
    cost = 0.6 * (160 / 224) ** 2 + 0.2 * (192 / 224) ** 2 + 0.2
    start = (math.sqrt(12 * cost - 3) - 1) / 2 * base
    sizes = range(round_to(start, multiple), base, multiple)
    ends = [(size + multiple / 2 - start) / (base - start) for size in sizes]
    return Curriculum(
        "efficienttrain-linear", "epochs", (*zip(ends, sizes), (1.0, base)), base_size=base, operator="fourier"
    )


def _progressive(base: int, multiple: int) -> Curriculum:
    """Progressive learning (EfficientNetV2, ICML 2021, Algorithm 1 and Table 6), a baseline: in four equal stages the
    input size rises linearly from 128 / 224 of the base, RandAugment from a third of its end, and mixing from nothing.
    """
    sizes = [round_to((128 + 32 * number) / 224 * base, multiple) for number in range(3)]
    return Curriculum(
        "progressive",
        "epochs",
        tuple(Segment((k + 1) / 4, size, mixing=k / 3) for k, size in enumerate((*sizes, base))),
        base_size=base,
        operator="bicubic",
        magnitude="steps",
        magnitude_steps=(3.0, 5.0, 7.0, 9.0),
    )


def _dense(base: int, multiple: int) -> Curriculum:
    """For detection and segmentation, of no paper and experimental: half and three quarters of the size, each for three
    tenths of the compute. The side list, the crop and the longest side follow the size (dense.transforms)."""
    sizes = (round_to(base / 2, multiple), round_to(3 * base / 4, multiple), base)
    return Curriculum("dense-experimental", "compute", tuple(zip((0.3, 0.6, 1.0), sizes)), base, magnitude="none")


def _plus(name: str, *stages: tuple[float, int]) -> Curriculum:
    return Curriculum(name, "compute", stages)


_FIXED = {
    # TPAMI 2024; the variants are those of the authors' scripts for these models.
    "efficienttrain++": _plus("efficienttrain++", (0.2, 96), (0.6, 160), (1.0, 224)),
    "efficienttrain++-convnext": _plus("efficienttrain++-convnext", (0.6, 160), (1.0, 224)),
    "efficienttrain++-deit": _plus("efficienttrain++-deit", (0.2, 96), (0.6, 160), (0.8, 192), (1.0, 224)),
    # Of no paper: half the size or less for longer, then the full size at once. Its evidence is in docs/frontier.md, at
    # base size 64.
    "efficienttrain++-fast": Curriculum(
        "efficienttrain++-fast", "compute", ((0.3, 24), (0.7, 32), (1.0, 64)), base_size=64
    ),
}
_COMPUTED = {
    "efficienttrain": _efficienttrain,
    "efficienttrain-linear": _linear,
    "progressive": _progressive,
    "dense-experimental": _dense,
}
PRESETS = ("none", *_COMPUTED, *_FIXED)


def resolve(curriculum: str | dict | Curriculum, base_size: int, size_multiple: int) -> Curriculum:
    """A preset's name, a mapping (a YAML file's content) or a Curriculum -> one whose sizes fit base and model.

    Sizes become ``round_m(B g / base)`` with m = ``size_multiple`` (halves up); those of one's own curriculum for this
    very base stay as they are. Equal neighbours merge.

    Raises:
        ValueError: unknown name or key, or stages that are no schedule.
    """
    preset = isinstance(curriculum, str)
    if isinstance(curriculum, dict):
        curriculum = _from_mapping(curriculum)
    elif curriculum == "none":
        curriculum = Curriculum("none", "epochs", ((1.0, base_size),), base_size, magnitude="constant")
    elif isinstance(curriculum, str):
        if curriculum in _COMPUTED:
            curriculum = _COMPUTED[curriculum](base_size, size_multiple)
        elif curriculum in _FIXED:
            curriculum = _FIXED[curriculum]
        else:
            raise ValueError(f"curriculum {curriculum!r} is unknown; choose one of {', '.join(PRESETS)} or a YAML file")
    scale = base_size / curriculum.base_size
    merged: list[Segment] = []
    for stage in curriculum.stages:
        size = stage.input_size
        if size == curriculum.base_size:
            size = base_size
        elif preset or scale != 1:
            size = round_to(size * scale, size_multiple)
        radius = None if stage.radius is None else stage.radius * scale
        stage = Segment(stage.until, size, radius, stage.mixing)
        if merged and merged[-1][1:] == stage[1:]:
            merged.pop()
        merged.append(stage)
    return replace(curriculum, stages=tuple(merged), base_size=base_size)


def _from_mapping(mapping: dict) -> Curriculum:
    """The form of a curriculum file: the keys of :class:`Curriculum`, stages a list of :class:`Segment`'s keys."""
    known = set(Curriculum.__dataclass_fields__)
    unknown = sorted(set(mapping) - known)
    if unknown:
        raise ValueError(f"curriculum file: unknown key {unknown[0]!r}; it may hold {', '.join(sorted(known))}")
    if missing := {"clock", "stages"} - set(mapping):
        raise ValueError(f"curriculum file: {' and '.join(sorted(missing))} missing")
    try:
        stages = tuple(_segment(**stage) for stage in mapping["stages"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            "curriculum file: stages must be a list of {until: SHARE, input_size: PIXELS}, each with radius: CYCLES "
            "and mixing: SHARE if wanted"
        ) from error
    rest = {key: value for key, value in mapping.items() if key != "stages"}
    if "magnitude_steps" in rest:
        try:
            rest["magnitude_steps"] = tuple(float(m) for m in rest["magnitude_steps"])
        except (TypeError, ValueError):
            raise ValueError(f"curriculum file: magnitude_steps is {rest['magnitude_steps']!r}, not a list") from None
    return Curriculum(**{"name": "custom", **rest, "stages": stages})


def _segment(until: float, input_size: int, radius: float | None = None, mixing: float = 1.0) -> Segment:
    return Segment(float(until), int(input_size), None if radius is None else float(radius), float(mixing))
