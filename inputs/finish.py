"""What happens to a batch on the device: normalising, erasing, the spectrum crop, mixing."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from curriculum.operators import low_frequency_crop, low_pass
from inputs.transfer import send

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Random erasing, as timm's defaults: share of the image's area, and height / width.
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)

Box = tuple[int, int, int, int]  # top, left, bottom, right, in pixels


class Finish:
    """Turns uint8 batches into what the model takes, on whatever device they lie.

    Order: normalise; under the operator ``fourier`` erase at the base size and then crop the spectrum, else erase at B;
    low-pass filter where the curriculum says so; then mixup or cutmix. Erasing (per-pixel noise) and mixing (one lambda
    and box per group) have the distributions of timm's `RandomErasing` and `Mixup`, and for a seed make the choices
    that these make. They act on groups of consecutive images and are seeded by the group, so they depend neither on how
    many groups a forward pass takes nor on any global generator. All choices of a pass go to the device in one copy,
    and the number of kernels depends on the number of groups alone.

    Args:
        num_classes: of the soft targets.
        mean, std: per channel, for pixels in [0, 1].
        operator: the curriculum's; only ``fourier`` matters here.
        base_size: the size of incoming images under ``fourier``.
        erasing: probability per image. mixup, cutmix: their alphas, 0 is off; both 0: no mixing, integer targets.
        mixup_prob: probability that a group is mixed. switch_prob: of cutmix, where both are on.
        smoothing: label smoothing of the soft targets. Integer targets are smoothed by the loss instead.
        channels_last: the memory format of the images that are returned.
    """

    def __init__(
        self,
        num_classes: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        operator: str = "lanczos",
        base_size: int = 224,
        erasing: float = 0.25,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mixup_prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.1,
        channels_last: bool = False,
    ):
        self.fourier = operator == "fourier"
        self.base_size = base_size
        self.erasing = erasing
        self.mean = tuple(255 * value for value in mean)
        self.scale = tuple(1 / (255 * value) for value in std)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.alphas = (mixup, cutmix)
        self.mixup_prob, self.switch_prob = mixup_prob, switch_prob
        self.smoothing, self.num_classes = smoothing, num_classes

    def train(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        size: int,
        seeds: Sequence[int],
        group_size: int,
        radius: float | None = None,
        mixing: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Finishes a training batch of ``len(seeds)`` groups.

        Args:
            images: uint8 (N, 3, S, S), S the base size under ``fourier``, else ``size``. targets: int64 (N,), or
                float (N, classes) of images with several labels, which are mixed as they are (no smoothing).
            size: input size B. seeds: one per group. group_size: images per group.
            radius: of the disc that is kept of the spectrum, cycles per image side; None keeps all of it.
            mixing: factor on both alphas; 0: no mixing.
        Returns:
            float32 images (N, 3, size, size), and soft targets (N, num_classes), or those given without mixing.
        Raises:
            ValueError: N is not len(seeds) * group_size, groups are odd while images are mixed, or S is not as said.
        """
        if len(images) != len(seeds) * group_size:
            raise ValueError(f"{len(images)} images are not {len(seeds)} groups of {group_size}")
        alphas = [mixing * alpha for alpha in self.alphas]
        if any(alphas) and group_size % 2:
            raise ValueError(
                f"--micro_batch gives groups of {group_size} images: mixup and cutmix pair them, so it must be even "
                "(or set --mixup 0 --cutmix 0)"
            )
        self._check_size(images, size)
        erased = draw_erasing(self.erasing, seeds, group_size, images.shape[-2:])
        mixed = draw_mixing(alphas, self.mixup_prob, self.switch_prob, seeds, (size, size)) if any(alphas) else []
        # Rows of six numbers: what is erased, then how each group is mixed.
        rows = [(*box, place, 0) for group in erased for place, box in group]
        rows += [(*box, pixels, labels) for box, pixels, labels in mixed]
        choices = send(torch.tensor(rows, dtype=torch.float32), images.device) if rows else None
        images = self.normalise(images)
        if count := sum(map(len, erased)):
            noise = noise_like(images, [len(group) for group in erased], seeds)
            erase(images, choices[:count], noise)
        if self.fourier:
            images = self._crop_spectrum(images, size)
        if radius is not None:
            images = self._low_pass(images, radius)
        if mixed:
            targets = targets if targets.is_floating_point() else self._soft(targets)
            mix(images, targets, choices[count:])
        return images, targets

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of the normalization: float (N, 3, S, S) -> uint8, clipped, for people to look at."""
        mean, scale = (_per_channel(values, images.device) for values in (self.mean, self.scale))
        return (images / scale + mean).round().clamp(0, 255).to(torch.uint8)

    def evaluate(self, images: torch.Tensor, size: int, radius: float | None = None) -> torch.Tensor:
        """uint8 (N, 3, S, S) -> float32 (N, 3, size, size): normalised, reduced under ``fourier``, filtered.

        Args:
            radius: of the low-pass filter, as in :meth:`train`.

        Raises:
            ValueError: S is neither ``size`` nor, under ``fourier``, the base size.
        """
        if images.shape[-2:] != (size, size):
            self._check_size(images, size)
        images = self.normalise(images)
        images = self._crop_spectrum(images, size) if self.fourier else images
        return images if radius is None else self._low_pass(images, radius)

    def _crop_spectrum(self, images: torch.Tensor, size: int) -> torch.Tensor:
        return low_frequency_crop(images, size).contiguous(memory_format=self.memory_format)

    def _low_pass(self, images: torch.Tensor, radius: float) -> torch.Tensor:
        return low_pass(images, radius).contiguous(memory_format=self.memory_format)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, S, S) -> float32 of mean 0 and deviation 1 over the data set, per channel."""
        mean, scale = (_per_channel(values, images.device) for values in (self.mean, self.scale))
        return images.to(torch.float32, memory_format=self.memory_format).sub_(mean).mul_(scale)

    def _soft(self, targets: torch.Tensor) -> torch.Tensor:
        """int64 (N,) -> float32 (N, num_classes), smoothed."""
        low = self.smoothing / self.num_classes
        soft = torch.full((len(targets), self.num_classes), low, device=targets.device)
        return soft.scatter_(1, targets[:, None], 1 - self.smoothing + low)

    def _check_size(self, images: torch.Tensor, size: int) -> None:
        expected = self.base_size if self.fourier else size
        if images.shape[-2:] != (expected, expected):
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]}: input size {size} needs {expected}x{expected} here"
            )


