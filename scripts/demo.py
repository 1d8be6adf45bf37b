"""The demo: trains the ordinary schedule, EfficientTrain++ and the fast recipe side by side.

Prints a table and how much less the curricula need for the same accuracy, and draws the picture.

`bash scripts/demo.sh` sets up and calls it; `--seeds 3` repeats everything and gives mean and spread. A run that was
interrupted resumes where it was, and one that is finished is not run again.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.run_files import read_log
from studies.factors import Curve, factor
from training.logs import spread
from utils import duration_text

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "demo.yaml"
FAST = yaml.safe_load((ROOT / "recipes" / "_fast.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Arm:
    """One line of the table: settings at a share of the full budget."""

    name: str
    label: str
    settings: dict[str, Any]
    share: float


# The ordinary schedules get the linear magnitude too, and the smaller budgets: on a small data set weaker augmentation
# and shorter training are worth something by themselves, and the curriculum must not be credited with it.
ORDINARY = {"curriculum": "none", "magnitude": "linear"}
LABELS = {
    "ordinary": ("ordinary, AdamW", ORDINARY),
    "muon": ("ordinary, Muon", {**FAST, **ORDINARY}),
    "etpp": ("EfficientTrain++, AdamW", {"curriculum": "efficienttrain++"}),
    "fast": ("fast recipe", FAST),
}
SHARES = (
    ("ordinary", 1),
    ("ordinary", 1 / 2),
    ("ordinary", 1 / 4),
    ("muon", 1 / 2),
    ("muon", 1 / 4),
    ("etpp", 2 / 3),
    ("etpp", 1 / 2),
    ("fast", 1 / 2),
    ("fast", 1 / 3),
    ("fast", 1 / 5),
)
ARMS = tuple(Arm(f"{kind}-{share:.2f}", *LABELS[kind], share) for kind, share in SHARES)


def train(arm: Arm, epochs: float, data: Path, folder: Path, seed: int) -> None:
    """Runs main.py for one arm and seed, its progress lines passed through."""
    flags = {
        "recipe": RECIPE,
        "data_path": data,
        "output_dir": folder,
        "epochs": f"{epochs * arm.share:.4f}",
        "baseline_epochs": epochs,
        "seed": seed,
        **arm.settings,
    }
    command = [sys.executable, str(ROOT / "main.py")]
    command += [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)  # main.py has said why


def result(folder: Path) -> dict[str, float]:
    """Accuracy at the end (per cent) and on how many images, compute relative to the full ordinary schedule, seconds of
    training."""
    records = read_log(folder / "log.txt")
    total = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["total"]
    return {
        "accuracy": records[-1]["test_acc1"],
        "images": records[-1]["eval_images"],
        "compute": 1 / total["speedup_flops"],
        "seconds": sum(record["seconds"] for record in records),
    }


Results = dict[str, list[dict[str, float]]]


def table(results: Results) -> str:
    """One line per arm: mean (and over several seeds, standard deviation) of accuracy, compute and training time."""
    full = statistics.mean(row["seconds"] for row in results[ARMS[0].name])
    lines = [f"{'schedule':<24} {'compute':>8} {'top-1':>16} {'training time':>14} {'speed-up':>9}"]
    for arm in ARMS:
        rows = results[arm.name]
        mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        accuracy = f"{spread([row['accuracy'] for row in rows], 1)} %"
        lines.append(
            f"{arm.label:<24} {mean['compute']:>8.2f} {accuracy:>16} {duration_text(mean['seconds']):>14} "
            f"{full / mean['seconds']:>8.2f}x"
        )
    return "\n".join(lines)


def arms_of(label: str) -> list[Arm]:
    """Those of one label, the cheapest first."""
    return sorted((arm for arm in ARMS if arm.label == label), key=lambda arm: arm.share)


def curve(results: Results, label: str, cost: str) -> Curve:
    rows = [results[arm.name] for arm in arms_of(label)]
    values = [[[row[key] for row in group] for group in rows] for key in (cost, "accuracy")]
    return Curve(*map(np.array, values))


def factors(results: Results) -> list[str]:
    """How much less the curricula need for what ordinary training reaches at its largest budget."""
    lines = []
    for mine, other in (("etpp", "ordinary"), ("fast", "ordinary"), ("fast", "muon")):
        names = [LABELS[kind][0] for kind in (mine, other)]
        found = []
        for cost, words in (("compute", "compute"), ("seconds", "training time")):
            curves = [curve(results, name, cost) for name in names]
            found.append(f"{factor(*curves, place=len(curves[1].cost) - 1).text()} x less {words}")
        top = curves[1].accuracy[-1]
        lines.append(f"for the {top:.1f} % of {names[1]}: {names[0]} takes {' and '.join(found)}")
    return lines


def half_width(results: Results, label: str) -> np.ndarray:
    """(K,): of the 95 % interval of each budget's accuracy: over the seeds, or of the validation images of one seed."""
    accuracies = curve(results, label, "compute")
    if accuracies.half_width is not None:
        return np.full(len(accuracies.cost), accuracies.half_width)
    images = [results[arm.name][0]["images"] for arm in arms_of(label)]
    share = accuracies.accuracy / 100
    return 196 * np.sqrt(share * (1 - share) / images)


