"""What a forward pass costs: FLOPs and parameters of a model, counted without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curriculum.skeleton import Skeleton

from .registry import create_model


def count_flops(model: str | Callable[[int], nn.Module], sizes: Iterable[int]) -> tuple[dict[int, int], int]:
    """Count the FLOPs of one image's forward pass at each input size, one multiply-add being one FLOP.

    Convolutions and matrix products count, those inside attention (q k^T and its product with v) too; normalisation,
    activations and other element-wise work do not. These are the papers' tables' conventions. Patches that training
    leaves out (timm's ``patch_drop_rate``) do not count.

    Args:
        model: a model's name, or a function from input size to a fresh model.
        sizes: input sizes in pixels per side.

    Returns:
        ({size: FLOPs}, the number of parameters at the largest size).
    """
    build = (lambda size: create_model(model, input_size=size)) if isinstance(model, str) else model
    flops, params = {}, 0
    for size in sorted(sizes):
        try:
            flops[size], params = _count(build, size, "meta")
        except (NotImplementedError, RuntimeError, TypeError):  # it computes with values: count a real pass
            flops[size], params = _count(build, size, "cpu")
    return flops, params


def _count(build: Callable[[int], nn.Module], size: int, device: str) -> tuple[int, int]:
    with torch.random.fork_rng(devices=[]), torch.device(device), Skeleton():
        model = build(size).eval()
    for part in model.modules():
        if type(part).__name__.startswith("PatchDropout"):
            part.train()
    image = torch.zeros(1, getattr(model, "in_chans", 3), size, size, device=device)
    # Plain attention is made of counted matrix products; not every fused kernel is known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters())
