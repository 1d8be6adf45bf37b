"""What all searches share: a run to vary, its seeds and tolerance, and what a variation costs and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from config import Config, plain
from curriculum import Curriculum, Plan
from curriculum.presets import round_to
from datasets import build_source
from studies.trials import Laboratory, Trial
from training.build import make_model, make_plan, number_of_classes

SIZES = (64, 96, 128, 160, 192, 224)  # of the release's scripts, at base size 224


@dataclass
class Study:
    """A run of main.py that a search varies.

    Attributes:
        config: its settings.
        seeds: repetitions of every trial, from ``config.seed`` on.
        tolerance: differences of accuracy up to this, in per cent, count as none.
        laboratory: set by the script once the cost is known.
    """

    config: Config
    seeds: int = 1
    tolerance: float = 0.0
    laboratory: Laboratory | None = None
    num_images: int = field(init=False)
    classes: int = field(init=False)
    size_multiple: int = field(init=False)

    def __post_init__(self) -> None:
        source = build_source(self.config, train=True)
        self.num_images, self.classes = len(source), number_of_classes(self.config, source)
        self.size_multiple = make_model(self.config, self.classes, self.config.input_size).size_multiple

    def plan(self, config: Config) -> Plan:
        """Raises ValueError for sizes that the model cannot take and for stages too short for a step."""
        return make_plan(config, self.num_images, self.classes)

    def trial(self, config: Config, label: str) -> Trial:
        """A run of the whole plan."""
        plan = self.plan(config)
        return Trial(config, label, plan.equivalent_epochs(plan.total_steps))

    def seeded(self, config: Config) -> list[Config]:
        return [replace(config, seed=config.seed + number) for number in range(self.seeds)]

    def compare(self, configs: dict[str, Config]) -> dict[str, list[float]]:
        """Runs each of the named configurations with every seed; accuracies in per cent."""
        trials = {
            name: [self.trial(one, f"{name}, seed {one.seed}") for one in self.seeded(config)]
            for name, config in configs.items()
        }
        self.laboratory.run([[trial] for group in trials.values() for trial in group])
        return {name: [self.laboratory.accuracy(trial) for trial in group] for name, group in trials.items()}

    def sizes(self, wanted: Sequence[int] | None) -> list[int]:
        """Candidate input sizes, rising: those given, else the release's in proportion to the base size."""
        base = self.config.input_size
        if wanted:
            if bad := [size for size in wanted if not 0 < size <= base]:
                raise ValueError(f"--sizes {bad[0]}: candidates lie between 1 and the base size, {base}")
            return sorted({*wanted, base})
        return sorted({min(round_to(size * base / 224, self.size_multiple), base) for size in SIZES} | {base})

    def curriculum(self) -> dict[str, Any]:
        """The configuration's own curriculum, as a mapping."""
        return as_mapping(self.plan(self.config).curriculum)


def as_mapping(curriculum: Curriculum) -> dict[str, Any]:
    """A curriculum as a YAML file holds it."""
    mapping = plain(curriculum)
    mapping["stages"] = [
        {key: value for key, value in stage._asdict().items() if value != stage._field_defaults.get(key, ())}
        for stage in curriculum.stages
    ]
    return mapping


def schedule(name: str, clock: str, base: int, operator: str, untils: Sequence[float], sizes: Sequence[int]) -> dict:
    """A curriculum file's mapping of input sizes; equal neighbours are one stage."""
    stages = [{"until": until, "input_size": size} for until, size in zip(untils, sizes)]
    kept = [one for one, after in pairwise([*stages, {"input_size": None}]) if one["input_size"] != after["input_size"]]
    return {"name": name, "clock": clock, "base_size": base, "operator": operator, "stages": kept}


def tuned(config: Config, lr: float, batch_size: int) -> Config:
    """A configuration with these; groups that are larger than the batch become as large as that."""
    micro = config.micro_batch if isinstance(config.micro_batch, int) else None
    groups = config.micro_batch if micro is None else min(micro, batch_size)
    return replace(config, lr=lr, batch_size=batch_size, micro_batch=groups)