def draw(results: Results, path: Path) -> None:
    """Accuracy against compute and against time: a line and its band for each kind of schedule, a point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.2), dpi=120, sharey=True)
    full = statistics.mean(row["seconds"] for row in results[ARMS[0].name])
    for axes, cost, unit in zip(panels, ("compute", "seconds"), (1.0, full)):
        for label in dict.fromkeys(arm.label for arm in ARMS):
            line, width = curve(results, label, cost), half_width(results, label)
            (drawn,) = axes.plot(line.cost / unit, line.accuracy, "o-", label=label)
            low, high = line.accuracy - width, line.accuracy + width
            axes.fill_between(line.cost / unit, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
            axes.plot(line.costs.ravel() / unit, line.accuracies.ravel(), ".", color=drawn.get_color(), alpha=0.4)
        axes.set_xlabel(f"training {'compute' if cost == 'compute' else 'time'} (full ordinary schedule = 1)")
        axes.set_xscale("log")
        ticks = [2.0**power for power in range(math.floor(math.log2(min(line.cost) / unit)), 1)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation top-1 (%)")
    panels[0].legend(loc="lower right", fontsize=8)
    seeds = len(next(iter(results.values())))
    bands = "over the seeds" if seeds > 1 else "of the validation images"
    figure.suptitle(f"The demo's photographs, base size 64 ({seeds} seed{'s' * (seeds > 1)}; bands: 95 % {bands})")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "demo", help="image folders (scripts/demo_data.py)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="folder for the runs and picture")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, for mean and spread")
    parser.add_argument("--epochs", type=float, help="full budget in ordinary epochs (default: the recipe's)")
    args = parser.parse_args()
    epochs = args.epochs or yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["epochs"]

    runs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    started, done, total = time.perf_counter(), 0.0, sum(arm.share for arm, _ in runs)
    for number, (arm, seed) in enumerate(runs, 1):
        left = (time.perf_counter() - started) / done * (total - done) if done else float("inf")
        print(
            f"\n[{number}/{len(runs)}] {arm.label}, {arm.share:.2f} of the compute, seed {seed} "
            f"(all runs: {duration_text(left)} left)",
            flush=True,
        )
        train(arm, epochs, args.data, args.output / f"{arm.name}-seed{seed}", seed)
        done += arm.share
    results = {arm.name: [result(args.output / f"{arm.name}-seed{seed}") for seed in range(args.seeds)] for arm in ARMS}
    print("\n" + table(results) + "\n\n" + "\n".join(factors(results)))
    picture = args.output / "demo.png"
    draw(results, picture)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    main()
