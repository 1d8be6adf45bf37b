"""The searches. Each says what it may cost, what it found, and what the trials that led there scored."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from statistics import mean

from config import Config
from curriculum import Plan
from studies.study import Study, schedule, tuned
from studies.trials import Trial
from training.logs import spread


@dataclass
class Found:
    """What a search ends with: configurations by the name of the recipe that holds them, and the evidence."""

    recipes: dict[str, Config]
    evidence: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.evidence.append(line)


@dataclass(frozen=True)
class Greedy:
    """ICCV Algorithm 1: B of the stages 1 ... i is minimised for i = N - 1 ... 1, the later ones kept, as long as the
    accuracy is the ordinary training's. Every trial trains from scratch; sizes are tried from the present one down.

    Attributes:
        stages: N, of equal numbers of epochs.
        sizes: candidates, rising, the last one the base size.
        baseline: accuracy to keep, per cent; None: the same run at the base size is trained for it.
    """

    study: Study
    stages: int
    sizes: Sequence[int]
    baseline: float | None = None

    def bound(self) -> tuple[int, float]:
        """At most so many trials and so much compute (full-size epochs): each search for a B ends with one failure."""
        runs = (self.stages - 1) + (len(self.sizes) - 1) + (self.baseline is None)
        return runs * self.study.seeds, runs * self.study.seeds * self.study.config.epochs

    def config(self, sizes: Sequence[int]) -> Config:
        config = self.study.config
        untils = [(number + 1) / self.stages for number in range(self.stages)]
        operator = config.operator or "fourier"
        mapping = schedule("searched-greedy", "epochs", config.input_size, operator, untils, sizes)
        return replace(config, curriculum=mapping)

    def search(self) -> Found:
        study, base = self.study, self.study.config.input_size
        sizes, found = [base] * self.stages, Found({})
        wanted = self.baseline
        if wanted is None:
            scores = study.compare({"base size": self.config(sizes)})["base size"]
            wanted = mean(scores)
            found.say(f"{_text(sizes)}: {spread(scores)} % (the baseline)")
        for last in range(self.stages - 1, 0, -1):
            for size in reversed([size for size in self.sizes if size < sizes[last - 1]]):
                tried = [size] * last + sizes[last:]
                scores = study.compare({_text(tried): self.config(tried)})[_text(tried)]
                kept = mean(scores) >= wanted - study.tolerance
                found.say(f"{_text(tried)}: {spread(scores)} %{'' if kept else ' (too low)'}")
                if not kept:
                    break
                sizes = tried
        found.recipes["greedy"] = self.config(sizes)
        return found


@dataclass(frozen=True)
class Constrained:
    """EfficientTrain++'s computational-constrained sequential search: total compute is fixed, stages are solved first
    to last. Each candidate B continues from the checkpoint of the stages before, trains its stage as the whole run
    would, is then tuned briefly at the base size, and the one that scores best there stays. Sizes only grow.

    The published description ends there; the rest are settings.

    Attributes:
        shares: of the compute, one for each stage.
        sizes: candidates, rising, the last one the base size.
        full_share: of the compute, at the end, that is the base size's without a search.
        tune_epochs: full-size epochs of the brief tuning.
        tune_lr: its peak learning rate, as a factor on the run's at that moment.
        confirm: seeds with which the result and the ordinary schedule are trained at the end, at equal compute.
    """

    study: Study
    shares: Sequence[float]
    sizes: Sequence[int]
    full_share: float = 0.3
    tune_epochs: float = 1.0
    tune_lr: float = 1.0
    confirm: int = 0

    def searched(self) -> int:
        """Stages whose B is searched for: the later ones are full-size."""
        return sum(start + share <= 1 - self.full_share + 1e-9 for start, share in zip(self._starts(), self.shares))

    def _starts(self) -> list[float]:
        return [0.0, *accumulate(self.shares)][:-1]

    def bound(self) -> tuple[int, float]:
        """At most so many trials and so much compute: every candidate in every stage, tuned."""
        epochs, count = self.study.config.epochs, self.searched()
        chains = count * len(self.sizes) * self.study.seeds
        stages = sum(self.shares[:count]) * epochs * len(self.sizes) * self.study.seeds
        return 2 * chains + 2 * self.confirm, stages + chains * self.tune_epochs + 2 * self.confirm * epochs

    def config(self, sizes: Sequence[int]) -> Config:
        """The run with these sizes in its first stages and the base size after them."""
        config, ends = self.study.config, [round(end, 9) for end in accumulate(self.shares)][:-1]
        untils, base = [*ends[: len(sizes)], 1.0], config.input_size
        operator = config.operator or "lanczos"
        mapping = schedule("searched-constrained", "compute", base, operator, untils, [*sizes, base])
        return replace(config, curriculum=mapping)

    def _end(self, plan: Plan, sizes: Sequence[int]) -> int:
        """The optimizer step at which the stages with these sizes end, the same whatever follows."""
        if len(sizes) == len(self.shares):
            return plan.total_steps
        if sizes[-1] != plan.base_size:
            return plan.stages[-1].first_step
        return plan.first_after(f"{100 * sum(self.shares[: len(sizes)])}%")

    def chain(self, sizes: Sequence[int], before: Trial | None, seed: int) -> list[Trial]:
        """The last of these stages, continuing the trial of those before, and its tuning."""
        study, laboratory = self.study, self.study.laboratory
        config = replace(self.config(sizes), seed=seed, eval_interval="100%", keep_checkpoints=0)
        plan = study.plan(config)
        begin = 0 if before is None else int(before.config.stop_after.split()[0])
        end = self._end(plan, sizes)
        compute = plan.equivalent_epochs(end) - plan.equivalent_epochs(begin)
        grown = replace(
            config,
            stop_after=f"{end} steps",
            resume=None if before is None else laboratory.checkpoint(before),
            allow_change="curriculum",
        )
        name = f"{_text(sizes)}, seed {seed}"
        stage = Trial(grown, f"{name}, stage {len(sizes)}", compute)
        epoch, _ = plan.locate(end - 1)
        tuning = replace(
            config,
            curriculum="none",
            epochs=self.tune_epochs,
            warmup_epochs="10%",
            lr=self.tune_lr * plan.lr_at(end - 1),
            min_lr=min(config.min_lr, self.tune_lr * plan.lr_at(end - 1)),
            magnitude="none" if epoch.magnitude is None else "constant",
            max_magnitude=config.max_magnitude if epoch.magnitude is None else epoch.magnitude,
            early_large_batch=False,
            replay=None,
            finetune=laboratory.checkpoint(stage),
        )
        return [stage, study.trial(tuning, f"{name}, tuned")]

    def search(self) -> Found:
        study, base = self.study, self.study.config.input_size
        found, sizes, before = Found({}), [], [None] * study.seeds
        for number in range(self.searched()):
            candidates = [size for size in self.sizes if not sizes or size >= sizes[-1]]
            if candidates == [base]:
                break
            seeds = [study.config.seed + repetition for repetition in range(study.seeds)]
            chains = {
                size: [self.chain([*sizes, size], trial, seed) for trial, seed in zip(before, seeds)]
                for size in candidates
            }
            study.laboratory.run([chain for group in chains.values() for chain in group])
            scores = {size: [study.laboratory.accuracy(chain[-1]) for chain in group] for size, group in chains.items()}
            best = max(mean(values) for values in scores.values())
            # The smallest of those that are as good: it leaves the later stages the most to choose from.
            chosen = next(size for size in candidates if mean(scores[size]) >= best - study.tolerance)
            sizes, before = [*sizes, chosen], [chain[0] for chain in chains[chosen]]
            start = self._starts()[number]
            found.say(
                f"stage {number + 1}, {100 * start:.0f}-{100 * (start + self.shares[number]):.0f} % of compute, after "
                f"{_text(sizes[:-1]) or 'nothing'}: "
                + "; ".join(f"{size}: {spread(values)} %" for size, values in scores.items())
                + f" -> {chosen}"
            )
        found.recipes["constrained"] = self.config(sizes)
        if self.confirm:
            ordinary = replace(study.config, curriculum="none", magnitude=study.config.magnitude or "linear")
            arms = {"searched": found.recipes["constrained"], "ordinary": ordinary}
            confirmed = copy.copy(study)
            confirmed.seeds = self.confirm
            for name, scores in confirmed.compare(arms).items():
                found.say(f"{name}, {study.config.epochs:g} full-size epochs of compute: {spread(scores)} %")
        return found


@dataclass(frozen=True)
class Magnitudes:
    """Which RandAugment schedule goes with the run's curriculum: each candidate is trained.

    Attributes:
        candidates: ``linear:9`` (0 to 9), ``constant:9``, ``none``, ``steps:3,9`` (equal shares of the clock).
    """

    study: Study
    candidates: Sequence[str]

    def bound(self) -> tuple[int, float]:
        runs = [self.study.trial(config, name) for name, config in self.configs().items()]
        return len(runs) * self.study.seeds, sum(trial.compute for trial in runs) * self.study.seeds

    def configs(self) -> dict[str, Config]:
        """Raises ValueError for a candidate that is none of the forms."""
        mapping, configs = self.study.curriculum(), {}
        for text in self.candidates:
            match = re.fullmatch(r"(none)|(linear|constant):([\d.]+)|(steps):([\d.]+(?:,[\d.]+)+)", text)
            if match is None:
                raise ValueError(f"--magnitudes {text}: write linear:9, constant:9, steps:3,9 or none")
            none, level, value, steps, values = match.groups()
            changes = {"max_magnitude": float(value)} if level else {}
            if steps:
                numbers = [float(number) for number in values.split(",")]
                changes = {"curriculum": {**mapping, "magnitude": "steps", "magnitude_steps": numbers}}
            configs[text] = replace(self.study.config, magnitude=none or level or steps, **changes)
        return configs

    def search(self) -> Found:
        configs, found = self.configs(), Found({})
        scores = self.study.compare(configs)
        for name, values in scores.items():
            found.say(f"{name}: {spread(values)} %")
        best = max(map(mean, scores.values()))
        chosen = next(name for name, values in scores.items() if mean(values) >= best - self.study.tolerance)
        found.say(f"chosen: {chosen}")
        found.recipes["magnitude"] = configs[chosen]
        return found


@dataclass(frozen=True)
class Tuning:
    """Learning rate and batch size of both arms, the ordinary schedule and the run's curriculum, on the same grid and
    at the same compute: what one side gains by the curriculum must not be what the other lost for want of tuning.
    """

    study: Study
    lrs: Sequence[float]
    batch_sizes: Sequence[int]

    def arms(self) -> dict[str, Config]:
        config = self.study.config
        ordinary = replace(config, curriculum="none", magnitude=config.magnitude or "linear")
        return {"ordinary": ordinary, "curriculum": config}

    def configs(self, arm: Config) -> dict[tuple[float, int], Config]:
        return {(lr, batch): tuned(arm, lr, batch) for batch, lr in product(self.batch_sizes, self.lrs)}

    def bound(self) -> tuple[int, float]:
        runs = [self.study.trial(c, "") for arm in self.arms().values() for c in self.configs(arm).values()]
        return len(runs) * self.study.seeds, sum(trial.compute for trial in runs) * self.study.seeds

    def search(self) -> Found:
        found, best = Found({}), {}
        for name, arm in self.arms().items():
            configs = {f"{name}, lr {lr:g}, batch {batch}": (lr, batch) for lr, batch in self.configs(arm)}
            runs = self.configs(arm)
            scores = self.study.compare({label: runs[place] for label, place in configs.items()})
            for label, values in scores.items():
                found.say(f"{label}: {spread(values)} %")
            label = max(scores, key=lambda one: mean(scores[one]))
            (lr, batch), best[name] = configs[label], scores[label]
            found.recipes[f"tune-{name}"] = runs[lr, batch]
            for setting, value, tried in (("--lrs", lr, self.lrs), ("--batch_sizes", batch, self.batch_sizes)):
                if len(tried) > 1 and value in (min(tried), max(tried)):
                    found.say(f"note: {name} is best at the edge of {setting} ({value:g}); try values beyond it")
        ordinary, curriculum = spread(best["ordinary"]), spread(best["curriculum"])
        found.say(f"best ordinary {ordinary} %, best with the curriculum {curriculum} %")
        return found


def _text(sizes: Sequence[int]) -> str:
    return " ".join(map(str, sizes))
