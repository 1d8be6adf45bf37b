"""Collects finished runs into the papers' tables: ours beside theirs, speed-ups, seeds as mean and spread.

  python scripts/results.py OUTPUT_DIR [OUTPUT_DIR ...] [--output FOLDER]

An output folder may be a run's, or hold runs at any depth. Prints Markdown; with --output also writes results.md,
results.csv, and accuracy against compute and against wall time as compute and time (.png, .svg).

Runs that differ in nothing but the seed (and in where and how fast they ran) are one line. Theirs is the row of
recipes/papers.json that the recipe names; "less time" compares with the ordinary runs of the same model, classes, data
and number of devices among those given.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import Config  # noqa: E402
from config.kinds import named  # noqa: E402
from models.run_files import check_records, read_environment, read_log, read_plan, read_settings  # noqa: E402
from studies.figures import panels, save  # noqa: E402
from training.early_stop import read_note  # noqa: E402
from training.logs import spread  # noqa: E402
from utils import duration_text  # noqa: E402

# What says where, how fast or how often a run looks, and not what it learns; and what its repetitions differ in.
OF_DATA = ("data_set", "train_split", "val_split", "val_per_class", "val_share", "label_key", "label_columns")
OF_DATA += ("label_separator", "class_map", "labels")
CIRCUMSTANCES = ({*named(Config, "free")} | {"seed"}) - {*OF_DATA}
# What runs are judged by, in the column top-1 too.
SCORES = {"multilabel": "test_map", "detection": "test_box_AP", "segmentation": "test_mIoU"}
COLUMNS = (
    *("table", "row", "model", "curriculum", "epochs", "runs", "top-1", "theirs", "difference"),
    *("less compute", "theirs ", "less time", "theirs  ", "training time"),
)


@dataclass(frozen=True)
class Run:
    """One finished run: its settings, its plan, and what came out."""

    path: Path
    settings: dict[str, Any]
    plan: dict[str, Any]
    top1: float
    seconds: float
    devices: str

    @property
    def changes(self) -> list[str]:
        """What was changed on the way, step by step."""
        return self.plan.get("changes", [])

    @property
    def ordinary(self) -> bool:
        return len(self.plan["stages"]) == 1 and self.settings["magnitude"] in (None, "constant")

    @property
    def speedup(self) -> float:
        return self.plan["total"]["speedup_flops"] or self.plan["total"]["speedup_pixels"]

    @property
    def recipe(self) -> str:
        """What runs of different seeds share."""
        settings = {key: value for key, value in self.settings.items() if key not in CIRCUMSTANCES}
        for key in ("class_map", "labels"):  # files, wherever they lie
            settings[key] = settings[key] and Path(settings[key]).name
        first = self.plan["stages"][0]
        passes = first.get("passes", 0)
        images = round(first["images"] / passes) if passes > 0 else None  # of the training set
        return json.dumps([settings, self.changes, images])

    @property
    def comparable(self) -> tuple[Any, ...]:
        """What runs must share for their times to be compared."""
        settings = self.settings
        keys = ("model", "model_args", "input_size", "data_set", "data_path")
        return (*(json.dumps(settings[key]) for key in keys), self.devices)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """The finished runs in or under ``folders``; says on standard error which it skipped.

    Raises:
        ValueError: a folder that holds no run.
    """
    runs = []
    for folder in folders:
        configs = sorted(folder.rglob("config.yaml")) if folder.is_dir() else []
        if not configs:
            raise ValueError(f"{folder} holds no run (no config.yaml in or under it)")
        for config in configs:
            run = read_run(config.parent)
            if isinstance(run, str):
                print(f"skipped {config.parent}: {run}", file=sys.stderr)
            else:
                runs.append(run)
    return runs


def read_run(path: Path) -> Run | str:
    """A run, or why it is none that counts."""
    try:
        settings, plan = read_settings(path), read_plan(path)
        records = check_records(read_log(path / "log.txt"), path / "log.txt")
        devices = read_environment(path).get("devices", "unknown")
    except (OSError, ValueError) as error:
        return str(error)
    if note := read_note(path):
        return f"it ended early after step {note['step']}, {note['why']}"
    if not records or records[-1]["progress"] < 1:
        return "not finished"
    done = 0.0  # of the plan's clock; records of earlier versions do not say where their pass began
    for record in records:
        if abs(record.get("start", done) - done) > 1e-6:
            return f"log.txt has no pass that trained {100 * done:.1f} to {100 * record['start']:.1f} % of its plan"
        done = record["progress"]
    last = records[-1]
    key = SCORES.get(settings.get("task"), "test_acc1")
    if last.get(key) is None:
        return "no evaluation at the end"
    # The papers evaluate the average where they keep one.
    top1 = last.get(f"{key}_ema", last[key])
    return Run(path, settings, plan, top1, sum(record["seconds"] for record in records), devices)


def collect(runs: list[Run], papers: dict[str, Any]) -> list[dict[str, str]]:
    """Lines of the tables, as COLUMNS of text: one for each recipe and each row of the papers that it reproduces."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    baselines: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        if run.ordinary:
            baselines.setdefault(run.comparable, []).append(run.seconds)
    lines = []
    for group in groups.values():
        first = group[0]
        scores, times = [run.top1 for run in group], [run.seconds for run in group]
        ratios = [
            statistics.mean(baselines[run.comparable]) / run.seconds for run in group if run.comparable in baselines
        ]
        for row in first.settings["rows"] or [None]:
            want = papers.get(row, {})
            metrics = want.get("metrics", {})
            theirs = want.get("top1", metrics.get("AP", metrics.get("mIoU")))
            if isinstance(theirs, dict):  # pre-training is judged by what fine-tuning makes of it
                theirs = theirs.get(f"r{first.plan['base_size']}") if first.settings["finetune"] else None
            printed = want.get("speedup", {})
            compute = next((printed[key] for key in ("compute", "train", "nominal") if key in printed), None)
            values = (
                want.get("table", "Other runs"),
                row or "",
                first.settings["model"],
                first.plan["curriculum"],
                f"{first.plan['epochs']:g}",
                str(len(group)),
                spread(scores),
                "" if theirs is None else f"{theirs:g}",
                "" if theirs is None else f"{statistics.mean(scores) - theirs:+.2f}",
                f"{first.speedup:.2f}x",
                "" if compute is None else f"{compute:.2f}x",
                "" if not ratios or first.ordinary else f"{spread(ratios)}x",
                "" if "wall" not in printed else f"{printed['wall']:.2f}x",
                duration_text(statistics.mean(times)),
            )
            lines.append(dict(zip(COLUMNS, values)))
    return sorted(lines, key=lambda line: (line["table"] == "Other runs", line["table"], line["model"], line["row"]))


