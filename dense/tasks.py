"""What a detector or a segmenter learns: losses of a batch of scenes, scores of an evaluation; and the batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curriculum import CurriculumSampler
from datasets import loader_options
from inputs.finish import IMAGENET_MEAN, IMAGENET_STD, Finish

from .draw import SHOWN, draw_labels, draw_objects
from .scenes import EvalScenes, TrainScenes
from .score import DetectionScorer, SegmentationScorer
from .transforms import collate
from .upernet import segment

BYTES = 12  # of a pixel of a scene: its colour, and a label or the masks of a few objects


@dataclass
class Scenes:
    """What goes with the images of a batch.

    Attributes:
        sizes: int64 (N, 2), true height and width; they stay on the CPU, where boxes are cut to them.
        targets: N dicts, or int64 label maps (N, H, W).
    """

    sizes: Tensor
    targets: Any

    def to(self, device: torch.device, non_blocking: bool = False) -> Scenes:
        return replace(self, targets=_apply(self.targets, lambda x: x.to(device, non_blocking=non_blocking)))

    def is_pinned(self) -> bool:
        return self.sizes.is_pinned()

    def pin_memory(self) -> Scenes:
        return Scenes(self.sizes.pin_memory(), _apply(self.targets, lambda x: x.pin_memory()))


def _apply(value: Any, function) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _apply(item, function) for key, item in value.items()}
    return [_apply(item, function) for item in value] if isinstance(value, list) else value


def training_batches(
    data: TrainScenes, sampler: CurriculumSampler, workers: int, pin: bool
) -> Iterator[tuple[Tensor, Scenes]]:
    """Batches for the rest of the run, uint8 images (N, 3, H, W) and their scenes, one per forward pass."""
    groups = max(len(groups) for epoch in sampler.plan for groups in sampler.forward_passes(epoch))
    options = loader_options(workers, pin, groups * sampler.micro_batch * data.transform.pixels * BYTES)
    yield from DataLoader(data, batch_sampler=sampler, collate_fn=_train_batch, **options)


def eval_loader(source, transform, rank: int, world_size: int, workers: int, pin: bool) -> DataLoader:
    """Batches (images, scenes, indices) of every ``world_size``-th image from ``rank`` on, one image each: padding to
    others would make an image's result depend on the number of processes."""
    return DataLoader(
        EvalScenes(source, transform),
        batch_size=1,
        sampler=range(rank, len(source), world_size),
        collate_fn=_eval_batch,
        **loader_options(min(workers, -(-len(source) // world_size)), pin, transform.pixels * BYTES),
    )


def _train_batch(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, Scenes]:
    images, sizes, targets = collate(samples)
    return images, Scenes(sizes, targets)


def _eval_batch(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Scenes, Tensor]:
    images, sizes, targets = collate(samples)
    return images, Scenes(sizes, targets), torch.tensor([target["index"] for target in targets])


class SceneFinish(Finish):
    """Normalises images of any size; their padding has the mean colour, so that it becomes zero to within 0.01."""

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        channels_last: bool = False,
    ) -> None:
        super().__init__(0, mean, std, erasing=0, mixup=0, cutmix=0, channels_last=channels_last)

    def train(self, images: Tensor, targets: Scenes, *_: Any) -> tuple[Tensor, Scenes]:
        return self.normalise(images), targets

    def evaluate(self, images: Tensor, size: int, radius: float | None = None) -> Tensor:
        return self.normalise(images)


class DenseTask:
    """What both tasks share: the loss is the sum of what the model gives."""

    metrics: tuple[str, ...]
    score: str

    def loss(self, model: nn.Module, images: Tensor, targets: Scenes, seeds: Sequence[int]) -> Tensor:
        return sum(model(images, targets.sizes, targets.targets).values())

    def answers(
        self, model: nn.Module, data: EvalScenes, places: Sequence[int], finish: Finish, device: torch.device, size: int
    ) -> Tensor:
        """The images in a row, on each what the model says of it."""
        drawn = []
        for place in places:
            pixels = data[place][0]
            image = finish.evaluate(pixels[None].to(device), size)[0]
            drawn.append(self.picture(model, image, pixels, data.source.classes))
        height = max(picture.shape[1] for picture in drawn)
        return torch.cat([F.pad(picture, (0, 0, 0, height - picture.shape[1])) for picture in drawn], 2)

    def findings(self, scores: dict[str, Any], source: Any) -> None:
        """The report shows the scores of classes and drawn answers instead."""
        return None

    def describe(self, result: dict[str, Any]) -> str:
        shown = []
        for key in self.metrics:
            average = f" (EMA {_shown(result[f'test_{key}_ema'])})" if f"test_{key}_ema" in result else ""
            shown.append(f"{key.replace('_', ' ')} {_shown(result[f'test_{key}'])}{average}")
        return "  ".join(shown)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


class Detection(DenseTask):
    """A detector's losses; COCO's average precision of boxes and masks.

    Args:
        masks: whether it predicts masks.
    """

    score = "box_AP"

    def __init__(self, masks: bool) -> None:
        self.masks = masks
        kinds = ("box", "mask") if masks else ("box",)
        self.metrics = tuple(f"{kind}_{key}" for kind in kinds for key in ("AP", "AP50", "AP75"))

    def begin(self, data: EvalScenes, device: torch.device) -> DetectionScores:
        return DetectionScores(data.source, self.masks)

    def picture(self, model: nn.Module, image: Tensor, pixels: Tensor, classes: Sequence[str]) -> Tensor:
        """What the model finds in an image (3, H, W), drawn on its pixels, uint8 (3, H, W)."""
        (found,) = model(image[None], torch.tensor([image.shape[-2:]]))
        keep = found["scores"] >= SHOWN
        boxes, labels, scores = (found[key][keep].cpu() for key in ("boxes", "labels", "scores"))
        return draw_objects(pixels.cpu(), boxes, labels, classes, scores)


class DetectionScores:
    """Detections of a process, scored with those of the others."""

    def __init__(self, source, masks: bool) -> None:
        self.scorer = DetectionScorer(source, masks)

    def add(self, model: nn.Module, images: Tensor, targets: Scenes, indices: Tensor) -> None:
        self.scorer.add(model(images, targets.sizes), targets.targets, targets.sizes)

    def scores(self) -> dict[str, Any]:
        return self.scorer.scores()


class Segmentation(DenseTask):
    """A segmenter's losses; the mean IoU over classes, and accuracies.

    Args:
        scales, flip: of a test at several scales and mirrored (:func:`dense.upernet.segment`).
    """

    metrics = ("mIoU", "mAcc", "aAcc")
    score = "mIoU"

    def __init__(self, scales: Sequence[float] = (1.0,), flip: bool = False) -> None:
        self.scales, self.flip = tuple(scales), flip

    def begin(self, data: EvalScenes, device: torch.device) -> SegmentationScores:
        return SegmentationScores(self, data.source, device)

    def labels(self, model: nn.Module, images: Tensor, sizes: Tensor, wanted: Sequence[tuple[int, int]]):
        """A label map (H, W) for each image, at the size ``wanted``."""
        shapes = [(height, width) for height, width in sizes.tolist()]
        return segment(model, images, shapes, wanted, self.scales, self.flip)

    def picture(self, model: nn.Module, image: Tensor, pixels: Tensor, classes: Sequence[str]) -> Tensor:
        shape = tuple(image.shape[-2:])
        (labels,) = self.labels(model, image[None], torch.tensor([shape]), [shape])
        return draw_labels(pixels.cpu(), labels.cpu(), len(classes))


class SegmentationScores:
    """The confusion matrix of a process, added to those of the others."""

    def __init__(self, task: Segmentation, source, device: torch.device) -> None:
        self.task, self.scorer = task, SegmentationScorer(source, device)

    def add(self, model: nn.Module, images: Tensor, targets: Scenes, indices: Tensor) -> None:
        wanted = [target["original_size"] for target in targets.targets]
        self.scorer.add(self.task.labels(model, images, targets.sizes, wanted), targets.targets)

    def scores(self) -> dict[str, Any]:
        return self.scorer.scores()
