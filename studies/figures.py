"""Figures and their numbers: NAME.png, NAME.svg and NAME.csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures", "font.size": 9, "axes.grid": True})
matplotlib.rcParams.update({"grid.alpha": 0.3, "axes.titlesize": 10, "savefig.dpi": 110, "legend.fontsize": 8})


def panels(count: int, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` axes side by side."""
    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, list(axes[0])


def shades(count: int) -> list[Any]:
    """Colours from dark to light, for an ordered family of lines."""
    return [pyplot.get_cmap("viridis")(0.9 * index / max(count - 1, 1)) for index in range(count)]


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes the figure as PNG and SVG, and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    for ending in ("png", "svg"):
        figure.savefig(folder / f"{name}.{ending}", metadata={"Date": None} if ending == "svg" else None)
    pyplot.close(figure)
    print(f"figure: {folder / name}.png, .svg", flush=True)


def write_csv(rows: Sequence[dict[str, Any]], folder: Path, name: str) -> None:
    """Writes rows that share their columns; floats with six digits."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
    print(f"numbers: {path}", flush=True)
