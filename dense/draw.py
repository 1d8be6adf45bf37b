"""Pictures of detections and label maps, for the report, TensorBoard and predictions."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from dense.transforms import IGNORED

OPACITY = 0.5
SHOWN = 0.3  # score from which a detection is drawn


@lru_cache
def colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """RGB of ``count`` classes: hues a golden angle apart, so that neighbours differ; the same for any ``count``."""
    return tuple(
        tuple(int(255 * part + 0.5) for part in colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.9, 0.55)[k // 12 % 2], 0.95))
        for k in range(count)
    )


def draw_objects(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    scores: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """uint8 (3, H, W): the image with objects drawn in the colours of their classes, named in their corners.

    Args:
        image: uint8 (3, H, W). boxes: (K, 4) xyxy in its pixels. labels: (K,).
        scores: (K,), written beside the name. masks: (K, H, W), laid over the image.
    """
    if not len(boxes):
        return image.clone()
    palette = colours(len(classes))
    chosen = [palette[label] for label in labels.tolist()]
    names = [classes[label] for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist())]
    if masks is not None:
        image = draw_segmentation_masks(image, masks.bool(), alpha=OPACITY, colors=chosen)
    # Boxes of no area after rounding to pixels cannot be drawn.
    height, width = image.shape[-2:]
    boxes = boxes.detach().cpu().float().round()
    boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, width - 1), boxes[:, 1::2].clamp(0, height - 1)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    return draw_bounding_boxes(image, boxes, names, chosen, width=max(1, min(image.shape[-2:]) // 200))


def draw_labels(image: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """uint8 (3, H, W): the image under the colours of a label map (H, W); pixels of label 255 stay as they are."""
    table = torch.tensor([*colours(classes), *[(0, 0, 0)] * (IGNORED + 1 - classes)], dtype=torch.float32)
    colour = table[labels.long()].permute(2, 0, 1)
    mixed = (1 - OPACITY) * image.float() + OPACITY * colour
    return torch.where(labels == IGNORED, image, mixed.round().to(torch.uint8))


def palette_bytes(classes: int) -> bytes:
    """The colours of a label PNG, 256 times RGB; 255 is white."""
    table = np.zeros((256, 3), np.uint8)
    table[:classes] = colours(classes)
    table[IGNORED] = 255
    return table.tobytes()
