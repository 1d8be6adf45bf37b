"""Proposition 1 of the ICCV paper in numbers: what each operator lets through of the frequencies it should remove, and
what it does to those it should keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from curriculum import downsample
from curriculum.operators import OPERATORS
from studies.figures import panels, save, write_csv


def bands(base: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks (base, base) of an unshifted spectrum: inside the size x size block, on its edge, outside of it.

    The edge, where max(|k|, |l|) = size / 2, is the Nyquist line of even sizes: the block keeps only one of each pair
    of mirrored frequencies there.
    """
    k = torch.fft.fftfreq(base, 1 / base, dtype=torch.float64).abs()
    largest = torch.maximum(k[:, None], k[None])
    return largest < size / 2, largest == size / 2, largest > size / 2


def natural_images(count: int, base: int, seed: int = 0) -> torch.Tensor:
    """Noise whose amplitude falls as 1 / frequency, as photographs' does: float64 (count, 1, base, base)."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.fft2(torch.randn(count, 1, base, base, dtype=torch.float64, generator=generator))
    k = torch.fft.fftfreq(base, 1 / base, dtype=torch.float64)
    frequency = (k[:, None].square() + k[None].square()).sqrt()
    return torch.fft.ifft2(spectrum / frequency.clamp(min=1)).real


def keep(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The part of the images whose frequencies the mask holds; the mask is symmetric, so it is real."""
    return torch.fft.ifft2(torch.fft.fft2(images) * mask).real


def leaks(base: int, size: int, operator: str, images: torch.Tensor) -> dict[str, Any]:
    """One row of the table, for images (N, C, base, base) in float64.

    Returns:
        ``leak``: amplitude (root mean square) of the output for the images' high band alone, relative to the high
        band's; ``leak_nyquist``: the same for the edge of the block; ``low_error``: how far the low band of the output
        for whole images is from the images' own, relative to it, the shift by which the operator's pixels lie elsewhere
        taken out. Proposition 1: 0 and 0 for the Fourier crop.
    """
    low, edge, high = bands(base, size)
    row: dict[str, Any] = {"operator": operator, "base_size": base, "size": size}
    for name, mask in (("leak", high), ("leak_nyquist", edge)):
        part = keep(images, mask)
        row[name] = (_rms(downsample(part, size, operator)) / _rms(part)).item() if mask.any() else math.nan
    out = torch.fft.fft2(downsample(images, size, operator)) / size**2
    own = torch.fft.fft2(images) / base**2
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    inside = low[torch.where(k < 0, k + base, k).long()][:, torch.where(k < 0, k + base, k).long()]
    own = own[..., k.long() % base, :][..., k.long() % base]
    if operator != "fourier":  # pixels are sampled at their centres, not at their corners
        shift = torch.exp(1j * math.pi * k * (1 / size - 1 / base))
        out = out / shift[:, None] / shift[None]
    error = (out - own).abs().square() * inside
    row["low_error"] = (error.sum() / (own.abs().square() * inside).sum()).sqrt().item()
    return row


def gains(base: int, size: int, operator: str) -> list[dict[str, Any]]:
    """Amplitude of the output for a wave along one axis, relative to the wave's, for each of its frequencies.

    Sine and cosine are averaged. Ideally 1 below size / 2 and 0 above it.
    """
    u = torch.arange(base, dtype=torch.float64) / base
    k = torch.arange(base // 2 + 1, dtype=torch.float64)
    waves = torch.stack([torch.cos(2 * math.pi * k[:, None] * u), torch.sin(2 * math.pi * k[:, None] * u)], dim=1)
    images = waves[..., None, :].expand(-1, -1, base, -1)
    out = downsample(images, size, operator).square().mean((-3, -2, -1)).sqrt()
    gain = out / waves.square().mean((-2, -1)).sqrt()
    names = {"operator": operator, "base_size": base, "size": size}
    return [{**names, "frequency": int(f), "gain": value} for f, value in zip(k, gain.tolist())]


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


def measure(base: int, sizes: Sequence[int], images: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The table and the gains of every operator at every size, on ``images`` images of 1 / f noise."""
    noise = natural_images(images, base)
    table, curves = [], []
    for size in sizes:
        for operator in OPERATORS:
            table.append(leaks(base, size, operator, noise))
            curves += gains(base, size, operator)
            print(
                "  ".join(f"{k} {f'{v:.3g}' if isinstance(v, float) else v}" for k, v in table[-1].items()), flush=True
            )
    return table, curves


def report(table: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes proposition1.csv, proposition1_gains.csv and the figure of the gains."""
    write_csv(table, folder, "proposition1")
    write_csv(curves, folder, "proposition1_gains")
    sizes = list(dict.fromkeys(row["size"] for row in table))
    figure, axes = panels(len(sizes))
    for axis, size in zip(axes, sizes):
        for operator in OPERATORS:
            mine = [row for row in curves if (row["operator"], row["size"]) == (operator, size)]
            leak = next(row["leak"] for row in table if (row["operator"], row["size"]) == (operator, size))
            points = [row["frequency"] for row in mine], [row["gain"] for row in mine]
            style = {"lw": 2.4, "zorder": 3} if operator == "fourier" else {"lw": 1.4}
            axis.plot(*points, label=f"{operator}, leak {leak:.2g}", **style)
        axis.axvspan(size / 2, mine[-1]["frequency"], color="k", alpha=0.06)
        axis.set(
            title=f"{table[0]['base_size']} to {size} pixels", xlabel="frequency, cycles per image side", ylim=(0, 1.9)
        )
        axis.legend(loc="upper right")
    axes[0].set_ylabel("gain (shaded: should be 0)")
    save(figure, folder, "proposition1")
