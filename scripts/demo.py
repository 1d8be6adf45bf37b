"""The demo: trains the ordinary schedule and EfficientTrain++ side by side, prints a table and draws the picture.

`bash scripts/demo.sh` sets up and calls it; `--seeds 3` repeats everything and gives mean and spread. A run that was
interrupted resumes where it was, and one that is finished is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.logs import read_log, spread
from utils import duration_text

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "demo.yaml"


@dataclass(frozen=True)
class Arm:
    """One line of the table: a schedule at a share of the full budget."""

    name: str
    label: str
    curriculum: str
    magnitude: str
    share: float


# The ordinary schedule gets the linear magnitude too, and the smaller budgets: on a small data set weaker augmentation
# and shorter training are worth something by themselves, and the curriculum must not be credited with it.
ARMS = (
    Arm("ordinary-constant", "ordinary, magnitude constant", "none", "constant", 1),
    Arm("ordinary", "ordinary, magnitude linear", "none", "linear", 1),
    Arm("ordinary-2of3", "ordinary, magnitude linear", "none", "linear", 2 / 3),
    Arm("ordinary-1of2", "ordinary, magnitude linear", "none", "linear", 1 / 2),
    Arm("etpp-2of3", "EfficientTrain++", "efficienttrain++", "linear", 2 / 3),
    Arm("etpp-1of2", "EfficientTrain++", "efficienttrain++", "linear", 1 / 2),
)


def train(arm: Arm, epochs: float, data: Path, folder: Path, seed: int) -> None:
    """Runs main.py for one arm and seed, its progress lines passed through."""
    flags = {
        "recipe": RECIPE,
        "data_path": data,
        "output_dir": folder,
        "curriculum": arm.curriculum,
        "magnitude": arm.magnitude,
        "epochs": f"{epochs * arm.share:.4f}",
        "baseline_epochs": epochs,
        "seed": seed,
    }
    command = [sys.executable, str(ROOT / "main.py")]
    command += [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)  # main.py has said why


def result(folder: Path) -> dict[str, float]:
    """Accuracy at the end (per cent), compute relative to the full ordinary schedule, seconds of training."""
    records = read_log(folder / "log.txt")
    total = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["total"]
    return {
        "accuracy": records[-1]["test_acc1"],
        "compute": 1 / total["speedup_flops"],
        "seconds": sum(record["seconds"] for record in records),
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """One line per arm: mean (and over several seeds, standard deviation) of accuracy, compute and training time."""
    full = statistics.mean(row["seconds"] for row in results["ordinary"])
    lines = [f"{'schedule':<30} {'compute':>8} {'top-1':>16} {'training time':>14} {'speed-up':>9}"]
    for arm in ARMS:
        rows = results[arm.name]
        mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        accuracy = f"{spread([row['accuracy'] for row in rows], 1)} %"
        lines.append(
            f"{arm.label:<30} {mean['compute']:>8.2f} {accuracy:>16} {duration_text(mean['seconds']):>14} "
            f"{full / mean['seconds']:>8.2f}x"
        )
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Accuracy against compute: a line for the ordinary schedule, one for the curriculum, a point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=120)
    for label in dict.fromkeys(arm.label for arm in ARMS):
        arms = sorted((arm for arm in ARMS if arm.label == label), key=lambda arm: arm.share)
        compute = [statistics.mean(row["compute"] for row in results[arm.name]) for arm in arms]
        accuracy = [statistics.mean(row["accuracy"] for row in results[arm.name]) for arm in arms]
        (line,) = axes.plot(compute, accuracy, "o-", label=label)
        for arm in arms:
            points = results[arm.name]
            color = line.get_color()
            axes.plot([p["compute"] for p in points], [p["accuracy"] for p in points], ".", color=color, alpha=0.4)
    axes.set(xlabel="training compute (ordinary schedule = 1)", ylabel="validation top-1 (%)")
    seeds = len(next(iter(results.values())))
    axes.set_title(f"The demo's photographs, base size 64 ({seeds} seed{'s' * (seeds > 1)})")
    axes.set_xlim(0, 1.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", fontsize=8)  # no run has so little compute
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
    print("\n" + table(results))
    picture = args.output / "demo.png"
    draw(results, picture)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    main()