def draw_erasing(
    probability: float, seeds: Sequence[int], group_size: int, size: Sequence[int]
) -> list[list[tuple[int, Box]]]:
    """For each group, the images of the pass that are erased, by place, and where: timm's choices for its seed."""
    height, width = size
    log_ratio = [math.log(ratio) for ratio in ERASED_RATIO]
    groups = []
    for number, seed in enumerate(seeds):
        rng, group = random.Random(seed), []
        for place in range(number * group_size, (number + 1) * group_size):
            if probability == 0 or rng.random() > probability:
                continue
            for _ in range(10):
                area = rng.uniform(*ERASED_AREA) * height * width
                ratio = math.exp(rng.uniform(*log_ratio))
                h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if h < height and w < width:
                    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                    group.append((place, (top, left, top + h, left + w)))
                    break
        groups.append(group)
    return groups


def draw_mixing(
    alphas: Sequence[float], probability: float, switch: float, seeds: Sequence[int], size: Sequence[int]
) -> list[tuple[Box, float, float]]:
    """For each group, a box and the partner's share of its pixels and of the labels: timm's choices for its seed.

    Mixup blends whole images (the shares are 1 - lambda), cutmix replaces a box (1, and the box's share of the image).
    """
    height, width = size
    mixup, cutmix = alphas
    groups = []
    for seed in seeds:
        rng = np.random.RandomState(seed % 2**32)
        box, pixels, labels = (0, 0, height, width), 0.0, 0.0
        if rng.rand() < probability:
            cuts = rng.rand() < switch if mixup and cutmix else bool(cutmix)
            alpha = cutmix if cuts else mixup
            pixels = labels = 1.0 - rng.beta(alpha, alpha)
            if cuts and labels:
                h, w = int(height * math.sqrt(labels)), int(width * math.sqrt(labels))
                y, x = rng.randint(height), rng.randint(width)
                box = (
                    max(0, y - h // 2),
                    max(0, x - w // 2),
                    min(height, y + (h + 1) // 2),
                    min(width, x + (w + 1) // 2),
                )
                pixels, labels = 1.0, (box[2] - box[0]) * (box[3] - box[1]) / (height * width)
        groups.append((box, pixels, labels))
    return groups


def noise_like(images: torch.Tensor, counts: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """Standard normal (sum of counts, 3, S, S), ``counts[k]`` images by ``seeds[k]``, whatever the memory format."""
    noise = torch.empty(sum(counts), *images.shape[1:], device=images.device)
    for part, seed in zip(noise.split(list(counts)), seeds):
        if len(part):
            part.normal_(generator=seeded(images.device, seed))
    return noise


def erase(images: torch.Tensor, rows: torch.Tensor, noise: torch.Tensor) -> None:
    """Puts ``noise`` (n, 3, S, S) into the boxes ``rows[:, :4]`` of the images at the places ``rows[:, 4]``."""
    places = rows[:, 4].long()
    images[places] = torch.where(inside(rows, images.shape[-2:]), noise, images.index_select(0, places))


def mix(images: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> None:
    """Blends the images and soft targets of each group, a row each, with those of the same group in reverse order."""
    groups, labels = images.unflatten(0, (len(rows), -1)), targets.unflatten(0, (len(rows), -1))
    share = inside(rows, images.shape[-2:]) * rows[:, 4].view(-1, 1, 1, 1)
    groups.lerp_(groups.flip(1), share[:, None])
    labels.lerp_(labels.flip(1), rows[:, 5].view(-1, 1, 1))


def inside(rows: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """bool (n, 1, H, W): the pixels in the boxes (top, left, bottom, right) with which the rows begin."""
    height, width = size
    place = torch.arange(max(size), device=rows.device)
    between = (place >= rows[:, :2, None]) & (place < rows[:, 2:4, None])  # both axes at once: few kernels
    return (between[:, 0, :height, None] & between[:, 1, None, :width])[:, None]


@lru_cache(maxsize=8)
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """A generator of this module's own on the device, at the beginning of the seed's stream."""
    return _generator(device).manual_seed(seed)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(1, channels, 1, 1) on the device; copied there once, for such a copy waits."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
