"""Spectra of what the network is shown at each stage of a run: cropped, augmented, erased, reduced, filtered, mixed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from curriculum import Pass
from studies.figures import panels, save, shades, write_csv
from studies.runs import RunFolder
from training.build import make_batches, make_sampler


def radial_power(images: torch.Tensor) -> torch.Tensor:
    """Mean power of an image's spectrum at each frequency.

    The amplitude of a wave does not depend on the size at which it is sampled: the DFT is divided by the number of
    pixels, so images of different input sizes compare.

    Args:
        images: float (N, C, S, S).

    Returns:
        (S // 2,): the mean of |DFT / S^2|^2 over images, channels and the ring k - 1/2 <= |f| < k + 1/2, for k = 1, 2,
        ... S // 2 cycles per image side.
    """
    size = images.shape[-1]
    power = (torch.fft.fft2(images.double()) / size**2).abs().square().mean((0, 1))
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    ring = (k[:, None].square() + k[None].square()).sqrt().add(0.5).floor().long().flatten()
    sums = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add_(0, ring, power.flatten())
    return (sums / ring.bincount())[1 : size // 2 + 1]


def shown(run: RunFolder, epoch: Pass, images: int) -> torch.Tensor:
    """The first ``images`` images of an epoch as the network sees them, one group: float (images, 3, B, B)."""
    config = replace(run.config, num_workers=0)
    sampler = make_sampler(config, run.plan, world_size=1)
    sampler.start_step = epoch.first_step
    images = min(images, epoch.steps * epoch.batch_size)
    pixels, labels = [], []
    with closing(make_batches(config, run.plan, sampler, run.train_source, torch.device("cpu"))) as batches:
        while sum(map(len, pixels)) < images:
            for kept, part in zip((pixels, labels), next(batches)):
                kept.append(part)
    arguments = epoch.input_size, [config.seed], images, epoch.radius, epoch.mixing
    return run.finish.train(torch.cat(pixels)[:images], torch.cat(labels)[:images], *arguments)[0]


def measure(run: RunFolder, images: int) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """A row for each stage and frequency: stage (from 1), input_size, frequency (cycles per image side), power; and
    for each stage the first of its images, uint8 (up to 4, 3, B, B).

    Args:
        images: of the first epoch of each stage; an even number, for they may be mixed.
    """
    rows, pictures = [], []
    for number, stage in enumerate(run.plan.stages, 1):
        epoch = next(epoch for epoch in run.plan if epoch.stage == number - 1)
        seen = shown(run, epoch, images)
        power = radial_power(seen)
        pictures.append(run.finish.pixels(seen[:4]))
        rows += [
            {"stage": number, "input_size": stage.input_size, "frequency": k, "power": value}
            for k, value in enumerate(power.tolist(), 1)
        ]
        print(f"stage {number} of {len(run.plan.stages)}", flush=True)
    return rows, pictures


def report(rows: Sequence[dict[str, Any]], pictures: Sequence[torch.Tensor], name: str, folder: Path) -> None:
    """Writes spectra.csv and its figure: on the left the images of each stage, at the same size on paper."""
    write_csv(rows, folder, "spectra")
    figure, (images, axis) = panels(2, 5.0, 3.8)
    images.set_axis_off()
    for number, four in enumerate(pictures):
        bottom = 1 - (number + 1) / len(pictures)
        strip = images.inset_axes((0, bottom, 1, 0.94 / len(pictures)))
        strip.imshow(torch.cat(list(four), dim=2).permute(1, 2, 0), interpolation="nearest")
        strip.set(xticks=[], yticks=[], ylabel=f"B = {four.shape[-1]}")
        strip.grid(False)
    stages = sorted({(row["stage"], row["input_size"]) for row in rows})
    for (stage, size), colour in zip(stages, shades(len(stages))):
        mine = [row for row in rows if row["stage"] == stage]
        axis.loglog(
            [row["frequency"] for row in mine],
            [row["power"] for row in mine],
            "o-",
            color=colour,
            label=f"stage {stage}: B = {size}",
            ms=3,
        )
        axis.axvline(size / 2, color=colour, ls=":", lw=1)
    axis.set(xlabel="frequency, cycles per image side", ylabel="power", title=f"what the network is shown: {name}")
    axis.legend()
    save(figure, folder, "spectra")
