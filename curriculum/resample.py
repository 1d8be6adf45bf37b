"""Resample position embeddings, bias tables, and an optimizer's moments of them, from one grid to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def resample(
    tensor: torch.Tensor, old_shape: Sequence[int], new_shape: Sequence[int], scale: float | None = None
) -> torch.Tensor:
    """Resample a tensor of position embeddings or biases from one grid to another.

    Layouts, told apart by which axes differ: (1, P + g^2, D) with P class or register tokens in front, which are kept;
    (r^2 + E, heads), a bias table whose last E rows (BEiT's class tokens) are kept; (..., g^2, ...); (..., g, g, ...);
    (2 g - 1, D), one axis of a decomposed bias table. A length that can be read in several ways is read as the one that
    follows `scale`.

    Args:
        tensor: of shape `old_shape`.
        new_shape: as many axes, other lengths on one axis or on two neighbouring ones.
        scale: new input size / old input size.

    Returns:
        Tensor of `new_shape` and the same dtype: bilinear (linear on one axis), align_corners=False, not antialiased.
    """
    axes = [axis for axis, (old, new) in enumerate(zip(old_shape, new_shape, strict=True)) if old != new]
    if len(axes) == 2 and axes[1] == axes[0] + 1:
        old_grid, new_grid, kept = [old_shape[a] for a in axes], [new_shape[a] for a in axes], 0
    elif len(axes) == 1:
        old_grid, new_grid, kept = _grids(old_shape[axes[0]], new_shape[axes[0]], scale)
    else:
        raise ValueError(f"no rule resamples {tuple(old_shape)} to {tuple(new_shape)}")
    axis = axes[0]
    lead = tensor.shape[:axis]
    flat = tensor.reshape(*lead, -1, *tensor.shape[axes[-1] + 1 :])
    length = flat.shape[axis]
    in_front = len(old_shape) >= 3  # class tokens come first in an embedding, last in a table
    head = flat.narrow(axis, 0, kept if in_front else 0)
    tail = flat.narrow(axis, length - kept if not in_front else length, 0 if in_front else kept)
    body = flat.narrow(axis, kept if in_front else 0, length - kept).movedim(axis, -1)
    planes = body.reshape(1, -1, *old_grid).float()
    mode = "bilinear" if len(new_grid) == 2 else "linear"
    planes = F.interpolate(planes, size=tuple(new_grid), mode=mode, align_corners=False)
    body = planes.reshape(*body.shape[:-1], -1).movedim(-1, axis).to(tensor.dtype)
    return torch.cat([head, body, tail], dim=axis).reshape(new_shape).contiguous()


def _grids(old, new, scale):
    """Read two lengths of one axis as grids: (old grid, new grid, entries that are no positions)."""
    readings = [([old], [new], 0)]
    for kept in range(9):
        sides = math.isqrt(max(old - kept, 0)), math.isqrt(max(new - kept, 0))
        if min(sides) > 0 and sides[0] ** 2 + kept == old and sides[1] ** 2 + kept == new:
            readings.append(([sides[0]] * 2, [sides[1]] * 2, kept))
    if scale is None:
        return readings[min(1, len(readings) - 1)]

    def misfit(reading):
        (a, *_), (b, *_), _ = reading  # a grid of g grows with the image, a bias table of 2 g - 1 is one short of it
        return min(abs(math.log(b / a / scale)), abs(math.log((b + 1) / (a + 1) / scale)))

    return min(readings, key=misfit)


def resample_state(state, parameter, old_shape, new_shape, scale):
    """Let an optimizer's state of one parameter follow it."""
    entries = state.get(parameter, {})
    tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    if any(tuple(value.shape) != old_shape for value in tensors.values()):
        state.pop(parameter)  # factored moments and the like: the optimizer starts them anew
        return
    for key, value in tensors.items():
        entries[key] = resample(value, old_shape, new_shape, scale)
