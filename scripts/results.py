"""Collects finished runs into the papers' tables: ours beside theirs, speed-ups, seeds as mean and spread.

  python scripts/results.py OUTPUT_DIR [OUTPUT_DIR ...] [--output FOLDER]

An output folder may be a run's, or hold runs at any depth. Prints Markdown; with --output also writes results.md,
results.csv, and accuracy against compute and against wall time as compute.svg and time.svg.

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

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.charts import Series, chart  # noqa: E402
from training.logs import duration_text, read_log  # noqa: E402

# What says where, how fast or how often a run looks, and not what it learns.
CIRCUMSTANCES = (
    *("seed", "output_dir", "data_path", "resume", "auto_resume", "device", "devices", "deterministic", "num_workers"),
    *(
        "log_interval",
        "eval_interval",
        "save_interval",
        "keep_checkpoints",
        "compile",
        "channels_last",
        "speeds",
        "plan",
    ),
)
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
    def ordinary(self) -> bool:
        return len(self.plan["stages"]) == 1 and self.settings["magnitude"] in (None, "constant")

    @property
    def speedup(self) -> float:
        return self.plan["total"]["speedup_flops"] or self.plan["total"]["speedup_pixels"]

    @property
    def recipe(self) -> str:
        """What runs of different seeds share."""
        return json.dumps({key: value for key, value in self.settings.items() if key not in CIRCUMSTANCES})

    @property
    def comparable(self) -> tuple[Any, ...]:
        """What runs must share for their times to be compared."""
        settings = self.settings
        keys = ("model", "model_args", "input_size", "data_set", "data_path")
        return (*(json.dumps(settings[key]) for key in keys), self.devices)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """The finished runs in or under ``folders``; says on standard error which it left out.

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
                print(f"left out {config.parent}: {run}", file=sys.stderr)
            else:
                runs.append(run)
    return runs


def read_run(path: Path) -> Run | str:
    """A run, or why it is none that counts."""
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text())
        plan = json.loads((path / "plan.json").read_text())
        records = read_log(path / "log.txt")
    except (OSError, ValueError, yaml.YAMLError) as error:
        return str(error)
    if not records or records[-1]["progress"] < 1:
        return "not finished"
    last = records[-1]
    if "test_acc1" not in last:
        return "no evaluation at the end"
    about = path / "environment.json"
    devices = json.loads(about.read_text())["devices"] if about.exists() else "unknown"
    # The papers evaluate the average where they keep one.
    top1 = last.get("test_acc1_ema", last["test_acc1"])
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
            theirs = want.get("top1")
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
                spread(scores, 2),
                "" if theirs is None else f"{theirs:g}",
                "" if theirs is None else f"{statistics.mean(scores) - theirs:+.2f}",
                f"{first.speedup:.2f}x",
                "" if compute is None else f"{compute:.2f}x",
                "" if not ratios or first.ordinary else f"{spread(ratios, 2)}x",
                "" if "wall" not in printed else f"{printed['wall']:.2f}x",
                duration_text(statistics.mean(times)),
            )
            lines.append(dict(zip(COLUMNS, values)))
    return sorted(lines, key=lambda line: (line["table"] == "Other runs", line["table"], line["model"], line["row"]))


def spread(values: list[float], digits: int) -> str:
    """80.31 ± 0.12: the mean and, of several, the sample's standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(lines: list[dict[str, str]]) -> str:
    """One table for each of the papers'."""
    parts, columns = [], COLUMNS[1:]
    for table in dict.fromkeys(line["table"] for line in lines):
        parts += [f"## {table}", "", f"| {' | '.join(column.strip() for column in columns)} |"]
        parts.append("|" + " --- |" * 3 + " ---: |" * (len(columns) - 3))
        parts += [f"| {' | '.join(line[column] for column in columns)} |" for line in lines if line["table"] == table]
        parts.append("")
    return "\n".join(parts)


def to_csv(lines: list[dict[str, str]]) -> str:
    names = {"theirs": "top-1, theirs", "theirs ": "less compute, theirs", "theirs  ": "less time, theirs"}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names.get(column, column) for column in COLUMNS)
    writer.writerows([line[column] for column in COLUMNS] for line in lines)
    return file.getvalue()


def pictures(runs: list[Run]) -> dict[str, str]:
    """Accuracy against compute (ICCV Fig. 7, ++ Fig. 7) and against time: a series for each model and curriculum."""
    series: dict[str, dict[str, list[tuple[float, float, str]]]] = {"compute": {}, "time": {}}
    for run in runs:
        name = f"{run.settings['model']} {run.plan['curriculum']}"
        total = run.plan["total"]
        label = f"{run.plan['epochs']:g} epochs: {run.top1:.2f} %"
        for picture, x in (("compute", total["equivalent_epochs"]), ("time", run.seconds / 3600)):
            series[picture].setdefault(name, []).append((x, run.top1, label))
    axes = {"compute": "compute, epochs at the base size (by pixels)", "time": "hours of training"}
    result = {}
    for picture, named in series.items():
        drawn = [
            Series(name, [(x, y) for x, y, _ in sorted(points)], dots=True, names=[text for *_, text in sorted(points)])
            for name, points in named.items()
        ]
        title = f"Accuracy against {picture}"
        result[picture] = chart(title, drawn, axes[picture], "top-1, per cent", width=760, height=420)
    return result


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
    lines = collect(runs, json.loads((ROOT / "recipes" / "papers.json").read_text()))
    text = markdown(lines)
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        files = {"results.md": text, "results.csv": to_csv(lines)}
        files |= {f"{name}.svg": picture for name, picture in pictures(runs).items()}
        for name, content in files.items():
            (arguments.output / name).write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
