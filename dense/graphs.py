"""Inference of one image of fixed size as a graph without data-dependent shapes, for torch.export and ONNX."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from .detectors import RetinaNet, TwoStage
from .upernet import UperNet, spread

CANDIDATES = 1000  # pairs of box and class that final suppression looks at, best first; more are rare above 0.05


class SegmenterGraph(nn.Module):
    """Normalised images (1, 3, H, W) -> logits (1, C, H, W)."""

    names = ("logits",)

    def __init__(self, model: UperNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return spread(self.model(images), self.model.body.strides[0], images.shape[-2:])


class DetectorGraph(nn.Module):
    """Normalised images (1, 3, H, W) -> the ``most`` best detections, rows of score 0 where there are fewer.

    Boxes (K, 4), scores (K,), labels (K,) and, of a detector that has them, mask probabilities (K, 28, 28). They are
    the model's own; the size of the image is fixed, and every row of it is taken for image.
    """

    def __init__(self, model: RetinaNet | TwoStage) -> None:
        super().__init__()
        self.model = model
        self.last = model.roi_heads if isinstance(model, TwoStage) else model
        self.masks = isinstance(model, TwoStage) and len(model.roi_heads.mask_heads) > 0
        self.names = ("boxes", "scores", "labels", "masks")[: 3 + self.masks]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = images.shape[-2:]
        if isinstance(self.model, RetinaNet):
            return self._best(*self._one_stage(images), size)
        maps = self.model.pyramid(images)
        proposals, good = self._proposals(maps, size)
        maps, heads = maps[:4], self.model.roi_heads
        boxes, scores = heads.candidates(maps, [proposals], [size])
        found = self._best(boxes, scores * good[:, None], size)
        return (*found, heads.masks(maps, [found[0]], found[2])) if self.masks else found

    def _one_stage(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas, anchors = self.model.raw(images)
        counts = [len(level) for level in anchors]
        levels = zip(logits[0].sigmoid().split(counts), deltas[0].split(counts), anchors)
        boxes, scores = zip(*(self.model.best_of_level(*level) for level in levels))
        return torch.cat(boxes), torch.cat(scores)

    def _proposals(self, maps: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(K, 4), the region proposal network's, each level suppressed by itself; and (K,), which of them count."""
        rpn, found = self.model.rpn, []
        logits, deltas = rpn.head(maps)
        for score, delta, anchors in zip(logits, deltas, rpn.anchor_generator.levels(maps)):
            score = score[0].permute(1, 2, 0).flatten()
            delta = delta[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
            score, rows = score.topk(min(rpn.pre_nms_top_n(), len(score)))
            boxes = _cut(rpn.box_coder.decode_single(delta[rows], anchors[rows]), size)
            score = score.sigmoid() * ((boxes[:, 2:] - boxes[:, :2]) >= rpn.min_size).all(1)
            found.append((boxes, _suppressed(boxes, score, rpn.nms_thresh)))
        boxes, scores = (torch.cat(part) for part in zip(*found))
        scores, best = scores.topk(min(rpn.post_nms_top_n(), len(scores)))
        return boxes[best], scores > 0

    def _best(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        classes = scores.shape[1]
        scores, pairs = scores.flatten().topk(min(CANDIDATES, scores.numel()))
        rows, labels = pairs // classes, pairs % classes
        boxes = _cut(boxes[rows] if boxes.ndim == 2 else boxes[rows, labels], size)
        scores = scores * (scores > self.last.threshold)
        apart = labels[:, None] * (boxes.max() + 1)  # boxes of different classes do not overlap
        scores = _suppressed(boxes + apart, scores, self.last.suppression)
        scores, best = scores.topk(min(self.last.most, len(scores)))
        return boxes[best], scores, labels[best]


def _suppressed(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """The scores, 0 where a better box overlaps."""
    # torchvision's nms is traced as keeping two boxes at least: two more that overlap with none make sure of it.
    aside = torch.tensor([[-2.0, -2, -1, -1], [-4, -4, -3, -3]], device=boxes.device)
    scores = torch.cat([scores, scores.new_full((2,), -1.0)])
    kept = nms(torch.cat([boxes, aside]), scores, overlap)
    return torch.zeros_like(scores).index_put((kept,), scores[kept])[:-2]


def _cut(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    return torch.stack((x, y), 2).flatten(1)
