"""What a parity study found: tables, figures and files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator

from studies.factors import Curve, Factor, factor, target
from studies.figures import panels, save, write_csv
from studies.parity import RULE, Parity, Point, Row
from utils import write_text

MEASURES = {"compute": "compute", "time": "training time"}


@dataclass
class ParityReport:
    """Curves and factors of a finished study.

    Attributes:
        points: of each arm, by budget; the first arm is the one that is to save.
        at: the budget of the others whose accuracy is to be reached; None: their largest.
        parallel: trials that ran at a time.
    """

    parity: Parity
    points: dict[str, list[Point]]
    at: float | None
    parallel: int

    @cached_property
    def known(self) -> dict[str, list[Point]]:
        """The points with results."""
        return {arm: [point for point in points if point.results] for arm, points in self.points.items()}

    def flops(self, row: Row) -> float:
        return self.parity.costs[row.arm, row.budget, row.place.batch].flops

    def seconds(self, row: Row) -> float | None:
        return self.parity.arms[row.arm].laboratory.training_seconds(row.trial)

    def curve(self, arm: str, measure: str) -> Curve | None:
        """Accuracy against ``compute`` or ``time``; None if there are no points, or no times."""
        cost = self.flops if measure == "compute" else self.seconds
        rows = [point.results for point in self.known[arm]]
        costs = [[cost(row) for row in group] for group in rows]
        if not rows or not all(value for group in costs for value in group):
            return None
        return Curve(np.array(costs, float), np.array([[self.parity.accuracy(row) for row in group] for group in rows]))

    def factors(self, other: str, place: int) -> dict[str, Factor | None]:
        """How much less the first arm needs for what the other has at its point ``place``."""
        found = {}
        for measure in MEASURES:
            mine, theirs = (self.curve(arm, measure) for arm in (next(iter(self.points)), other))
            found[measure] = factor(mine, theirs, place) if mine and theirs else None
        return found

    def target(self, other: str) -> tuple[int, bool] | None:
        """The point of the other arm that is to be reached, and whether it stands for a larger, saturated one."""
        known = self.known[other]
        within = [number for number, point in enumerate(known) if self.at is None or point.budget <= self.at]
        if not within or not self.known[next(iter(self.points))]:
            return None
        place = target(self.curve(other, "compute"), within[-1])
        return place, place != within[-1]

    # ---- tables ----------------------------------------------------------------------------------------------------
    def points_table(self) -> list[str]:
        lines = [
            "| arm | budget | lr | batch | top-1, % | full-size epochs | PFLOPs | training, s | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm, points in self.points.items():
            for point in points:
                row = self.summary(arm, point)
                half = "" if row["half_width"] is None else f" +- {row['half_width']:.2f}"
                accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2f}{half}"
                seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
                lines.append(
                    f"| {arm} | {point.budget:g} | {row['lr']:g} | {row['batch_size']} | {accuracy} "
                    f"| {row['epochs']:.2f} | {row['flops'] / 1e15:.4g} | {seconds} | {'; '.join(point.notes)} |"
                )
        return lines

    def summary(self, arm: str, point: Point) -> dict[str, Any]:
        """A point as plain types; accuracy and seconds are None where it has no result."""
        cost = self.parity.costs[arm, point.budget, point.best.batch]
        found: dict[str, Any] = {"budget": point.budget, "lr": point.best.lr, "batch_size": point.best.batch}
        found.update(epochs=cost.epochs, flops=cost.flops, notes=point.notes)
        scores = [self.parity.accuracy(row) for row in point.results]
        curve, times = self.curve(arm, "compute"), self.curve(arm, "time")
        place = self.known[arm].index(point) if scores else None
        found["accuracies"] = scores
        found["accuracy"] = None if place is None else float(curve.accuracy[place])
        found["half_width"] = None if place is None else curve.half_width
        found["seconds"] = None if place is None or times is None else float(times.cost[place])
        return found

    def comparison(self, other: str) -> list[str]:
        """The factors against one arm: the one that counts, and one for each of its budgets."""
        mine, found = next(iter(self.points)), self.target(other)
        lines = [f"## {mine} against {other}", ""]
        if found is None:
            return [*lines, "One of them has no result."]
        place, saturated = found
        point = self.known[other][place]
        top = f"{self.curve(other, 'compute').accuracy[place]:.2f} %"
        if saturated:
            lines += [
                f"{other} is saturated: its budgets above {point.budget:g} gain nothing that {self.parity.seeds} "
                "seeds can tell, so that one counts.",
                "",
            ]
        told = [self.told(measure, one) for measure, one in self.factors(other, place).items()]
        lines += [f"**For the {top} of {other} at budget {point.budget:g}, {mine} takes {' and '.join(told)}.**", ""]
        lines += [f"| budget of {other} | its top-1, % | less compute | less training time |", "|---|---|---|---|"]
        for number, point in enumerate(self.known[other]):
            cells = [one.text() if one else "not known" for one in self.factors(other, number).values()]
            lines.append(
                f"| {point.budget:g} | {self.curve(other, 'compute').accuracy[number]:.2f} | {' | '.join(cells)} |"
            )
        return lines

    @staticmethod
    def told(measure: str, one: Factor | None) -> str:
        """A factor in words."""
        what = MEASURES[measure]
        if one is None:
            return f"a {what} that is not known"
        why = "" if one.state == "measured" else f" ({one.state})"
        return f"{one.text()} x less {what}{why}"

    def text(self, command: str) -> str:
        """The whole of it, as Markdown."""
        others = [*self.points][1:]
        lines = ["# Parity", "", f"`{command}`", ""]
        for other in others:
            lines += [*self.comparison(other), ""]
        interval = (
            "Intervals are of 95 %: of an accuracy, t over the seeds, their variance pooled over the arm's budgets; of "
            "a factor, a bootstrap over the seeds of both arms. > and < stand where the budgets of the first arm end."
            if self.parity.seeds > 1
            else "One seed: there are no intervals; --seeds 3 gives some."
        )
        lines += ["## Points", "", *self.points_table(), "", interval, ""]
        lines += [RULE, ""]
        tried = {"--lrs": self.parity.lrs, "--batches": self.parity.batches}
        alone = [flag for flag, values in tried.items() if len(values) == 1]
        if alone:
            lines += [f"{' and '.join(alone)} had one value: that was not tuned, in any arm.", ""]
        if self.parallel > 1:
            lines += [f"Trials ran {self.parallel} at a time: their times hold for that.", ""]
        return "\n".join(lines)

    # ---- files -----------------------------------------------------------------------------------------------------
    def json(self, command: str) -> dict[str, Any]:
        arms = {arm: [self.summary(arm, point) for point in points] for arm, points in self.points.items()}
        factors = []
        for other in [*self.points][1:]:
            if (found := self.target(other)) is None:
                continue
            known = self.known[other]
            rows = [
                {
                    "budget": point.budget,
                    **{measure: plain_factor(one) for measure, one in self.factors(other, n).items()},
                }
                for n, point in enumerate(known)
            ]
            place, saturated = found
            accuracy = float(self.curve(other, "compute").accuracy[place])
            about = {"against": other, "accuracy": accuracy, "saturated": saturated}
            factors.append({**about, **rows[place], "by_budget": rows})
        return {"command": command, "rule": RULE, "parallel": self.parallel, "arms": arms, "factors": factors}

    def csv_rows(self) -> list[dict[str, Any]]:
        """A row for every trial."""
        return [
            {
                "arm": arm,
                "budget": row.budget,
                "lr": row.place.lr,
                "batch_size": row.place.batch,
                "seed": row.trial.config.seed,
                "for": row.role,
                "chosen": int(row.place == point.best),
                "accuracy": self.parity.accuracy(row),
                "epochs": row.trial.compute,
                "flops": self.flops(row),
                "seconds": "" if (seconds := self.seconds(row)) is None else seconds,
                "key": row.trial.key,
            }
            for arm, points in self.points.items()
            for point in points
            for row in point.rows
        ]

    def draw(self, folder: Path) -> None:
        """parity.png: accuracy against compute and against time, with the intervals, and the factors."""
        figure, axes = panels(2, 5.2, 3.8)
        for axis, measure in zip(axes, MEASURES):
            unit = 1e15 if measure == "compute" else 1
            curves = {arm: curve for arm in self.points if (curve := self.curve(arm, measure)) is not None}
            for arm, curve in curves.items():
                order = np.argsort(curve.cost)
                x, y, half = curve.cost[order] / unit, curve.accuracy[order], curve.half_width or 0.0
                (line,) = axis.plot(x, y, "o-", markersize=3.5, label=arm)
                axis.fill_between(x, y - half, y + half, color=line.get_color(), alpha=0.18, linewidth=0)
                axis.plot(curve.costs / unit, curve.accuracies, ".", markersize=3, color=line.get_color(), alpha=0.5)
            for other in [*self.points][1:]:
                found = self.target(other)
                one = self.factors(other, found[0])[measure] if found else None
                if one is not None and one.state == "measured":
                    spent, level = curves[other].cost[found[0]] / unit, curves[other].accuracy[found[0]]
                    axis.plot([spent / one.value, spent], [level, level], "k--", linewidth=0.9)
                    middle = spent / math.sqrt(one.value)
                    axis.annotate(f"{one.value:.2f}x", (middle, level), ha="center", va="bottom", fontsize=8)
            label = "training compute, PFLOPs" if measure == "compute" else "training time, s (with loading)"
            axis.set(xscale="log", xlabel=label, ylabel="validation top-1, %")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
            if curves:
                axis.legend(loc="lower right")
        save(figure, folder, "parity")

    def write(self, folder: Path, command: str) -> None:
        """parity.md, parity.json, parity.csv, parity.png and .svg; the table is printed, too."""
        text = self.text(command)
        write_text(folder / "parity.md", text)
        write_text(folder / "parity.json", json.dumps(self.json(command), indent=1) + "\n")
        print("\n" + text)
        write_csv(self.csv_rows(), folder, "parity")
        self.draw(folder)
        print(f"table: {folder / 'parity.md'}, .json", flush=True)


def plain_factor(one: Factor | None) -> dict[str, Any] | None:
    """For JSON, which has no infinity: such numbers are None, and ``text`` says what they are."""
    if one is None:
        return None
    numbers = {key: value if value and math.isfinite(value) else None for key, value in asdict(one).items()}
    return {**numbers, "state": one.state, "text": one.text()}


def arm_names(paths: Sequence[str]) -> list[str]:
    """Recipes by their file names, with as many folders as tell them apart.

    Raises:
        ValueError: a recipe is named twice.
    """
    resolved = [Path(path).resolve() for path in paths]
    for number, path in enumerate(paths):
        if resolved[number] in resolved[:number]:
            raise ValueError(f"{path} is named twice; name each recipe once")
    parts = [path.with_suffix("").parts for path in resolved]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{', '.join(paths)}: give the recipes names that differ")
