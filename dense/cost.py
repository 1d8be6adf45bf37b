"""Parameters and FLOPs of detectors and segmenters, counted without computing anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curriculum.skeleton import Skeleton

from .detectors import RetinaNet, TwoStage

DETECTION, SEGMENTATION = (800, 1280), (512, 2048)  # height and width that the papers' tables count at
BOXES, MASKS = 1000, 100  # that the second stage sees there


@dataclass(frozen=True)
class Cost:
    """Of one image: parameters, FLOPs (a multiply-add is one), and of these the products of queries, keys, values."""

    params: int
    flops: int
    attention: int


def count(build: Callable[[], nn.Module], height: int, width: int) -> Cost:
    """Count what the inference of one image of this size costs.

    Convolutions, linear layers and the matrix products inside attention count, in body, pyramid and heads, the second
    stage for 1,000 boxes and 100 masks as in mmdetection's tool. Normalisation, activations, resizing, pooling and
    suppression do not: they are below half a per cent. Swin's published figures agree with this to 0.2 %. mmcv's
    counter sees modules only and so leaves out attention's products; figures made by it (DAT's RetinaNet) agree to
    0.3 % with ``flops - attention``.

    Args:
        build: makes the model.
        height, width: pixels.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), Skeleton():
        model = build().eval()
        images = torch.zeros(1, 3, height, width)
    # Plain attention is made of counted matrix products; not every fused kernel is known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        _run(model, images)
    products = counter.get_flop_counts()["Global"]
    attention = sum(flops for operation, flops in products.items() if str(operation) in ("aten.bmm", "aten.baddbmm"))
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(params, counter.get_total_flops() // 2, attention // 2)


def _run(model: nn.Module, images: Tensor) -> None:
    if isinstance(model, RetinaNet):
        model.raw(images)
    elif isinstance(model, TwoStage):
        model.rpn.head(model.pyramid(images))
        heads = model.roi_heads
        boxes, masks = (images.new_zeros(n, heads.channels, s, s) for n, s in ((BOXES, 7), (MASKS, 14)))
        for head, predictor in zip(heads.box_heads, heads.predictors):
            predictor(head(boxes))
        for head, predictor in zip(heads.mask_heads, heads.mask_predictors):
            predictor(head(masks))
    else:
        model(images)
