"""RandAugment on the device, a whole batch at a time: for machines whose processors cannot feed their accelerators.

`DeviceRandAugment` draws and carries out. Where loader workers draw, `encode` makes numbers of their choices, and
`DeviceAugment` carries these out and reduces the batch. Pixels equal those of the operations on single images to 0.25
levels of 255 on average.
"""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from curriculum.augment import Operation, RandAugment
from curriculum.operators import downsample

Counts = dict[str, int]
Step = Callable[[torch.Tensor, torch.Tensor, Counts, Sequence[int]], torch.Tensor]
Work = tuple[Step, tuple[int, int], Counts]

GREY = (0.299, 0.587, 0.114)
HAIR = 1e-3  # whole numbers that arithmetic in float32 leaves a hair below themselves must not be truncated


class DeviceRandAugment(RandAugment):
    """:class:`RandAugment` of whole batches: settings and draws are the same, the work is done on the images' device.

    >>> images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    >>> DeviceRandAugment()(images, 9.0, random.Random(0)).shape
    torch.Size([8, 3, 64, 64])
    """

    def __call__(self, images: torch.Tensor, magnitude: float, rng: random.Random) -> torch.Tensor:
        """Returns uint8 images (N, 3, H, W) augmented at ``magnitude`` (0-10); ``rng`` draws for one after the other.

        Raises:
            ValueError: other images, or a magnitude outside [0, 10].
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"RandAugment takes uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}: augment them "
                "before they are normalised"
            )
        drawn = [encode(False, self.draw(magnitude, rng), self.num_ops) for _ in images]
        return carry_out(images, np.stack(drawn), self.fill) if drawn else images


class DeviceAugment:
    """Flips, applies the operations of each image that loader workers drew, and reduces the batch to B."""

    def __init__(self, operator: str, fill: Sequence[int]):
        self.operator = operator
        self.fill = tuple(fill)

    def __call__(self, images: torch.Tensor, choices: torch.Tensor, size: int) -> torch.Tensor:
        """Returns uint8 (N, 3, B, B), or as large as they come under ``fourier``.

        Args:
            images: uint8 (N, 3, S, S) on any device. choices: float64 (N, 1 + 2 slots) on the CPU, from `encode`.
            size: input size B.
        """
        x = carry_out(images, choices.numpy(), self.fill)
        return x if self.operator == "fourier" else downsample(x, size, self.operator)


def carry_out(images: torch.Tensor, choices: np.ndarray, fill: Sequence[int]) -> torch.Tensor:
    """The images (uint8, (N, 3, H, W)) after their choices (N, 1 + 2 slots).

    What is to be done goes to the device in one copy per batch, so the host never waits.
    """
    rows, work = arrange(choices, *images.shape[-2:])
    x = images.to(torch.float32, memory_format=torch.contiguous_format)
    if work:
        numbers = torch.from_numpy(rows)
        if x.is_cuda:
            numbers = numbers.pin_memory()
        numbers = numbers.to(x.device, non_blocking=x.is_cuda)
        places = numbers[:, 0].long()
        for step, (first, last), counts in work:
            where = places[first:last]
            x[where] = step(x.index_select(0, where), numbers[first:last, 1:], counts, fill)
    return x.to(torch.uint8)


def encode(flip: bool, operations: Sequence[Operation], slots: int) -> np.ndarray:
    """One image's choices as float64 (1 + 2 slots): whether to flip, then each operation's number and argument."""
    choices = np.full(1 + 2 * slots, -1.0)
    choices[0] = flip
    for slot, (name, args) in enumerate(operations):
        choices[1 + 2 * slot : 3 + 2 * slot] = NAMES.index(name), args[0] if args else 0.0
    return choices


def arrange(
    choices: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, list[tuple[Step, tuple[int, int], Counts]]]:
    """A batch's choices (N, 1 + 2 slots) in the order in which they are carried out.

    Returns:
        float32 (rows, 8): the image's place, the operation's argument, a warp's matrix; and for each step its rows and
        how many of them belong to each operation, in order.
    """
    flipped = np.flatnonzero(choices[:, 0] > 0)
    blocks, work, end = [_block(flipped)], [(_flip, (0, len(flipped)), {})] * bool(len(flipped)), len(flipped)
    for slot in range(1, choices.shape[1], 2):
        kinds = choices[:, slot].astype(int)
        for names, step in STEPS:
            numbers = [NAMES.index(name) for name in names]
            places = np.flatnonzero(np.isin(kinds, numbers))
            if not len(places):
                continue
            places = places[np.argsort(kinds[places], kind="stable")]
            block = _block(places, choices[places, slot + 1])
            counts = {name: int((kinds[places] == number).sum()) for name, number in zip(names, numbers)}
            if step is _warp:
                block[:, 2:] = _matrices(np.array(NAMES)[kinds[places]], choices[places, slot + 1], height, width)
            blocks.append(block)
            work.append((step, (end, end + len(places)), counts))
            end += len(places)
    return np.concatenate(blocks), work


def _block(places: np.ndarray, values: np.ndarray | float = 0.0) -> np.ndarray:
    block = np.zeros((len(places), 8), np.float32)
    block[:, 0], block[:, 1] = places, values
    return block


@lru_cache(maxsize=32)
def _constant(values: tuple[float, ...], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """float32 values on the device; copied there once, for such a copy waits."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(shape)


