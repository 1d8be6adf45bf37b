"""What happens to one image in a loader worker: crop, flip, augmentation, reduction to the input size B."""

import math
import random
from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate

from curriculum.augment import Operation, RandAugment
from curriculum.operators import downsample
from inputs.decode import BadImage, decode, decode_reduced, image_pixels, jpeg_size
from inputs.warps import apply_operations

INTERPOLATIONS = ("bicubic", "bilinear")
# From here on evaluation squashes the whole image to a square, as ConvNeXt's and the papers' code does.
SQUASH_FROM = 384
# Evaluation enlarges images of this many times their short side only where the crop will be: the whole of 20000 x 1
# pixels would take 5 GB.
THIN = 4
# The fast pipeline decodes at the smallest scale (1, 1/2, 1/4, 1/8) that leaves this many times B pixels in the crop.
FAST_OVERSAMPLING = 1.5


class TrainTransform:
    """Random resized crop at the base size, flip, colour jitter, RandAugment, then reduction to B.

    The order is that of both papers' code. Under the operator ``fourier`` the result stays at the base size: the device
    crops the spectrum (`inputs.finish.Finish`). Everything random comes from the seed of the sample: the same arguments
    give the same pixels, and no global generator is read or changed.

    The pipeline ``exact`` differs from PIL's operations in that order by less than 0.25 levels (of 255) on average. The
    pipeline ``fast`` makes the same random choices, but lets the JPEG decoder reduce (the crop keeps at least 1.5 times
    the pixels it needs), resizes once, straight to B, and augments there: 3.9, 2.4 and 0.2 levels off at 96, 160 and
    224 on photographs (`scripts/bench.py input`), with a fifth to a quarter less of the highest frequencies at 96.

    Args:
        base_size: the full input size, at which images are cropped and augmented.
        operator: how images are reduced to B, one of `curriculum.operators.OPERATORS`.
        randaugment: None for none.
        scale: range of the crop's area as a share of the image's. ratio: range of its width / height.
        flip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation are scaled by factors from [1 - c, 1 + c], in random order.
        interpolation: of the resized crop, ``bicubic`` or ``bilinear``, both antialiased, as PIL's; ``random``: one of
            them for each image.
        pipeline: ``exact`` or ``fast``.

    Ranges are those of the settings (`config.checks`), and are checked there.
    """

    def __init__(
        self,
        base_size: int,
        operator: str,
        randaugment: RandAugment | None,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        color_jitter: float = 0.0,
        interpolation: str = "bicubic",
        pipeline: str = "exact",
    ):
        self.base_size = base_size
        self.operator = operator
        self.randaugment = randaugment
        self.scale = tuple(scale)
        self.ratio = tuple(ratio)
        self.flip = flip
        self.color_jitter = color_jitter
        self.interpolation = interpolation
        self.pipeline = pipeline
        self.fill = randaugment.fill if randaugment else (0, 0, 0)

    def __call__(self, data: bytes | Image.Image, size: int, magnitude: float | None, seed: int) -> torch.Tensor:
        """Returns uint8 (3, S, S), S = ``size``, or the base size under ``fourier``.

        Args:
            data: content of an image file, or a PIL image.
            size: input size B, at most the base size.
            magnitude: RandAugment's, 0-10; None for no RandAugment.
            seed: of the sample.
        Raises:
            BadImage: the content cannot be decoded.
            ValueError: the size is above the base size.
        """
        pixels, flip, operations = self.crop(data, size, magnitude, seed)
        if flip:
            pixels = cv2.flip(pixels, 1)
        pixels = apply_operations(pixels, operations, self.fill)
        return as_batch(pixels)[0] if self.operator == "fourier" else reduce(pixels, size, self.operator)

    def crop(
        self, data: bytes | Image.Image, size: int, magnitude: float | None, seed: int
    ) -> tuple[np.ndarray, bool, list[Operation]]:
        """The part that needs the image file: (uint8 (S, S, 3), whether to flip, operations), all random choices made.

        S is the size at which images are augmented: the base size, or B in the fast pipeline. Arguments and exceptions
        are those of calling the transform.
        """
        if not 0 < size <= self.base_size:
            raise ValueError(f"size is {size}: a training image is at most at the base size, {self.base_size}")
        rng = random.Random(seed)
        side = size if self.pipeline == "fast" and self.operator != "fourier" else self.base_size
        full = jpeg_size(data) if self.pipeline == "fast" and isinstance(data, bytes) else None
        pixels = None if full else to_pixels(data)
        top, left, height, width = crop_box(*(full or pixels.shape[:2]), self.scale, self.ratio, rng)
        step = 1
        if full:
            while step < 8 and min(height, width) >= 2 * step * FAST_OVERSAMPLING * side:
                step *= 2
            pixels = decode_reduced(data, step)
        rows = slice(top // step, -(-(top + height) // step))
        columns = slice(left // step, -(-(left + width) // step))
        interpolation = rng.choice(INTERPOLATIONS) if self.interpolation == "random" else self.interpolation
        pixels = resize(pixels[rows, columns], side, interpolation)
        return pixels, rng.random() < self.flip, self.draw_operations(magnitude, rng)

    def draw_operations(self, magnitude: float | None, rng: random.Random) -> list[Operation]:
        """The colour and geometry operations of one image: jitter, then RandAugment."""
        operations = []
        if self.color_jitter:
            span = (1 - self.color_jitter, 1 + self.color_jitter)
            operations = [(name, (rng.uniform(*span),)) for name in ("Brightness", "Contrast", "Color")]
            rng.shuffle(operations)
        if self.randaugment is not None and magnitude is not None:
            operations += self.randaugment.draw(magnitude, rng)
        return operations


class EvalTransform:
    """The centre of an image at the base size, reduced to B by the training operator.

    The short side becomes base / crop_pct (bicubic) and the centre base x base is cut out; from a base size of 384 the
    whole image is squashed to that instead. Under ``fourier`` the result stays there: the device crops the spectrum.

    Raises:
        ValueError: a size above the base size.
    """

    def __init__(self, base_size: int, size: int, operator: str, crop_pct: float = 0.875):
        if not 0 < size <= base_size:
            raise ValueError(f"size is {size}: images are reduced from the base size, {base_size}")
        self.base_size = base_size
        self.size = size
        self.operator = operator
        self.crop_pct = crop_pct

    def __call__(self, data: bytes | Image.Image) -> torch.Tensor:
        """Returns uint8 (3, S, S), S = ``size``, or the base size under ``fourier``.

        Raises:
            BadImage: the content cannot be decoded.
        """
        pixels = to_pixels(data)
        base = self.base_size
        if base >= SQUASH_FROM:
            pixels = resize(pixels, base, "bicubic")
        else:
            height, width = pixels.shape[:2]
            short = round(base / self.crop_pct)
            # The long side is truncated, as torchvision's Resize does.
            long = int(short * max(height, width) / min(height, width))
            if long > THIN * short:
                return self._finish(thin_crop(pixels, base, short, long))
            height, width = (short, long) if height <= width else (long, short)
            pixels = resize(pixels, (height, width), "bicubic")
            top, left = round((height - base) / 2), round((width - base) / 2)
            pixels = pixels[top : top + base, left : left + base]
        return self._finish(pixels)

    def _finish(self, pixels: np.ndarray) -> torch.Tensor:
        return as_batch(pixels)[0] if self.operator == "fourier" else reduce(pixels, self.size, self.operator)


def crop_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], rng: random.Random
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: the distribution of torchvision's RandomResizedCrop.get_params."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    # Ten misses (very long pictures): the largest centred crop whose ratio is allowed.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: np.ndarray, size: int | tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3), antialiased, up or down; within a level of PIL's resize."""
    height, width = (size, size) if isinstance(size, int) else size
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    out = F.interpolate(as_batch(pixels), (height, width), mode=interpolation, antialias=True)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def thin_crop(pixels: np.ndarray, base: int, short: int, long: int) -> np.ndarray:
    """The centre base x base of uint8 (H, W, 3) resized to sides ``short`` and ``long``, without resizing the rest.

    Within a level of doing so: along the long side the same bicubic weights (a = -0.5, as PIL's) are summed for the
    positions that the crop shows alone, and rows are still resized before columns.
    """
    tall = pixels.shape[0] > pixels.shape[1]
    length = max(pixels.shape)
    scale = length / long
    stretch = max(scale, 1.0)
    centres = (round((long - base) / 2) + np.arange(base) + 0.5) * scale
    first, last = max(int(centres[0] - 2 * stretch), 0), min(int(centres[-1] + 2 * stretch) + 1, length)
    x = np.abs(np.arange(first, last) + 0.5 - centres[:, None]) / stretch
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    def along(window: np.ndarray) -> np.ndarray:
        """(last - first, N, 3) -> (base, N, 3)."""
        return np.tensordot(weights, window.astype(np.float32), 1).round().clip(0, 255).astype(np.uint8)

    place = round((short - base) / 2)
    if tall:
        window = resize(np.ascontiguousarray(pixels[first:last]), (last - first, short), "bicubic")
        return along(window[:, place : place + base])
    window = along(pixels[:, first:last].swapaxes(0, 1)).swapaxes(0, 1)
    return resize(np.ascontiguousarray(window), (short, base), "bicubic")[place : place + base]


def reduce(pixels: np.ndarray, size: int, operator: str) -> torch.Tensor:
    """uint8 (H, W, 3) -> (3, size, size) by the curriculum's operator."""
    return downsample(as_batch(pixels), size, operator)[0]


def to_pixels(data: bytes | Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of a file's content or a PIL image of any mode."""
    if not isinstance(data, Image.Image):
        return decode(data)
    try:
        return image_pixels(data)
    except Exception as error:  # PIL reads lazily, so here is where a broken image shows, with any type of exception
        raise BadImage(f"cannot decode: {' '.join(str(error).split())}") from error


def as_batch(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (1, 3, H, W) on the same memory: what torch calls channels_last, and resizes fastest."""
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def collate(samples: Sequence[tuple]) -> list[torch.Tensor]:
    """As torch's default, but the images, which come first, stay as the transforms leave them: channels_last.

    Their batch is then plain copies; putting every image's channels first would take ten times as long.
    """
    images = default_collate([sample[0].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
    return [images, *default_collate([sample[1:] for sample in samples])]
