"""What a recipe saves: it and the recipes it is compared with, each tuned on the same grid at every budget."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import mean
from typing import NamedTuple

from commands.plan import make_summary
from config import Config, as_usage
from curriculum import Plan
from studies.study import Study, tuned
from studies.trials import Trial
from training.build import make_sampler

RULE = (
    "The same rule for every arm. Smallest budget: the whole grid with one seed. Larger ones: the settings up to one "
    "grid step from the best of the budget before, and around each new best. The best third of them (two at least) "
    "get a second seed, and the best mean of the two is chosen. Results are of further seeds alone, for the seeds that "
    "chose were lucky. Settings that diverge with one of these make way for the second best, once."
)
# What must be the same in all arms, or their accuracies do not compare.
JUDGED = (
    "task",
    "data_set",
    "data_path",
    "val_split",
    "val_per_class",
    "val_share",
    "labels",
    "class_map",
    "num_classes",
)
CHOOSING = 2  # seeds that choose
TRAINING = 6  # FLOPs of training for each multiply-add of a forward pass: two each, and the backward pass costs twice


class Place(NamedTuple):
    """A point of the grid."""

    lr: float
    batch: int


class Cost(NamedTuple):
    """Of a trial: the setting ``epochs``, full-size epochs of compute by pixels, FLOPs of training."""

    setting: float
    epochs: float
    flops: float


class Row(NamedTuple):
    """A trial and what it is for: ``grid``, ``choice`` (a second seed) or ``result``."""

    arm: str
    budget: float
    place: Place
    role: str
    trial: Trial


@dataclass
class Point:
    """What an arm does at a budget.

    Attributes:
        best: the settings chosen.
        rows: all trials.
        results: those that count; none where all that was chosen diverged.
        notes: what to know about it.
    """

    budget: float
    best: Place | None = None
    rows: list[Row] = field(default_factory=list)
    results: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Parity:
    """Tunes every arm at every budget, by ``RULE``.

    Attributes:
        arms: by name; the first is the one that is to save.
        budgets: full-size epochs of compute, rising.
        lrs, batches: the grid, rising.
        seeds: of the results, after the two that choose.

    Raises:
        ValueError: one of these is out of range, a plan cannot be made, or the arms are judged on different images.
    """

    arms: dict[str, Study]
    budgets: Sequence[float]
    lrs: Sequence[float]
    batches: Sequence[int]
    seeds: int

    def __post_init__(self) -> None:
        for name, values, least in (("budgets", self.budgets, 2), ("lrs", self.lrs, 1), ("batches", self.batches, 1)):
            if bad := [value for value in values if not 0 < value < math.inf]:
                raise ValueError(f"--{name} has {bad[0]:g}; they are positive numbers")
            if sorted(set(values)) != list(values) or len(values) < least:
                given = ",".join(f"{value:g}" for value in values)
                raise ValueError(f"--{name} is {given}; write {least} or more numbers that rise")
        (first, ours), *others = self.arms.items()
        for (name, other), setting in product(others, JUDGED):
            values = [getattr(study.config, setting) for study in (ours, other)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{first} has {setting} {values[0]}, {name} has {values[1]}: give all arms the same validation "
                    f"images, e.g. by a flag --{setting}"
                )
        self.grid = [Place(lr, batch) for batch, lr in product(self.batches, self.lrs)]
        self.costs: dict[tuple[str, float, int], Cost] = {}
        for arm, study in self.arms.items():
            flops: list[float] = []  # of an image's forward pass, by stage
            for budget, batch in product(self.budgets, self.batches):
                config, plan = self._planned(arm, budget, batch)
                flops = flops or [stage["flops"] for stage in make_summary(config, plan, study.classes, None)["stages"]]
                work = sum(stage.steps * stage.batch_size * one for stage, one in zip(plan.stages, flops))
                epochs = plan.equivalent_epochs(plan.total_steps)
                self.costs[arm, budget, batch] = Cost(config.epochs, epochs, TRAINING * work)

    def _planned(self, arm: str, budget: float, batch: int) -> tuple[Config, Plan]:
        """A run of the budget. Raises ValueError if it cannot be planned."""
        study = self.arms[arm]
        try:
            config = replace(tuned(study.config, self.lrs[-1], batch), epochs=budget)
            plan = study.plan(config)
            if plan.curriculum.clock == "epochs":  # whose small sizes cost less than they count
                share = sum((one.stop - one.start) * (one.input_size / plan.base_size) ** 2 for one in plan.stages)
                config = replace(config, epochs=budget / share)
                plan = study.plan(config)
            if config.micro_batch != "auto":
                with as_usage():
                    make_sampler(config, plan, world_size=1)
        except ValueError as error:
            raise ValueError(f"{arm} at budget {budget:g}, batch size {batch}: {error}") from None
        return config, plan

    # ---- what it costs ---------------------------------------------------------------------------------------------
    def bound(self) -> tuple[int, float]:
        """At most so many trials and so much compute: every search meets the whole grid, every choice diverges."""
        each = [self._most(arm, budget) for arm, budget in product(self.arms, self.budgets)]
        return sum(trials for trials, _ in each), sum(compute for _, compute in each)

    def _most(self, arm: str, budget: float) -> tuple[int, float]:
        trials = len(self.grid) + _kept(len(self.grid)) + 2 * self.seeds if len(self.grid) > 1 else self.seeds
        return trials, trials * max(self.costs[arm, budget, batch].epochs for batch in self.batches)

    def likely(self) -> float:
        """Compute where no search leaves the neighbours of the budget before, and nothing diverges."""
        total, near = 0.0, min(3, len(self.lrs)) * min(3, len(self.batches))
        for number, budget in enumerate(self.budgets):
            tried = near if number else len(self.grid)
            total += len(self.arms) * budget * (self.seeds + (tried + _kept(tried) if len(self.grid) > 1 else 0))
        return total

    # ---- the search ------------------------------------------------------------------------------------------------
    def search(self) -> dict[str, list[Point]]:
        """Runs the trials, of all arms side by side; for each arm its points by budget."""
        laboratory = next(iter(self.arms.values())).laboratory
        print(f"about {self.likely():.4g} full-size epochs if the best settings change little with the budget")
        print(RULE, flush=True)
        points: dict[str, list[Point]] = {arm: [] for arm in self.arms}
        working = {arm: self._tune(arm, points[arm]) for arm in self.arms}
        while working:
            wanted: dict[str, Trial] = {}  # arms may share trials
            for arm, steps in [*working.items()]:
                if rows := next(steps, None):
                    wanted.update({row.trial.key: row.trial for row in rows})
                else:
                    del working[arm]
            laboratory.most = self._most_now(points)
            laboratory.run([[trial] for trial in wanted.values()])
        return points

    def _most_now(self, points: dict[str, list[Point]]) -> float:
        """The most compute of the whole, now that some budgets are done."""
        done = {row.trial.key: row.trial.compute for of in points.values() for point in of for row in point.rows}
        left = sum(self._most(arm, budget)[1] for arm, of in points.items() for budget in self.budgets[len(of) :])
        return sum(done.values()) + left

    def _tune(self, arm: str, points: list[Point]) -> Generator[list[Row], None, None]:
        """Yields the trials that an arm needs next, and adds its points as they are known."""
        start = None
        for budget in self.budgets:
            point = yield from self._point(arm, budget, start)
            points.append(point)
            start = point.best
            scores = [self.accuracy(row) for row in point.results]
            told = f"{mean(scores):.2f} %" if scores else "no result"
            notes = "".join(f"; {note}" for note in point.notes)
            print(f"{arm}, budget {budget:g}: {told} with {_text(start)}{notes}", flush=True)

    def _point(self, arm: str, budget: float, start: Place | None) -> Generator[list[Row], None, Point]:
        point, ranked = Point(budget), self.grid

        def rows(places: Sequence[Place], seeds: Sequence[int], role: str) -> list[Row]:
            new = [
                Row(arm, budget, place, role, self.trial(arm, budget, place, seed))
                for place, seed in product(places, seeds)
            ]
            point.rows += new
            return new

        if len(self.grid) > 1:
            window, tried = self.grid if start is None else self._around(start), []
            while new := [place for place in window if place not in tried]:
                yield rows(new, [0], "grid")
                tried += new
                window = self._around(self._ranked(point, tried)[0])
            kept = self._ranked(point, tried)[: _kept(len(tried))]
            yield rows(kept, range(1, CHOOSING), "choice")
            ranked = self._ranked(point, kept)[:2]
        for place in ranked:
            results = rows([place], range(CHOOSING, CHOOSING + self.seeds), "result")
            yield results
            if all(map(self.ended, results)):
                point.best, point.results = place, results
                break
            point.notes.append(f"{_text(place)} diverged")
        point.best = point.best or ranked[0]
        point.notes += self._edges(point.best)
        return point

    def trial(self, arm: str, budget: float, place: Place, seed: int) -> Trial:
        study, cost = self.arms[arm], self.costs[arm, budget, place.batch]
        config = replace(
            tuned(study.config, *place),
            epochs=cost.setting,
            seed=study.config.seed + seed,
            eval_interval="100%",
            keep_checkpoints=0,
        )
        label = f"{arm}, budget {budget:g}, {_text(place)}, seed {config.seed}"
        return Trial(config, label, cost.epochs, keep_weights=False)

    def accuracy(self, row: Row) -> float:
        return self.arms[row.arm].laboratory.accuracy(row.trial)

    def ended(self, row: Row) -> bool:
        """Whether a trial trained to its end; one that diverged has accuracy 0, and no time."""
        return self.accuracy(row) > 0 or self.arms[row.arm].laboratory.training_seconds(row.trial) is not None

    def _ranked(self, point: Point, places: Sequence[Place]) -> list[Place]:
        """Best first, by the mean over the seeds so far."""
        scores = {place: mean(self.accuracy(row) for row in point.rows if row.place == place) for place in places}
        return sorted(places, key=lambda place: -scores[place])

    def _around(self, place: Place) -> list[Place]:
        row, column = self.lrs.index(place.lr), self.batches.index(place.batch)
        return [
            Place(lr, batch)
            for batch in self.batches[max(column - 1, 0) : column + 2]
            for lr in self.lrs[max(row - 1, 0) : row + 2]
        ]

    def _edges(self, place: Place) -> list[str]:
        """Where the best may lie beyond what was tried."""
        notes = []
        for flag, value, tried in (("--lrs", place.lr, self.lrs), ("--batches", place.batch, self.batches)):
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                notes.append(f"not tuned: {value:g} is the edge of {flag}, try values beyond it")
        return notes


def _kept(tried: int) -> int:
    return min(tried, max(2, math.ceil(tried / 3)))


def _text(place: Place) -> str:
    return f"lr {place.lr:g}, batch {place.batch}"