# Each step takes float (n, 3, H, W) of whole levels; for each of the images the operation's argument and a warp's
# matrix, (n, 7); how many images belong to each operation, in order; and the fill colour.


def _flip(x: torch.Tensor, numbers: torch.Tensor, counts: Counts, fill: Sequence[int]) -> torch.Tensor:
    return x.flip(-1)


def _look_up(x: torch.Tensor, numbers: torch.Tensor, counts: Counts, fill: Sequence[int]) -> torch.Tensor:
    """Operations that map levels to levels, by a table per image and channel."""
    levels = _constant(tuple(range(256)), (1, 1, 256), x.device)
    sizes = list(counts.values())
    parts = zip(counts, x.split(sizes), numbers[:, :1, None].split(sizes))
    tables = [TABLES[name](part, values, levels).expand(len(part), 3, 256) for name, part, values in parts if len(part)]
    return (torch.cat(tables) + HAIR).floor().clamp_(0, 255).gather(2, x.flatten(2).long()).view_as(x)


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


def _blend(x: torch.Tensor, numbers: torch.Tensor, counts: Counts, fill: Sequence[int]) -> torch.Tensor:
    """Colour and sharpness: away from or towards the grey or the smoothed image."""
    sharpened = counts["SharpnessIncreasing"]  # which come last
    coloured = len(x) - sharpened
    other = torch.cat((_grey(x[:coloured]).expand(-1, 3, -1, -1), _smooth(x[coloured:])))
    return (other + numbers[:, 0].view(-1, 1, 1, 1) * (x - other) + HAIR).floor().clamp_(0, 255)


def _grey(x: torch.Tensor) -> torch.Tensor:
    return ((x * _constant(GREY, (1, 3, 1, 1), x.device)).sum(1, keepdim=True) + 0.5).floor()


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """PIL's SMOOTH: 3 x 3, rounded; the border stays as it is."""
    out = x.clone()
    if min(x.shape[-2:]) > 2:
        inner = 9 * F.avg_pool2d(x, 3, stride=1) + 4 * x[..., 1:-1, 1:-1]
        out[..., 1:-1, 1:-1] = (inner / 13 + 0.5).floor()
    return out


def _warp(x: torch.Tensor, numbers: torch.Tensor, counts: Counts, fill: Sequence[int]) -> torch.Tensor:
    """Rotation, shear and translation: cubic interpolation with the edge repeated, ``fill`` from outside."""
    # In units where the image is [-1, 1], and by sums: the product of matrices in affine_grid may be in TF32.
    down, right = ((2 * torch.arange(n, device=x.device) + 1) / n - 1 for n in x.shape[-2:])
    a, b, c, d, e, f = numbers[:, 1:, None, None].unbind(1)
    grid = torch.stack((a * right + b * down[:, None] + c, d * right + e * down[:, None] + f), -1)
    warped = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1).unsqueeze(1)
    return torch.where(inside, (warped + HAIR).floor().clamp_(0, 255), _constant(fill, (1, 3, 1, 1), x.device))


def _matrices(names: np.ndarray, values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, 6): where a pixel comes from, in units where the image is [-1, 1]: x' = a x + b y + c, y' = d x + e y + f."""
    a, b, c, d, e, f = matrices = np.tile(np.array([[1.0], [0], [0], [0], [1], [0]]), len(names))
    turned = names == "Rotate"
    cos, sin = np.cos(np.radians(values)), np.sin(np.radians(values))
    a[turned], b[turned] = cos[turned], (-sin * height / width)[turned]
    d[turned], e[turned] = (sin * width / height)[turned], cos[turned]
    c[:] = np.where(names == "TranslateXRel", 2 * values, 0)
    f[:] = np.where(names == "TranslateYRel", 2 * values, 0)
    # PIL shears about the upper left corner, which lies at (-1, -1) here.
    for name, slope, shift, ratio in (("ShearX", b, c, height / width), ("ShearY", d, f, width / height)):
        sheared = names == name
        slope[sheared] = shift[sheared] = ratio * values[sheared]
    return matrices.T


STEPS: tuple[tuple[tuple[str, ...], Step], ...] = (
    (tuple(TABLES), _look_up),
    (("Color", "ColorIncreasing", "SharpnessIncreasing"), _blend),
    (("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"), _warp),
)
NAMES = [name for names, _ in STEPS for name in names]
