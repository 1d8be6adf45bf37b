"""What a run learns, classes, labels or what masked images hide: a batch's loss, an evaluation's scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from curriculum.sampler import derive_seed
from engine import PerImage
from inputs.finish import Finish
from inputs.transfer import send
from inputs.views import Source
from training import findings


class OfImages:
    """What tasks share whose scores are made of a few numbers for each image."""

    def begin(self, data: Dataset, device: torch.device) -> PerImage:
        return PerImage(self.measured, self.measure, self.scores, len(data), device)

    def answers(self, *_: Any) -> torch.Tensor | None:
        return None


class Classification(OfImages):
    """Cross entropy; top-1 and top-5 accuracy in per cent (of fewer than 5 classes, all count as the top 5).

    Args:
        smoothing: label smoothing, where targets are not mixed and smoothed already.
        columns: the model's output for each of the data set's classes, where the two differ.
    """

    measured = ("loss", "acc1", "acc5", "prediction")
    metrics = ("loss", "acc1", "acc5")
    score = "acc1"

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
        return {**means, "predictions": table["prediction"].long(), "losses": table["loss"]}

    def findings(self, scores: dict[str, Any], source: Source) -> dict[str, Any]:
        return findings.of_classes(source, scores["predictions"].cpu().numpy(), scores["losses"].cpu().numpy())

    def describe(self, result: dict[str, Any]) -> str:
        average = f"  EMA {result['test_acc1_ema']:.2f} %" if "test_acc1_ema" in result else ""
        return (
            f"top-1 {result['test_acc1']:.2f} %  top-5 {result['test_acc5']:.2f} %{average}  "
            f"loss {result['test_loss']:.4f}"
        )


class MultiLabel(OfImages):
    """Any number of labels per image: binary cross entropy, and the mean average precision (mAP) in per cent.

    The mAP is the mean over the classes that have positive images of each one's average precision over all images of
    the data set, with ties scored as one threshold (scikit-learn's definition).

    Args:
        classes: number of classes that are scored. Those that the data set lacks are trained to be absent.
        columns: the model's output for each of the data set's classes, where the two differ.
    """

    metrics = ("loss", "map")
    score = "map"

    def __init__(self, classes: int, columns: torch.Tensor | None = None) -> None:
        self.classes = classes
        self.columns = torch.arange(classes) if columns is None else columns
        self.measured = ("loss", *(f"{what} {k}" for what in ("logit", "target") for k in range(classes)))

    def loss(self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        logits = model(images).float()
        return F.binary_cross_entropy_with_logits(logits, _padded(targets, logits.shape[1]))

    def measure(
        self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        logits = model(images).float()
        logits, targets = logits[:, self.columns.to(logits.device)], _padded(targets, self.classes)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        return torch.cat([loss[None], logits.T, targets.T])

    def scores(self, table: dict[str, torch.Tensor]) -> dict[str, Any]:
        logits, targets = ([table[f"{what} {k}"] for k in range(self.classes)] for what in ("logit", "target"))
        precisions = [average_precision(*pair) for pair in zip(logits, targets)]
        known = [value for value in precisions if value is not None]
        # Without a single positive there is nothing to score; no run is the better for it.
        means = {"loss": table["loss"].mean().item(), "map": sum(known) / len(known) if known else 0.0}
        return {**means, "ap": precisions, "losses": table["loss"], "logits": torch.stack(logits, 1)}

    def findings(self, scores: dict[str, Any], source: Source) -> dict[str, Any]:
        probabilities = scores["logits"].sigmoid().cpu().numpy()
        return findings.of_labels(source, probabilities, scores["losses"].cpu().numpy(), scores["ap"])

    def describe(self, result: dict[str, Any]) -> str:
        average = f"  EMA {result['test_map_ema']:.2f} %" if "test_map_ema" in result else ""
        return f"mAP {result['test_map']:.2f} %{average}  loss {result['test_loss']:.4f}"


def _padded(targets: torch.Tensor, classes: int) -> torch.Tensor:
    return F.pad(targets, (0, classes - targets.shape[1]))


def average_precision(scores: torch.Tensor, targets: torch.Tensor) -> float | None:
    """The sum over thresholds n of (recall_n - recall_(n-1)) precision_n, in per cent; None without a positive.

    Args:
        scores: (N,); images of equal score pass the same thresholds. targets: (N,), 1 for positives, else 0.
    """
    scores, order = scores.sort(descending=True)
    hits = targets[order].double()
    positives = hits.sum().item()
    if not positives:
        return None
    places = torch.arange(len(scores), device=scores.device)
    ends = torch.ones_like(places, dtype=torch.bool)
    ends[:-1] = scores[1:] != scores[:-1]
    # Of each image, the last one with its score: the threshold that both pass.
    last = torch.where(ends, places, len(scores)).flip(0).cummin(0).values.flip(0)
    precision = (hits.cumsum(0) / (places + 1))[last]
    return 100 * (hits * precision).sum().item() / positives


class Reconstruction(OfImages):
    """The loss of a masked autoencoder (models.mae); in an evaluation every image has a mask that never changes.

    It says how a run goes, at the same size and of the same target. It does not say how good the features are: there is
    no best checkpoint, and the last one is the result.

    Args:
        patch_side: pixels a side of the patches that are masked.
    """

    measured = metrics = ("loss",)
    score = None

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

    def findings(self, scores: dict[str, Any], source: Source) -> None:
        return None

    def describe(self, result: dict[str, Any]) -> str:
        average = f"  EMA {result['test_loss_ema']:.4f}" if "test_loss_ema" in result else ""
        return f"reconstruction loss {result['test_loss']:.4f}{average}"

    def answers(
        self, model: nn.Module, data: Dataset, places: Sequence[int], finish: Finish, device: torch.device, size: int
    ) -> torch.Tensor:
        images = finish.evaluate(torch.stack([data[place][0] for place in places]).to(device), size)
        noise = self.noise(images, map(derive_seed, range(len(images))))
        return model.picture(images, noise, finish.pixels)

    def noise(self, images: torch.Tensor, seeds: Iterable[int]) -> torch.Tensor:
        """What decides on the masks, (N, patches), N / len(seeds) images by each seed: the same on any device."""
        seeds = list(seeds)
        shape = len(images) // len(seeds), math.prod(side // self.patch_side for side in images.shape[-2:])
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return send(torch.cat(drawn), images.device)
