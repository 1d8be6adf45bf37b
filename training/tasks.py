"""What a run learns, classes or what masked images hide: the loss of a batch, and the scores of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from curriculum.sampler import derive_seed
from inputs.transfer import send


class Classification:
    """Cross entropy; top-1 and top-5 accuracy in per cent (of fewer than 5 classes, all count as the top 5).

    Args:
        smoothing: label smoothing, where targets are not mixed and smoothed already.
        columns: the model's output for each of the data set's classes, where the two differ.
    """

    measured = ("loss", "acc1", "acc5", "prediction")
    metrics = ("loss", "acc1", "acc5")
    picture = None

    def __init__(self, smoothing: float = 0.0, columns: torch.Tensor | None = None) -> None:
        self.smoothing, self.columns = smoothing, columns

    def loss(self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.smoothing
        return F.cross_entropy(model(images).float(), targets, label_smoothing=smoothing)

    def measure(
        self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        logits = model(images).float()
        if self.columns is not None:
            logits = logits[:, self.columns.to(logits.device)]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        top = 100.0 * (best == targets[:, None])
        loss = F.cross_entropy(logits, targets, reduction="none")
        return torch.stack([loss, top[:, 0], top.sum(1), best[:, 0]])

    def scores(self, table: dict[str, torch.Tensor]) -> dict[str, Any]:
        means = {key: table[key].mean().item() for key in self.metrics}
        return {**means, "predictions": table["prediction"].long()}

    def describe(self, result: dict[str, Any]) -> str:
        average = f"  EMA {result['test_acc1_ema']:.2f} %" if "test_acc1_ema" in result else ""
        return (
            f"top-1 {result['test_acc1']:.2f} %  top-5 {result['test_acc5']:.2f} %{average}  "
            f"loss {result['test_loss']:.4f}"
        )


class Reconstruction:
    """The loss of a masked autoencoder (models.mae); in an evaluation every image has a mask that never changes.

    It says how a run goes, at the same size and of the same target. It does not say how good the features are: there is
    no best checkpoint, and the last one is the result.

    Args:
        patch_side: pixels a side of the patches that are masked.
    """

    measured = metrics = ("loss",)

    def __init__(self, patch_side: int) -> None:
        self.patch_side = patch_side

    def loss(self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        return model(images, self.noise(images, seeds)).mean()

    def measure(
        self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        return model(images, self.noise(images, map(derive_seed, indices.tolist())))[None]

    def scores(self, table: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"loss": table["loss"].mean().item()}

    def describe(self, result: dict[str, Any]) -> str:
        average = f"  EMA {result['test_loss_ema']:.4f}" if "test_loss_ema" in result else ""
        return f"reconstruction loss {result['test_loss']:.4f}{average}"

    def picture(
        self, model: nn.Module, images: torch.Tensor, pixels: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        noise = self.noise(images, map(derive_seed, range(len(images))))
        return model.picture(images, noise, pixels)

    def noise(self, images: torch.Tensor, seeds: Iterable[int]) -> torch.Tensor:
        """What decides on the masks, (N, patches), N / len(seeds) images by each seed: the same on any device."""
        seeds = list(seeds)
        shape = len(images) // len(seeds), math.prod(side // self.patch_side for side in images.shape[-2:])
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return send(torch.cat(drawn), images.device)
