"""Accuracy on low-pass and high-pass filtered validation images over training (ICCV Figure 4, Table 1)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from curriculum import high_pass, low_pass
from studies.figures import panels, save, shades, write_csv
from studies.runs import RunFolder
from utils import duration_text

FILTERS = {"low-pass": low_pass, "high-pass": high_pass}
BANDWIDTHS = (10, 20, 40, 60, 80, 110)  # at 224 pixels, in cycles per image side


@torch.inference_mode()
def measure(
    run: RunFolder,
    radii: Sequence[float],
    device: torch.device,
    images: int | None = None,
    batch_size: int = 256,
    average: bool = False,
) -> list[dict[str, Any]]:
    """Scores every numbered checkpoint of a run on images as they are and through every filter of every radius.

    Args:
        radii: of the disc in the spectrum, cycles per image side at the base size.
        images: validation images to use, None for all.
        average: score the moving averages.

    Returns:
        A row for each checkpoint and filter: run, step, epochs (full-size epochs' worth of compute), filter (``none``,
        ``low-pass`` or ``high-pass``), radius (None for none), accuracy (per cent) and images.
    """
    views = [("none", None), *((name, radius) for name in FILTERS for radius in radii)]
    paths, rows, started = run.checkpoints(), [], time.perf_counter()
    for number, path in enumerate(paths, 1):
        model, state = run.model(path, device, average)
        correct, count = torch.zeros(len(views), device=device), 0
        for pixels, labels in run.validation(images, batch_size, device):
            for place, (name, radius) in enumerate(views):
                shown = pixels if radius is None else FILTERS[name](pixels, radius)
                correct[place] += (model(shown).argmax(dim=1) == labels).sum()
            count += len(labels)
        rows += [
            {
                "run": run.path.name,
                "step": state["step"],
                "epochs": run.plan.equivalent_epochs(state["step"]),
                "filter": name,
                "radius": radius,
                "accuracy": 100 * hits / count,
                "images": count,
            }
            for (name, radius), hits in zip(views, correct.tolist())
        ]
        left = (time.perf_counter() - started) / number * (len(paths) - number)
        print(f"{path.name}: {rows[-len(views)]['accuracy']:.2f} %; {duration_text(left)} left", flush=True)
    return rows


def matched(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Table 1: the low-pass and the high-pass filter whose accuracies at the end are closest, over training.

    Pairs at whose end neither tells more than a quarter of what the network knows of whole images are skipped.
    """
    last = max(row["step"] for row in rows)
    end = {(row["filter"], row["radius"]): row["accuracy"] for row in rows if row["step"] == last}
    lows, highs = ([radius for name, radius in end if name == kind] for kind in FILTERS)
    pairs = [(low, high) for low in lows for high in highs]
    useful = [p for p in pairs if max(_ends(end, p)) > end["none", None] / 4] or pairs
    low, high = min(useful, key=lambda pair: abs(_ends(end, pair)[0] - _ends(end, pair)[1]))
    table = []
    for step in sorted({row["step"] for row in rows}):
        here = {(row["filter"], row["radius"]): row for row in rows if row["step"] == step}
        first, second = here["low-pass", low], here["high-pass", high]
        table.append(
            {
                "epochs": first["epochs"],
                f"low-pass {low:g}": first["accuracy"],
                f"high-pass {high:g}": second["accuracy"],
                "whole": here["none", None]["accuracy"],
            }
        )
    return table


def _ends(end: dict[tuple[str, float | None], float], pair: tuple[float, float]) -> tuple[float, float]:
    return end["low-pass", pair[0]], end["high-pass", pair[1]]


def report(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes filtered.csv and, for each run, its figure and its Table 1."""
    write_csv(rows, folder, "filtered")
    names = list(dict.fromkeys(row["run"] for row in rows))
    for name in names:
        mine = [row for row in rows if row["run"] == name]
        table = matched(mine)
        ending = f"_{name}" if len(names) > 1 else ""
        write_csv(table, folder, f"filtered_matched{ending}")
        figure, axes = panels(3)
        for axis, kind in zip(axes, FILTERS):
            _draw(axis, mine, kind)
        whole, pair = list(table[0])[-1], list(table[0])[1:3]
        for column, style in ((pair[0], "o-"), (pair[1], "s-"), (whole, "k--")):
            axes[2].plot([row["epochs"] for row in table], [row[column] for row in table], style, label=column, ms=4)
        axes[2].set(title="the two with the closest ends (Table 1)", xlabel="full-size epochs of compute")
        axes[2].legend()
        axes[0].set_ylabel(f"{name}: top-1, per cent")
        save(figure, folder, f"filtered{ending}")


def _draw(axis: Any, rows: Sequence[dict[str, Any]], kind: str) -> None:
    radii = sorted({row["radius"] for row in rows if row["filter"] == kind})
    for radius, colour in zip(radii, shades(len(radii))):
        mine = [row for row in rows if row["filter"] == kind and row["radius"] == radius]
        axis.plot(
            [r["epochs"] for r in mine],
            [r["accuracy"] for r in mine],
            "o-",
            color=colour,
            label=f"r = {radius:g}",
            ms=3,
        )
    whole = [row for row in rows if row["filter"] == "none"]
    axis.plot([row["epochs"] for row in whole], [row["accuracy"] for row in whole], "k--", label="whole")
    axis.set(title=f"{kind} filtered validation images", xlabel="full-size epochs of compute")
    axis.legend(ncol=2)
