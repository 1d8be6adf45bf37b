"""The second stage of Mask R-CNN and Cascade Mask R-CNN: classify, refine and segment the proposed boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align

from .boxes import Pooler, best_boxes

Targets = Sequence[dict[str, Tensor]]
Detections = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Stage:
    """One refinement: the overlap with an object that makes a box positive, its loss weight, the deltas' deviations."""

    overlap: float = 0.5
    weight: float = 1.0
    deviations: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)


# Cai & Vasconcelos 2018 with the weights of mmdetection.
CASCADE = (
    Stage(0.5, 1.0, (0.1, 0.1, 0.2, 0.2)),
    Stage(0.6, 0.5, (0.05, 0.05, 0.1, 0.1)),
    Stage(0.7, 0.25, (0.033, 0.033, 0.067, 0.067)),
)


@dataclass
class Sample:
    """The boxes of an image that a stage trains on: (K, 4), each one's object, label and whether it is that object."""

    boxes: Tensor
    objects: Tensor
    labels: Tensor
    given: Tensor


class Predictor(nn.Module):
    """Features (K, width) -> class logits (K, C + 1), background last, and deltas for each class (K, 4 C)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(width, num_classes + 1), nn.Linear(width, 4 * num_classes)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).float()


def convolutional_head(channels: int, width: int) -> nn.Module:
    """Four convolutions with BatchNorm and one linear layer (4conv1fc)."""
    return FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [width], norm_layer=nn.BatchNorm2d)


def linear_head(channels: int, width: int) -> nn.Module:
    """Two linear layers (2fc)."""
    return TwoMLPHead(channels * 7 * 7, width)


class RoIHeads(nn.Module):
    """Refine boxes in one or more stages, each trained on what the one before made; masks for the boxes of each.

    At test time the class logits of the stages are averaged, then the masks of the stages, at the final boxes.

    Args:
        num_classes: without background.
        channels: of the feature maps.
        strides: of the feature maps that boxes are pooled from.
        stages: one for Mask R-CNN.
        head: function of (channels, width) to a box head.
        box_loss: ``giou`` on decoded boxes, times 10; ``l1`` or ``smooth_l1`` (beta 1/9) on deltas. Of positive boxes,
            summed and divided by all that were sampled.
        masks: predict them too.
        width: of the box heads.
        sampled: boxes an image that a stage trains on, a quarter of them positive at most.
        aligned: pool boxes and masks with the offset of half a pixel, and make mask targets binary; False is
            torchvision's way.
        samples: points a side in a bin of the pooling, 0 for as many as it has pixels.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        strides: Sequence[int],
        stages: Sequence[Stage] = CASCADE,
        head: Callable[[int, int], nn.Module] = convolutional_head,
        box_loss: str = "giou",
        masks: bool = True,
        width: int = 1024,
        sampled: int = 512,
        aligned: bool = True,
        samples: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes, self.channels, self.stages = num_classes, channels, tuple(stages)
        self.box_loss, self.aligned = box_loss, aligned
        self.matchers = [Matcher(stage.overlap, stage.overlap) for stage in stages]
        self.coders = [BoxCoder(tuple(1 / deviation for deviation in stage.deviations)) for stage in stages]
        self.sampler = BalancedPositiveNegativeSampler(sampled, 0.25)
        self.box_pool, self.mask_pool = (Pooler(side, strides, aligned, samples) for side in (7, 14))
        self.box_heads = nn.ModuleList(head(channels, width) for _ in stages)
        self.predictors = nn.ModuleList(Predictor(width, num_classes) for _ in stages)
        masked = stages if masks else ()
        self.mask_heads = nn.ModuleList(MaskRCNNHeads(channels, [channels] * 4, 1) for _ in masked)
        self.mask_predictors = nn.ModuleList(MaskRCNNPredictor(channels, channels, num_classes) for _ in masked)
        for part in self.box_heads.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        self.threshold, self.suppression, self.most = 0.05, 0.5, 100

    # -- training ------------------------------------------------------------------------------------------------

    def losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]], targets: Targets
    ) -> dict[str, Tensor]:
        """The weighted losses of all stages.

        Args:
            maps: of the pyramid's levels, (N, C, h, w).
            proposals: N tensors (K, 4), pixels.
            sizes: height and width of each image.
            targets: N dicts of ``boxes``, ``labels`` and, where masks are predicted, ``masks`` (K, h, w).
        """
        losses = {}
        for place, stage in enumerate(self.stages):
            samples = [self._sample(place, boxes, target) for boxes, target in zip(proposals, targets)]
            logits, deltas = self._classify(place, maps, [sample.boxes for sample in samples])
            labels = torch.cat([sample.labels for sample in samples])
            found = {
                "cls": F.cross_entropy(logits, labels),
                "box": self._box_loss(place, deltas, samples, targets),
            }
            if self.mask_heads:
                found["mask"] = self._mask_loss(place, maps, samples, targets)
            losses.update({f"s{place}.{name}": stage.weight * loss for name, loss in found.items()})
            if place + 1 < len(self.stages):
                with torch.no_grad():
                    refined = self._refine(place, samples, logits, deltas, sizes)
                    proposals = [boxes[~sample.given] for boxes, sample in zip(refined, samples)]
        return losses

    def _sample(self, place: int, boxes: Tensor, target: dict[str, Tensor]) -> Sample:
        """Matches an image's boxes, the given ones added, to its objects, and draws those that the stage trains on."""
        objects = target["boxes"].to(boxes)
        given = torch.arange(len(boxes) + len(objects), device=boxes.device) >= len(boxes)
        boxes = torch.cat([boxes, objects])
        if len(objects):
            matched = self.matchers[place](box_iou(objects, boxes))
            labels = torch.where(matched < 0, self.num_classes, target["labels"][matched.clamp(min=0)])
        else:
            matched = torch.full((len(boxes),), -1, device=boxes.device)
            labels = torch.full_like(matched, self.num_classes)
        positive, negative = self.sampler([(matched >= 0).long()])
        drawn = (positive[0] | negative[0]).nonzero()[:, 0]
        return Sample(boxes[drawn], matched.clamp(min=0)[drawn], labels[drawn], given[drawn])

    def _classify(self, place: int, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (K, C + 1) and deltas (K, C, 4) of a stage for boxes of all images."""
        logits, deltas = self.predictors[place](self.box_heads[place](self.box_pool(maps, boxes)))
        return logits, deltas.view(len(deltas), self.num_classes, 4)

    def _box_loss(self, place: int, deltas: Tensor, samples: Sequence[Sample], targets: Targets) -> Tensor:
        labels = torch.cat([sample.labels for sample in samples])
        positive = (labels < self.num_classes).nonzero()[:, 0]
        boxes = torch.cat([sample.boxes for sample in samples])[positive]
        # An image without objects has no positive boxes: its objects are looked up in a row of zeros.
        objects = torch.cat(
            [
                (target["boxes"] if len(target["boxes"]) else sample.boxes.new_zeros(1, 4))[sample.objects]
                for sample, target in zip(samples, targets)
            ]
        )[positive]
        deltas, coder = deltas[positive, labels[positive]], self.coders[place]
        if self.box_loss == "giou":
            loss = 10 * generalized_box_iou_loss(coder.decode_single(deltas, boxes), objects, reduction="sum", eps=1e-6)
        elif self.box_loss == "l1":
            loss = F.l1_loss(deltas, coder.encode_single(objects, boxes), reduction="sum")
        else:
            loss = F.smooth_l1_loss(deltas, coder.encode_single(objects, boxes), reduction="sum", beta=1 / 9)
        return loss / max(len(labels), 1)

    def _mask_loss(self, place: int, maps: Sequence[Tensor], samples: Sequence[Sample], targets: Targets) -> Tensor:
        positive = [sample.labels < self.num_classes for sample in samples]
        boxes = [sample.boxes[chosen] for sample, chosen in zip(samples, positive)]
        labels = torch.cat([sample.labels[chosen] for sample, chosen in zip(samples, positive)])
        logits = self._mask_logits(place, maps, boxes)
        if not len(labels):
            return logits.sum() * 0
        wanted = [
            self._mask_targets(target["masks"], sample.objects[chosen], b, logits.shape[-1])
            for target, sample, chosen, b in zip(targets, samples, positive, boxes)
            if len(b)
        ]
        rows = torch.arange(len(labels), device=labels.device)
        return F.binary_cross_entropy_with_logits(logits[rows, labels].float(), torch.cat(wanted))

    def _mask_targets(self, masks: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
        """The part of each box's object mask inside the box: (K, side, side)."""
        rois = torch.cat([objects[:, None].to(boxes), boxes], 1)
        cut = roi_align(masks[:, None].to(boxes), rois, side, 1.0, 0, self.aligned)[:, 0]
        return (cut >= 0.5).to(boxes) if self.aligned else cut

    def _mask_logits(self, place: int, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        return self.mask_predictors[place](self.mask_heads[place](self.mask_pool(maps, boxes)))

    def _refine(
        self,
        place: int,
        samples: Sequence[Sample],
        logits: Tensor,
        deltas: Tensor,
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Each box moved as its class says: its object's in training, else the likeliest that is not background."""
        labels = torch.cat([sample.labels for sample in samples])
        labels = torch.where(labels == self.num_classes, logits[:, :-1].argmax(1), labels)
        return self._moved(place, [sample.boxes for sample in samples], labels, deltas, sizes)

    def _moved(
        self, place: int, boxes: Sequence[Tensor], labels: Tensor, deltas: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        chosen = deltas[torch.arange(len(labels), device=labels.device), labels]
        moved = self.coders[place].decode_single(chosen, torch.cat(list(boxes))).split([len(b) for b in boxes])
        return [clip_boxes_to_image(b, size) for b, size in zip(moved, sizes)]

    # -- inference -----------------------------------------------------------------------------------------------

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> Detections:
        """For each image ``boxes`` (K, 4), ``scores``, ``labels`` and ``masks`` (K, 28, 28), best first."""
        boxes, scores = self.candidates(maps, proposals, sizes)
        counts = [len(b) for b in proposals]
        found = []
        for b, s, size in zip(boxes.split(counts), scores.split(counts), sizes):
            kept = best_boxes(b, s, size, self.threshold, self.suppression, self.most)
            found.append(dict(zip(("boxes", "scores", "labels"), kept)))
        if self.mask_heads:
            masks = self.masks(maps, [one["boxes"] for one in found], torch.cat([one["labels"] for one in found]))
            for one, part in zip(found, masks.split([len(one["labels"]) for one in found])):
                one["masks"] = part
        return found

    def candidates(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Boxes for each class (K, C, 4), not cut to the image, and scores (K, C), of all proposals of all images."""
        boxes, total = list(proposals), 0
        for place in range(len(self.stages)):
            logits, deltas = self._classify(place, maps, boxes)
            total = total + logits
            if place + 1 < len(self.stages):
                boxes = self._moved(place, boxes, logits[:, :-1].argmax(1), deltas, sizes)
        moved = self.coders[-1].decode_single(deltas.flatten(1), torch.cat(boxes))
        return moved.view(deltas.shape), (total / len(self.stages)).softmax(1)[:, :-1]

    def masks(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor) -> Tensor:
        """(K, 28, 28): the probability of each box's class, averaged over the stages."""
        rows, total = torch.arange(len(labels), device=labels.device), 0
        for place in range(len(self.stages)):
            total = total + self._mask_logits(place, maps, boxes)[rows, labels].float().sigmoid()
        return total / len(self.stages)
