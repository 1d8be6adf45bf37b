"""RetinaNet, Mask R-CNN and Cascade Mask R-CNN on a body, of torchvision's parts, as the papers configure them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from .backbones import STRIDES, Body, OnBody
from .boxes import Anchors, best_boxes, focal_loss
from .cascade import CASCADE, Detections, RoIHeads, Stage, Targets, convolutional_head, linear_head


class Detector(OnBody):
    """Images and their true sizes in, losses or detections out.

    Called as ``model(images, sizes, targets)``, in training with targets and in evaluation without.

    Args of a call:
        images: float (N, 3, H, W), normalised, zero beyond each image's size.
        sizes: int64 (N, 2), height and width.
        targets: N dicts: ``boxes`` float32 (K, 4), xyxy in pixels, ``labels`` int64 (K,) from 0, and ``masks`` uint8
            (K, h, w) where masks are predicted.

    Returns:
        With targets a dict of losses, to be summed. Else a dict for each image: ``boxes`` (K, 4), ``scores`` (K,),
        ``labels`` (K,) and ``masks`` (K, 28, 28), the probabilities within the box, best first.
    """

    def __init__(self, body: Body, num_classes: int, channels: int, extra: ExtraFPNBlock) -> None:
        super().__init__(body)
        self.num_classes = num_classes
        self.fpn = FeaturePyramidNetwork(list(body.channels), channels, extra)
        for part in self.fpn.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.xavier_uniform_(part.weight)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images)
        return list(self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps))).values())


class TwoStage(Detector):
    """Proposals on P2 to P6, and :class:`RoIHeads` for them from P2 to P5."""

    class_names = r"roi_heads\..*\.(cls_score|bbox_pred|mask_fcn_logits)"

    def __init__(self, body: Body, num_classes: int, channels: int, rpn: RegionProposalNetwork, heads: RoIHeads):
        super().__init__(body, num_classes, channels, LastLevelMaxPool())
        self.rpn, self.roi_heads = rpn, heads

    def forward(self, images: Tensor, sizes: Tensor, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        maps, shapes = self.pyramid(images), [(height, width) for height, width in sizes.tolist()]
        levels = OrderedDict((str(level), x) for level, x in enumerate(maps))
        proposals, losses = self.rpn(ImageList(images, shapes), levels, targets)
        maps = maps[: len(STRIDES)]
        if targets is None:
            return self.roi_heads.detect(maps, proposals, shapes)
        losses = {"rpn.cls": losses["loss_objectness"], "rpn.box": losses["loss_rpn_box_reg"]}
        return {**losses, **self.roi_heads.losses(maps, proposals, shapes, targets)}


class FloatRPNHead(RPNHead):
    """Its outputs are float32 under autocast too, for boxes of half precision are pixels off."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [part.float() for part in logits], [part.float() for part in deltas]


class RPN(RegionProposalNetwork):
    """torchvision's, with the anchors of mmdetection.

    Args:
        channels: of the feature maps.
        proposals: boxes of an image that the second stage sees in training, and 1,000 of them at most in testing; of
            each level twice as many, up to 2,000 and 1,000, go into non-maximum suppression.
        beta: of the box loss; 0 is L1.
    """

    def __init__(self, channels: int, proposals: int, beta: float) -> None:
        anchors = Anchors((*STRIDES, 64), scales=(8,))
        head = FloatRPNHead(channels, anchors.per_cell)
        before = {"training": min(2 * proposals, 2000), "testing": min(2 * proposals, 1000)}
        after = {"training": proposals, "testing": min(proposals, 1000)}
        super().__init__(anchors, head, 0.7, 0.3, 256, 0.5, before, after, 0.7)
        self.beta = beta

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(drawn).nonzero()[:, 0] for drawn in self.fg_bg_sampler(labels))
        drawn, wanted = torch.cat([positive, negative]), torch.cat(regression_targets)
        box = F.smooth_l1_loss(pred_bbox_deltas[positive], wanted[positive], reduction="sum", beta=self.beta)
        score = F.binary_cross_entropy_with_logits(objectness.flatten()[drawn], torch.cat(labels)[drawn])
        return score, box / max(len(drawn), 1)


