"""RandAugment on the device, a whole batch at a time: for machines whose processors cannot feed their accelerators.

Loader workers decode and crop; flip, operations and the reduction to B happen here, with the random choices that the
workers made: `TrainTransform.crop` draws them, `encode` sends them along as numbers, `DeviceAugment` carries them out.
Pixels equal the host's operations (`inputs.warps`) to 0.25 levels of 255 on average.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from curriculum.augment import Operation
from curriculum.operators import downsample
from inputs.transforms import TrainTransform, as_batch

GREY = (0.299, 0.587, 0.114)
HAIR = 1e-3  # whole numbers that arithmetic in float32 leaves a hair below themselves must not be truncated


class DeviceTransform:
    """The loader's share of ``transform``: called like it, returns (uint8 (3, S, S), float64 choices)."""

    def __init__(self, transform: TrainTransform):
        self.transform = transform
        self.slots = 3 * bool(transform.color_jitter) + (transform.randaugment.num_ops if transform.randaugment else 0)

    def __call__(
        self, data: bytes | Image.Image, size: int, magnitude: float | None, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, flip, operations = self.transform.crop(data, size, magnitude, seed)
        return as_batch(pixels)[0], torch.from_numpy(encode(flip, operations, self.slots))


class DeviceAugment:
    """The device's share: flips, applies the operations of each image, and reduces the batch to B."""

    def __init__(self, operator: str, fill: Sequence[int]):
        self.operator = operator
        self.fill = tuple(fill)

    def __call__(self, images: torch.Tensor, choices: torch.Tensor, size: int) -> torch.Tensor:
        """Returns uint8 (N, 3, B, B), or as large as they come under ``fourier``.

        Args:
            images: uint8 (N, 3, S, S) on any device. choices: float64 (N, 1 + 2 slots) on the CPU, from `encode`.
            size: input size B.
        """
        choices = choices.numpy()
        flipped = np.flatnonzero(choices[:, 0])
        x = images.to(torch.float32, memory_format=torch.contiguous_format)
        if len(flipped):
            where = torch.from_numpy(flipped).to(x.device)
            x[where] = x[where].flip(-1)
        for slot in range(1, choices.shape[1], 2):
            for names, apply in STEPS:
                rows = np.flatnonzero(np.isin(choices[:, slot], [NAMES.index(name) for name in names]))
                if len(rows):
                    kinds = [NAMES[int(kind)] for kind in choices[rows, slot]]
                    where = torch.from_numpy(rows).to(x.device)
                    x[where] = apply(x[where], kinds, choices[rows, slot + 1], self.fill)
        x = x.to(torch.uint8)
        return x if self.operator == "fourier" else downsample(x, size, self.operator)


def encode(flip: bool, operations: Sequence[Operation], slots: int) -> np.ndarray:
    """One image's choices as float64 (1 + 2 slots): whether to flip, then each operation's number and argument."""
    choices = np.full(1 + 2 * slots, -1.0)
    choices[0] = flip
    for slot, (name, args) in enumerate(operations):
        choices[1 + 2 * slot : 3 + 2 * slot] = NAMES.index(name), args[0] if args else 0.0
    return choices


# Each step takes float (n, 3, H, W) of whole levels, the operations' names and arguments (n,), and the fill colour.


def _look_up(x: torch.Tensor, names: Sequence[str], values: np.ndarray, fill: Sequence[int]) -> torch.Tensor:
    """Operations that map levels to levels, by a table per image and channel."""
    tables = torch.empty(len(x), 3, 256, device=x.device)
    for name in sorted(set(names)):
        rows = [k for k, other in enumerate(names) if other == name]
        where = torch.tensor(rows, device=x.device)
        arguments = torch.tensor(values[rows], dtype=torch.float32, device=x.device).view(-1, 1, 1)
        levels = torch.arange(256.0, device=x.device).view(1, 1, -1)
        tables[where] = TABLES[name](x[where], arguments, levels).expand(-1, 3, -1)
    tables = (tables + HAIR).floor().clamp_(0, 255)
    return tables.gather(2, x.flatten(2).long()).view_as(x)


def _autocontrast(x: torch.Tensor, _: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    low, high = (extreme.unsqueeze(-1) for extreme in (x.flatten(2).amin(-1), x.flatten(2).amax(-1)))
    span = high - low
    return torch.where(span > 0, (levels - low) * (255 / span.clamp(min=1)), levels)


def _equalize(x: torch.Tensor, _: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    n = len(x)
    place = x.flatten(2).long() + 256 * torch.arange(3 * n, device=x.device).view(n, 3, 1)
    counts = torch.zeros(n * 3 * 256, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, place.flatten(), torch.ones_like(place).flatten()).view(n, 3, 256)
    last = x.flatten(2).amax(-1, keepdim=True).long()
    step = (counts.sum(-1, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(-1) - counts
    return torch.where(step > 0, (step // 2 + below) // step.clamp(min=1), levels.long()).float()


def _posterize(x: torch.Tensor, bits: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels - levels.remainder(2 ** (8 - bits.clamp(0, 8)))


def _contrast(x: torch.Tensor, factor: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    mean = (_grey(x).mean((1, 2, 3)) + 0.5 + HAIR).floor().view(-1, 1, 1)
    return mean + factor * (levels - mean)


TABLES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda x, value, levels: 255 - levels + 0 * value,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": lambda x, threshold, levels: torch.where(levels < threshold, levels, 255 - levels),
    "SolarizeAdd": lambda x, add, levels: torch.where(levels < 128, levels + add, levels),
    "BrightnessIncreasing": lambda x, factor, levels: factor * levels,
    "Brightness": lambda x, factor, levels: factor * levels,
    "ContrastIncreasing": _contrast,
    "Contrast": _contrast,
}


def _blend(x: torch.Tensor, names: Sequence[str], values: np.ndarray, fill: Sequence[int]) -> torch.Tensor:
    """Colour and sharpness: away from or towards the grey or the smoothed image."""
    factor = torch.tensor(values, dtype=torch.float32, device=x.device).view(-1, 1, 1, 1)
    sharpen = torch.tensor([name.startswith("Sharpness") for name in names], device=x.device).view(-1, 1, 1, 1)
    other = torch.where(sharpen, _smooth(x), _grey(x).expand_as(x))
    return (other + factor * (x - other) + HAIR).floor().clamp_(0, 255)


def _grey(x: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(GREY, device=x.device).view(1, 3, 1, 1)
    return ((x * weights).sum(1, keepdim=True) + 0.5).floor()


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """PIL's SMOOTH: 3 x 3, rounded; the border stays as it is."""
    out = x.clone()
    if min(x.shape[-2:]) > 2:
        inner = 9 * F.avg_pool2d(x, 3, stride=1) + 4 * x[..., 1:-1, 1:-1]
        out[..., 1:-1, 1:-1] = (inner / 13 + 0.5).floor()
    return out


def _warp(x: torch.Tensor, names: Sequence[str], values: np.ndarray, fill: Sequence[int]) -> torch.Tensor:
    """Rotation, shear and translation: cubic interpolation with the edge repeated, ``fill`` from outside."""
    height, width = x.shape[-2:]
    matrices = np.stack([_matrix(name, value, height, width) for name, value in zip(names, values)])
    theta = torch.tensor(matrices, dtype=torch.float32, device=x.device)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # in units where the image is [-1, 1]
    warped = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1).unsqueeze(1)
    colour = torch.tensor(fill, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    return torch.where(inside, (warped + HAIR).floor().clamp_(0, 255), colour)


def _matrix(name: str, value: float, height: int, width: int) -> np.ndarray:
    """(2, 3): where a pixel comes from, in units where the image is [-1, 1]."""
    if name == "Rotate":
        cos, sin = np.cos(np.radians(value)), np.sin(np.radians(value))
        return np.array([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    x, y = (value, 0.0) if "X" in name else (0.0, value)
    if name.startswith("Translate"):
        return np.array([[1, 0, 2 * x], [0, 1, 2 * y]])
    # PIL shears about the upper left corner, which lies at (-1, -1) here.
    x, y = x * height / width, y * width / height
    return np.array([[1, x, x], [y, 1, y]])


STEPS: tuple[tuple[tuple[str, ...], Callable[..., torch.Tensor]], ...] = (
    (tuple(TABLES), _look_up),
    (("Color", "ColorIncreasing", "SharpnessIncreasing"), _blend),
    (("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"), _warp),
)
NAMES = [name for names, _ in STEPS for name in names]
