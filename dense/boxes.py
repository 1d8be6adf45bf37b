"""What torchvision's detection parts lack: unrounded anchors, aligned RoI pooling, and losses over a whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align, sigmoid_focal_loss

# Older torch has the second alone, which is true under torch.compile too: there pooling is slower, with equal results.
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class Anchors(nn.Module):
    """Boxes of several shapes around the top left corner of every cell of every level, in float32 whatever the maps.

    torchvision's are rounded to whole pixels, and take a stride from the sizes of image and map, which the topmost
    levels round.

    Args:
        strides: of each level.
        scales: side of a square anchor, in strides.
        ratios: height over width.
    """

    def __init__(
        self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        super().__init__()
        self.strides, self.per_cell = tuple(strides), len(scales) * len(ratios)
        sides = [(scale / math.sqrt(ratio) / 2, scale * math.sqrt(ratio) / 2) for ratio in ratios for scale in scales]
        self.cells = [[-w, -h, w, h] for w, h in sides]  # in strides, around 0; the scales of a ratio are neighbours

    def levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(h * w * per_cell, 4) for the map (N, C, h, w) of each level, xyxy in pixels of the image."""
        found = []
        for x, stride in zip(maps, self.strides, strict=True):
            rows, columns = (torch.arange(n, device=x.device, dtype=torch.float32) for n in x.shape[-2:])
            y, x_ = torch.meshgrid(rows, columns, indexing="ij")
            corners = torch.stack((x_, y, x_, y), -1).view(-1, 1, 4)
            cells = torch.tensor(self.cells, device=x.device, dtype=torch.float32)
            found.append(((corners + cells) * stride).view(-1, 4))
        return found

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """As torchvision's: for each image the anchors of all levels in a row."""
        return [torch.cat(self.levels(maps))] * len(images.image_sizes)


class Pooler(nn.Module):
    """RoIAlign from the level that fits a box's size: 4 times the box's side in the image from one to the next.

    Args:
        size: rows and columns that are made of a box.
        strides: of the levels, each twice the one before.
        aligned: with the offset of half a pixel (as Detectron2, mmdetection), which torchvision's pooler lacks.
        samples: points a side in each bin; 0: as many as the bin has pixels.
        finest: boxes of a smaller side than twice this are taken from the first level, pixels.
    """

    def __init__(
        self, size: int, strides: Sequence[int], aligned: bool = True, samples: int = 0, finest: int = 56
    ) -> None:
        super().__init__()
        self.size, self.strides, self.aligned, self.samples, self.finest = size, strides, aligned, samples, finest

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Maps (N, C, h, w) and N tensors (K, 4) -> (sum of K, C, size, size)."""
        rois = with_image(boxes)
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        levels = (sides / self.finest + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        pooled = rois.new_zeros(len(rois), maps[0].shape[1], self.size, self.size)
        for level, (x, stride) in enumerate(zip(maps, self.strides)):
            chosen = levels == level
            if exporting():  # every box on every level: four times the work, but of fixed shapes
                part = roi_align(x.float(), rois, self.size, 1 / stride, self.samples, self.aligned)
                pooled = torch.where(chosen[:, None, None, None], part, pooled)
            else:
                here = chosen.nonzero()[:, 0]
                part = roi_align(x.float(), rois[here], self.size, 1 / stride, self.samples, self.aligned)
                pooled = pooled.index_copy(0, here, part)
        return pooled


def with_image(boxes: Sequence[Tensor]) -> Tensor:
    """N tensors (K, 4) -> (sum of K, 5), the image's place first."""
    places = [torch.full((len(b), 1), float(place), device=b.device) for place, b in enumerate(boxes)]
    return torch.cat([torch.cat(places), torch.cat(list(boxes))], 1)


def focal_loss(logits: Tensor, labels: Tensor, positives: int, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 5), summed and divided by the positive anchors of the batch.

    Args:
        logits: (M, C).
        labels: (M,): 0 to C - 1, C for background, -1 for anchors that do not count.
        positives: at least 1 is taken.
    """
    counted = labels >= 0
    classes = torch.arange(logits.shape[1], device=logits.device)
    targets = (labels[counted, None] == classes).float()
    loss = sigmoid_focal_loss(logits[counted].float(), targets, alpha, gamma, reduction="sum")
    return loss / max(positives, 1)


def best_boxes(
    boxes: Tensor, scores: Tensor, size: tuple[int, int], threshold: float, overlap: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of one image's boxes after thresholding and non-maximum suppression in each class, best first.

    Args:
        boxes: (M, 4) or (M, C, 4), pixels.
        scores: (M, C).
        size: height and width, to which boxes are cut.

    Returns:
        Boxes (K, 4), scores (K,) and labels (K,), K at most ``most``.
    """
    if boxes.ndim == 2:
        boxes = boxes[:, None].expand(-1, scores.shape[1], -1)
    boxes = clip_boxes_to_image(boxes, size)
    rows, labels = (scores > threshold).nonzero(as_tuple=True)
    boxes, scores = boxes[rows, labels], scores[rows, labels]
    kept = batched_nms(boxes, scores, labels, overlap)[:most]
    return boxes[kept], scores[kept], labels[kept]
