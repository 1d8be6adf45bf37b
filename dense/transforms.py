"""Joint transforms of images, boxes, masks and label maps, and the padded batch.

All random choices of a sample come from its seed. At an input size below the plan's base size, the side list, the crop
and the longest side are multiplied by size / base size and rounded to 32 (the curriculum for dense tasks).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

IGNORED = 255  # label of pixels that neither train nor score
PAD = (124, 116, 104)  # ImageNet's mean colour: after normalisation, padding is zero to within 0.01
SIDES = tuple(range(480, 801, 32))
CROP_SIDES = (400, 500, 600)  # short sides before the crop of policy B
CROP_RANGE = (384, 600)  # height and width of that crop


class DetectionTrain:
    """Flip, then policy A or B: A resizes the short side to one of ``sides``, the long side at most ``max_side``; B
    first resizes to 400, 500 or 600 and cuts out a rectangle of 384-600 pixels a side (DETR's augmentation, in the
    multi-scale schedule of Swin's and DAT's detection code).

    Args:
        base_size: the plan's base size, at which sides are as given.
        sides: short sides of policy A. max_side: longest side.
        flip: probability of a horizontal flip. crop_prob: of policy B.
    """

    def __init__(
        self,
        base_size: int,
        sides: Sequence[int] = SIDES,
        max_side: int = 1333,
        flip: float = 0.5,
        crop_prob: float = 0.5,
    ) -> None:
        if not sides or min(sides) < 1 or max_side < max(sides):
            raise ValueError(f"--train_sides {list(sides)} must be positive and at most --max_side {max_side}")
        self.base_size, self.sides, self.max_side = base_size, tuple(sides), max_side
        self.flip, self.crop_prob = flip, crop_prob
        self.pixels = max(sides) * max_side  # of the largest image that this gives

    def largest(self, size: int, images: int) -> tuple[int, int]:
        """(height, width) of the largest batch at the curriculum's input size, before it is padded to whole strides:
        it may hold upright and lying images."""
        longest = scaled(self.max_side, size, self.base_size)
        return longest if images > 1 else scaled(max(self.sides), size, self.base_size), longest

    def __call__(self, scene: tuple[torch.Tensor, dict], size: int, seed: int) -> tuple[torch.Tensor, dict]:
        image, target = scene
        rng = random.Random(seed)
        if rng.random() < self.flip:
            image, target = flip_objects(image, target)
        if rng.random() < self.crop_prob:
            side = scaled(rng.choice(CROP_SIDES), size, self.base_size)
            image, target = resize_objects(image, target, side, scaled(self.max_side, size, self.base_size))
            shape = [
                rng.randint(*(min(length, scaled(bound, size, self.base_size)) for bound in CROP_RANGE))
                for length in image.shape[-2:]
            ]
            top, left = (rng.randint(0, length - cut) for length, cut in zip(image.shape[-2:], shape))
            image, target = crop_objects(image, target, top, left, *shape)
        side = scaled(rng.choice(self.sides), size, self.base_size)
        return resize_objects(image, target, side, scaled(self.max_side, size, self.base_size))


class DetectionTest:
    """The whole image at one size; targets only say what is needed to map detections back: ``original_size``."""

    def __init__(self, side: int = 800, max_side: int = 1333) -> None:
        self.side, self.max_side, self.pixels = side, max_side, side * max_side

    def __call__(self, scene: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, dict]:
        image = scene[0]
        size = fitted(*image.shape[-2:], self.side, self.max_side)
        return resize_image(image, size), {"original_size": tuple(image.shape[-2:])}


class SegmentationTrain:
    """Random resize, random crop that no class fills, flip, photometric distortion, padding to the crop (mmseg's).

    Args:
        base_size: the plan's base size, at which the crop is as given.
        crop: side of the square, pixels. side, max_side: size that ``ratio`` scales.
        cat_max_ratio: a crop of which one class takes more than this share is redrawn, ten times at most.
    """

    def __init__(
        self,
        base_size: int,
        crop: int = 512,
        side: int = 512,
        max_side: int = 2048,
        ratio: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip: float = 0.5,
        distort: bool = True,
    ) -> None:
        if crop < 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"--crop is {crop} and its scales {ratio}: both must be positive, smallest first")
        self.base_size, self.crop, self.side, self.max_side = base_size, crop, side, max_side
        self.pixels = crop**2
        self.ratio, self.cat_max_ratio, self.flip, self.distort = ratio, cat_max_ratio, flip, distort

    def __call__(
        self, scene: tuple[torch.Tensor, torch.Tensor], size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns uint8 image (3, crop, crop) and label map (crop, crop)."""
        image, labels = scene
        rng = random.Random(seed)
        ratio, share = rng.uniform(*self.ratio), size / self.base_size
        shape = fitted(*image.shape[-2:], self.side * ratio * share, self.max_side * ratio * share)
        image, labels = resize_image(image, shape), resize_labels(labels, shape)
        crop = scaled(self.crop, size, self.base_size)
        rows, columns = self._place(labels, crop, rng)
        image, labels = image[:, rows, columns], labels[rows, columns]
        if rng.random() < self.flip:
            image, labels = F.horizontal_flip_image(image), F.horizontal_flip_mask(labels)
        if self.distort:
            image = distort(image, rng)
        height, width = labels.shape
        padded = pad_colour(3, crop, crop)
        padded[:, :height, :width] = image
        padded_labels = torch.full((crop, crop), IGNORED, dtype=torch.uint8)
        padded_labels[:height, :width] = labels
        return padded, padded_labels

    def largest(self, size: int, images: int) -> tuple[int, int]:
        """(height, width) of a batch at the curriculum's input size."""
        return (scaled(self.crop, size, self.base_size),) * 2

    def _place(self, labels: torch.Tensor, crop: int, rng: random.Random) -> tuple[slice, slice]:
        for _ in range(10):
            place = tuple(
                slice(first, first + crop)
                for first in (rng.randint(0, max(length - crop, 0)) for length in labels.shape)
            )
            counts = np.bincount(labels[place].numpy().ravel(), minlength=IGNORED + 1)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return place


class SegmentationTest:
    """The whole image at one size; targets have its label map as it is, ``label`` (H, W), and ``original_size``."""

    def __init__(self, side: int = 512, max_side: int = 2048) -> None:
        self.side, self.max_side, self.pixels = side, max_side, side * max_side

    def __call__(self, scene: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, dict]:
        image, labels = scene
        size = fitted(*image.shape[-2:], self.side, self.max_side)
        return resize_image(image, size), {"original_size": tuple(image.shape[-2:]), "label": labels}


def scaled(length: int, size: int, base_size: int) -> int:
    """A side at the curriculum's input size: as it is at the base size, else in proportion, rounded to 32."""
    return length if size == base_size else max(32, 32 * int(length * size / base_size / 32 + 0.5))


def fitted(height: int, width: int, side: float, max_side: float) -> tuple[int, int]:
    """(height, width) of the largest image of this shape whose short side is at most ``side``, its long ``max_side``.

    >>> fitted(480, 640, 800, 1333), fitted(480, 1000, 800, 1333)
    ((800, 1067), (640, 1333))
    """
    factor = min(side / min(height, width), max_side / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (3, H, W) -> (3, h, w), bilinear, antialiased."""
    return F.resize_image(image, list(size), InterpolationMode.BILINEAR, antialias=True)


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (..., H, W) -> (..., h, w): the nearest pixel's value."""
    if labels.numel() == 0:
        return labels.new_zeros((*labels.shape[:-2], *size))
    flat = labels.reshape(-1, *labels.shape[-2:])
    return F.resize_image(flat, list(size), InterpolationMode.NEAREST_EXACT).reshape(*labels.shape[:-2], *size)


def resize_objects(image: torch.Tensor, target: dict, side: float, max_side: float) -> tuple[torch.Tensor, dict]:
    height, width = image.shape[-2:]
    size = fitted(height, width, side, max_side)
    scale = torch.tensor([size[1] / width, size[0] / height] * 2, dtype=torch.float32)
    masks = target["masks"]
    masks = None if masks is None else resize_labels(masks, size)
    return resize_image(image, size), {**target, "boxes": target["boxes"] * scale, "masks": masks}


def flip_objects(image: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    masks = target["masks"]
    return F.horizontal_flip_image(image), {
        **target,
        "boxes": torch.stack([width - right, top, width - left, bottom], 1),
        "masks": None if masks is None else masks.flip(-1),
    }


def crop_objects(
    image: torch.Tensor, target: dict, top: int, left: int, height: int, width: int
) -> tuple[torch.Tensor, dict]:
    """A rectangle of the image. Boxes are cut to it; objects of which less than a pixel a side is left are gone."""
    shift = torch.tensor([left, top] * 2, dtype=torch.float32)
    most = torch.tensor([width, height] * 2, dtype=torch.float32)
    boxes = torch.minimum((target["boxes"] - shift).clamp(min=0), most)
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    masks = target["masks"]
    return image[:, top : top + height, left : left + width], {
        **target,
        "boxes": boxes[keep],
        "labels": target["labels"][keep],
        "masks": None if masks is None else masks[keep, top : top + height, left : left + width],
    }


def distort(image: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """mmseg's PhotoMetricDistortion, uint8 (3, H, W): brightness +-32, contrast and saturation 0.5-1.5, hue +-18 of
    180, each with probability 1/2, contrast before or after the colours."""
    pixels = image.permute(1, 2, 0).numpy()
    if rng.random() < 0.5:
        pixels = _levels(pixels, 1, rng.uniform(-32, 32))
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else None
    first = rng.random() < 0.5
    if contrast is not None and first:
        pixels = _levels(pixels, contrast, 0)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1
    hue = rng.randint(-18, 17) if rng.random() < 0.5 else 0
    if saturation != 1 or hue:
        hsv = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _levels(hsv[..., 1], saturation, 0)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + hue) % 180
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if contrast is not None and not first:
        pixels = _levels(pixels, contrast, 0)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _levels(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def pad_colour(*shape: int) -> torch.Tensor:
    """uint8 (..., 3, H, W) of the padding's colour."""
    return torch.tensor(PAD, dtype=torch.uint8)[:, None, None].expand(*shape).clone()


def collate(samples: Sequence[tuple[torch.Tensor, Any]], multiple: int = 32) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """A padded batch: images uint8 (N, 3, H, W), their true (height, width) int64 (N, 2), and targets.

    H and W are the largest, rounded up to ``multiple``. Label maps become one int64 tensor (N, H, W), 255 where there
    is no image; dicts a list.
    """
    images, targets = zip(*samples)
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-int(length) // multiple) * multiple for length in sizes.amax(0))
    batch = pad_colour(len(images), 3, height, width)
    for place, (image, (h, w)) in enumerate(zip(images, sizes.tolist())):
        batch[place, :, :h, :w] = image
    if isinstance(targets[0], dict):
        return batch, sizes, list(targets)
    labels = torch.full((len(images), height, width), IGNORED)
    for place, label in enumerate(targets):
        labels[place, : label.shape[0], : label.shape[1]] = label
    return batch, sizes, labels