def markdown(lines: list[dict[str, str]]) -> str:
    """One table for each of the papers'."""
    parts, columns = [], COLUMNS[1:]
    for table in dict.fromkeys(line["table"] for line in lines):
        parts += [f"## {table}", "", f"| {' | '.join(column.strip() for column in columns)} |"]
        parts.append("|" + " --- |" * 3 + " ---: |" * (len(columns) - 3))
        parts += [f"| {' | '.join(line[column] for column in columns)} |" for line in lines if line["table"] == table]
        parts.append("")
    return "\n".join(parts)


def changed(runs: list[Run]) -> str:
    """The runs of which settings were changed on the way, and when which; they are lines of their own in the tables."""
    lines = [f"- {run.path}: {line}" for run in runs for line in run.changes]
    return "\n".join(["## Changed on the way", "", *lines, ""]) if lines else ""


def to_csv(lines: list[dict[str, str]]) -> str:
    names = {"theirs": "top-1, theirs", "theirs ": "less compute, theirs", "theirs  ": "less time, theirs"}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names.get(column, column) for column in COLUMNS)
    writer.writerows([line[column] for column in COLUMNS] for line in lines)
    return file.getvalue()


def draw(runs: list[Run], folder: Path) -> None:
    """Accuracy against compute (ICCV Fig. 7, ++ Fig. 7) and against time: a colour for each model and curriculum."""
    axes = {"compute": "compute, epochs at the base size (by pixels)", "time": "hours of training"}
    for name, label in axes.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            x = run.plan["total"]["equivalent_epochs"] if name == "compute" else run.seconds / 3600
            points.setdefault(f"{run.settings['model']} {run.plan['curriculum']}", []).append((x, run.top1))
        figure, (axis,) = panels(1, 7.0, 4.2)
        for series, places in points.items():
            axis.plot(*zip(*sorted(places)), "o", label=series)
        axis.set(xlabel=label, ylabel="top-1, per cent", title=f"Accuracy against {name}")
        axis.legend()
        save(figure, folder, name)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--output", type=Path, help="folder for results.md, results.csv and the pictures")
    arguments = parser.parse_args(argv)
    try:
        runs = find_runs(arguments.runs)
        if not runs:
            raise ValueError("no run is finished")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = collect(runs, json.loads((ROOT / "recipes" / "papers.json").read_text(encoding="utf-8")))
    text = markdown(lines) + changed(runs)
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name, content in {"results.md": text, "results.csv": to_csv(lines)}.items():
            (arguments.output / name).write_text(content, encoding="utf-8")
        draw(runs, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
