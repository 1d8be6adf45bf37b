"""Histograms of oriented gradients (HOG) as MaskFeat predicts them, on any device, and as pictures."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

BINS = 9
CELL = 8  # pixels a side
WINDOW = 16  # of the Gaussian that weighs the gradients, repeated over the image


def hog(images: torch.Tensor) -> torch.Tensor:
    """The target features of MaskFeat (Wei et al. 2022, Section 3.2): each channel's HOG.

    Gradients are Sobel's on the image continued by reflection. They are weighed by a Gaussian of deviation 8 in each
    window of 16 x 16 pixels, which for patches of 16 pixels is the patch.

    Args:
        images: float (N, C, H, W); H and W are multiples of 8. A factor and an offset per channel change nothing, so
            they may be normalised.

    Returns:
        float (N, C, 9, H / 8, W / 8): the histogram of each cell, of length 1 (or 0 where the cell is flat).

    Raises:
        ValueError: H or W is no multiple of 8.
    """
    height, width = images.shape[-2:]
    if height % CELL or width % CELL:
        raise ValueError(f"images of {height} x {width} pixels have no whole cells of {CELL} pixels")
    place = torch.arange(max(height, width), device=images.device) % WINDOW - (WINDOW - 1) / 2
    weight = torch.exp(-0.5 * (place / (WINDOW / 2)) ** 2)
    weight = weight[:height, None] * weight[:width]
    along_x, along_y = sobel(images)
    return histograms(along_x * weight, along_y * weight)


def sobel(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sobel's derivatives along x and y of float (N, C, H, W), of the same shape; beyond the border it is reflected."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]


def histograms(along_x: torch.Tensor, along_y: torch.Tensor) -> torch.Tensor:
    """Gradients (N, C, H, W) -> (N, C, 9, H / 8, W / 8): magnitudes by unsigned direction, of length 1 in each cell.

    Directions are measured from the y axis (MaskFeat's convention), so those of horizontal and of vertical edges are in
    the middle and on the edge of a bin.
    """
    size = torch.hypot(along_x, along_y)
    bins = (torch.atan2(along_x, along_y) / math.pi * BINS).floor().long() % BINS
    cells = [_by_cell(values) for values in (size, bins)]
    sums = torch.zeros(*cells[0].shape[:-1], BINS, dtype=size.dtype, device=size.device)
    return F.normalize(sums.scatter_add_(-1, cells[1], cells[0]), dim=-1).movedim(-1, 2)


def _by_cell(values: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, H / 8, W / 8, 64)."""
    return values.unfold(-2, CELL, CELL).unfold(-2, CELL, CELL).flatten(-2)


def hog_picture(features: torch.Tensor) -> torch.Tensor:
    """Features (N, C, 9, h, w) -> uint8 (N, 3, 8 h, 8 w): in each cell a line along the edges of each direction.

    A line is as bright as its bin is full, on average over the channels.
    """
    weights = features.mean(1).clamp(0, 1)
    drawn = torch.einsum("nbhw,byx->nhywx", weights, _lines().to(weights))
    drawn = (drawn.clamp(0, 1) * 255).round().to(torch.uint8)
    return drawn.flatten(3).flatten(1, 2)[:, None].expand(-1, 3, -1, -1)


def _lines() -> torch.Tensor:
    """(9, 8, 8): a line through the middle of a cell for each bin, at right angles to its gradients."""
    place = torch.arange(CELL) - (CELL - 1) / 2
    y, x = torch.meshgrid(place, place, indexing="ij")
    angles = (torch.arange(BINS) + 0.5) * math.pi / BINS  # of the gradient (sin, cos), from the y axis
    distance = x * angles.sin()[:, None, None] + y * angles.cos()[:, None, None]
    return (1 - distance.abs()).clamp(min=0)