class TwoConvolutions(ExtraFPNBlock):
    """P6 by a convolution of stride 2 on C5, P7 by one on P6, without a ReLU between them."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.p6, self.p7 = (nn.Conv2d(n, channels, 3, 2, 1) for n in (in_channels, channels))

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class RetinaNet(Detector):
    """One stage on P3 to P7 (Lin et al. 2017): focal loss, and L1 on deltas, each over the batch's positives."""

    class_names = r"head\.classification_head\.cls_logits"

    def __init__(self, body: Body, num_classes: int, channels: int) -> None:
        super().__init__(body, num_classes, channels, TwoConvolutions(body.channels[-1], channels))
        self.anchors = Anchors((8, 16, 32, 64, 128), scales=[4 * 2 ** (k / 3) for k in range(3)])
        self.head = RetinaNetHead(channels, self.anchors.per_cell, num_classes)
        self.matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.threshold, self.suppression, self.most, self.per_level = 0.05, 0.5, 100, 1000

    def forward(self, images: Tensor, sizes: Tensor, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        logits, deltas, anchors = self.raw(images)
        if targets is not None:
            return self._losses(logits, deltas, torch.cat(anchors), targets)
        counts = [len(level) for level in anchors]
        found = []
        for one, moves, (height, width) in zip(logits.sigmoid(), deltas, sizes.tolist()):
            parts = [self.best_of_level(*level) for level in zip(one.split(counts), moves.split(counts), anchors)]
            boxes, scores = (torch.cat(part) for part in zip(*parts))
            kept = best_boxes(boxes, scores, (height, width), self.threshold, self.suppression, self.most)
            found.append(dict(zip(("boxes", "scores", "labels"), kept)))
        return found

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Class logits (N, M, C) and deltas (N, M, 4) of M anchors, and the anchors of each level (K, 4)."""
        maps = self.pyramid(images)
        found = self.head(maps)
        return found["cls_logits"].float(), found["bbox_regression"].float(), self.anchors.levels(maps)

    def best_of_level(self, scores: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """A level's anchors of the best scores: boxes (K, 4) and scores (K, C)."""
        rows = scores.amax(1).topk(min(self.per_level, len(scores))).indices
        return self.coder.decode_single(deltas[rows], anchors[rows]), scores[rows]

    def _losses(self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets) -> dict[str, Tensor]:
        labels, wanted, places = [], [], []
        for target in targets:
            if len(target["boxes"]):
                matched = self.matcher(box_iou(target["boxes"], anchors))
            else:
                matched = torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
            label = torch.full_like(matched, self.num_classes)
            positive = (matched >= 0).nonzero()[:, 0]
            label[positive] = target["labels"][matched[positive]]
            label[matched == Matcher.BETWEEN_THRESHOLDS] = -1
            labels.append(label)
            places.append(positive)
            wanted.append(self.coder.encode_single(target["boxes"][matched[positive]], anchors[positive]))
        positives = sum(len(place) for place in places)
        moved = torch.cat([moves[place] for moves, place in zip(deltas, places)])
        return {
            "cls": focal_loss(logits.flatten(0, 1), torch.cat(labels), positives),
            "box": F.l1_loss(moved, torch.cat(wanted), reduction="sum") / max(positives, 1),
        }


def retinanet(body: Body, num_classes: int, channels: int = 256) -> RetinaNet:
    """RetinaNet; its body gives maps at strides 8, 16 and 32 (``RETINANET_STRIDES``)."""
    model = RetinaNet(body, num_classes, channels)
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -math.log(99))
    return model


def mask_rcnn(
    body: Body,
    num_classes: int,
    channels: int = 256,
    width: int = 1024,
    sampled: int = 512,
    masks: bool = True,
    proposals: int = 1000,
) -> TwoStage:
    """Mask R-CNN (He et al. 2017) as mmdetection configures it: two linear layers, L1 losses."""
    heads = RoIHeads(num_classes, channels, STRIDES, (Stage(),), linear_head, "l1", masks, width, sampled)
    return TwoStage(body, num_classes, channels, RPN(channels, proposals, beta=0.0), heads)


def cascade_mask_rcnn(
    body: Body,
    num_classes: int,
    channels: int = 256,
    width: int = 1024,
    sampled: int = 512,
    masks: bool = True,
    proposals: int = 2000,
) -> TwoStage:
    """Cascade Mask R-CNN (Cai & Vasconcelos 2018) as in Swin's detection code: 4conv1fc heads, GIoU loss."""
    heads = RoIHeads(num_classes, channels, STRIDES, CASCADE, convolutional_head, "giou", masks, width, sampled)
    return TwoStage(body, num_classes, channels, RPN(channels, proposals, beta=1 / 9), heads)


RETINANET_STRIDES: Sequence[int] = (8, 16, 32)
HEADS = {"retinanet": retinanet, "mask_rcnn": mask_rcnn, "cascade": cascade_mask_rcnn}
