"""Detectors and UperNet: against torchvision's Mask R-CNN, direct formulas, and the published sizes and costs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.ops import MultiScaleRoIAlign

from dense import upernet as upernet_module
from dense.backbones import make_body
from dense.boxes import Anchors, Pooler, focal_loss
from dense.cascade import RoIHeads, Stage, linear_head
from dense.cost import DETECTION, SEGMENTATION, count
from dense.detectors import RETINANET_STRIDES, cascade_mask_rcnn, mask_rcnn, retinanet
from dense.upernet import class_probabilities, segment, upernet

CLASSES = 4
STRIDES = (4, 8, 16, 32)


def targets_of(sizes, seed=0):
    """Objects with elliptic masks in images of these sizes; the last image has none."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place, (height, width) in enumerate(sizes):
        count = 0 if place == len(sizes) - 1 else 3
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) / 2
        extent = 16 + torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) / 2 - 16)
        boxes = torch.cat([corner, corner + extent], 1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        inside = [((x - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 <= 1 for c, r in zip(centre, radius)]
        masks = torch.stack(inside).to(torch.uint8) if count else torch.zeros(0, height, width, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        found.append({"boxes": boxes, "labels": labels, "masks": masks})
    return found


@pytest.fixture(scope="module")
def twins():
    """RoIHeads of one stage in torchvision's ways, and torchvision's own with the same weights."""
    torch.manual_seed(0)
    deviations = (0.1, 0.1, 0.2, 0.2)
    ours = RoIHeads(
        CLASSES, 8, STRIDES, (Stage(0.5, 1.0, deviations),), linear_head, "smooth_l1", True, 32, 64, False, 2
    )
    theirs = TorchvisionRoIHeads(
        MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        TwoMLPHead(8 * 49, 32),
        FastRCNNPredictor(32, CLASSES + 1),
        0.5, 0.5, 64, 0.25, None, 0.05, 0.5, 100,
        MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        MaskRCNNHeads(8, [8] * 4, 1),
        MaskRCNNPredictor(8, 8, CLASSES + 1),
    )  # fmt: skip
    theirs.box_head.load_state_dict(ours.box_heads[0].state_dict())
    theirs.mask_head.load_state_dict(ours.mask_heads[0].state_dict())
    with torch.no_grad():
        for layer in (ours.predictors[0].cls_score, ours.predictors[0].bbox_pred):
            layer.weight.normal_(std=0.1)
        cls, box = ours.predictors[0].cls_score, ours.predictors[0].bbox_pred
        for name in ("weight", "bias"):
            scores, deltas = getattr(cls, name), getattr(box, name)
            # torchvision's background comes first, and has deltas and a mask of its own.
            getattr(theirs.box_predictor.cls_score, name).copy_(torch.cat([scores[-1:], scores[:-1]]))
            getattr(theirs.box_predictor.bbox_pred, name)[4:] = deltas
            mine, other = ours.mask_predictors[0], theirs.mask_predictor
            getattr(other.conv5_mask, name).copy_(getattr(mine.conv5_mask, name))
            getattr(other.mask_fcn_logits, name)[1:] = getattr(mine.mask_fcn_logits, name)
    return ours, theirs


@pytest.fixture(scope="module")
def scene():
    torch.manual_seed(1)
    sizes = [(96, 128), (128, 100), (64, 64)]
    maps = [torch.randn(3, 8, 128 // stride, 128 // stride) for stride in STRIDES]
    targets = targets_of(sizes)
    proposals = []
    for (height, width), target in zip(sizes, targets):
        corners = torch.rand(80, 4) * torch.tensor([width, height, width, height])
        boxes = torch.cat(
            [torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], 1
        )
        near = target["boxes"].repeat(5, 1) + torch.randn(5 * len(target["boxes"]), 4) * 3
        proposals.append(torch.cat([boxes + torch.tensor([0, 0, 1.0, 1.0]), near]))
    return maps, proposals, sizes, targets


def named(maps):
    return {str(level): x for level, x in enumerate(maps)}


def test_one_stage_in_torchvisions_ways_has_the_losses_of_its_mask_rcnn(twins, scene):
    ours, theirs = twins
    maps, proposals, sizes, targets = scene
    torch.manual_seed(3)
    found = ours.losses(maps, proposals, sizes, targets)
    torch.manual_seed(3)  # both draw their boxes from torch's generator, and in the same order
    shifted = [{**target, "labels": target["labels"] + 1} for target in targets]
    # torchvision samples positive label 0 as background; ours is the last.
    _, expected = theirs.train()(named(maps), list(proposals), [(128, 128)] * 3, shifted)
    for mine, other in (("cls", "classifier"), ("box", "box_reg"), ("mask", "mask")):
        torch.testing.assert_close(found[f"s0.{mine}"], expected[f"loss_{other}"], rtol=1e-6, atol=1e-6)
    # Negative control: the papers' pooling is another.
    ours.box_pool.aligned = True
    torch.manual_seed(3)
    other = ours.losses(maps, proposals, sizes, targets)
    ours.box_pool.aligned = False
    assert abs(other["s0.cls"] - found["s0.cls"]) > 1e-5


@torch.no_grad()
def test_one_stage_in_torchvisions_ways_finds_the_same_boxes_and_masks(twins, scene):
    ours, theirs = twins
    maps, proposals, _, _ = scene
    sizes = [(128, 128)] * 3
    found = ours.detect(maps, proposals, sizes)
    expected, _ = theirs.eval()(named(maps), list(proposals), sizes)
    assert sum(len(one["boxes"]) for one in found) > 100
    for mine, other in zip(found, expected):
        torch.testing.assert_close(mine["boxes"], other["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(mine["scores"], other["scores"])
        assert torch.equal(mine["labels"] + 1, other["labels"])
        torch.testing.assert_close(mine["masks"], other["masks"][:, 0])


def test_giou_of_each_positive_box_over_all_that_were_sampled():
    """Rezatofighi et al. 2019 in ten lines, for one image whose proposals are known."""
    torch.manual_seed(0)
    heads = RoIHeads(CLASSES, 8, STRIDES, (Stage(),), linear_head, "giou", False, 16, sampled=64)
    torch.nn.init.normal_(heads.predictors[0].bbox_pred.weight, std=0.2)
    maps = [torch.randn(1, 8, 64 // stride, 64 // stride) for stride in STRIDES]
    objects = torch.tensor([[8.0, 8, 40, 44]])
    proposals = torch.tensor([[10.0, 8, 40, 40], [50, 50, 60, 60], [0, 40, 10, 60]])
    target = {"boxes": objects, "labels": torch.tensor([2])}
    found = heads.losses(maps, [proposals], [(64, 64)], [target])["s0.box"]
    _, deltas = heads._classify(0, maps, [torch.cat([proposals, objects])])
    total = 0.0
    for place, (x1, y1, x2, y2) in ((0, proposals[0].tolist()), (3, objects[0].tolist())):
        dx, dy, dw, dh = (deltas[place, 2] * torch.tensor([0.1, 0.1, 0.2, 0.2])).tolist()
        w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
        cx, cy = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        a, b = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), objects[0].tolist()
        inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        union = w * h + (b[2] - b[0]) * (b[3] - b[1]) - inter
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        total += 1 - inter / union + (hull - union) / hull
    assert float(found) == pytest.approx(10 * total / 4, rel=1e-5)


def test_focal_loss_is_the_formula_over_the_batchs_positives():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 3, 3, -1, 1])
    expected = 0.0
    for row, label in zip(logits.sigmoid().tolist(), labels.tolist()):
        for place, p in enumerate(row if label >= 0 else []):
            right, weight = (p, 0.25) if place == label else (1 - p, 0.75)
            expected += -weight * (1 - right) ** 2 * math.log(right)
    assert float(focal_loss(logits, labels, 3)) == pytest.approx(expected / 3, rel=1e-5)


def test_retinanet_divides_both_losses_by_the_positives_of_the_batch():
    torch.manual_seed(0)
    model = retinanet(make_body("resnet18", strides=RETINANET_STRIDES), CLASSES, channels=16).train()
    sizes = torch.tensor([[96, 128], [64, 64]])
    images, targets = torch.randn(2, 3, 128, 128), targets_of(sizes.tolist())
    found = model(images, sizes, targets)
    logits, deltas, anchors = model.raw(images)
    anchors, box, score, positives = torch.cat(anchors), 0.0, 0.0, 0
    for one, moves, target in zip(logits, deltas, targets):
        if not len(target["boxes"]):
            score += (0.75 * one.sigmoid() ** 2 * F.softplus(one)).sum()
            continue
        x1, y1, x2, y2 = anchors.unbind(1)
        overlaps = []
        for a, b, c, d in target["boxes"].tolist():
            inter = (x2.clamp(max=c) - x1.clamp(min=a)).clamp(min=0) * (y2.clamp(max=d) - y1.clamp(min=b)).clamp(min=0)
            overlaps.append(inter / ((x2 - x1) * (y2 - y1) + (c - a) * (d - b) - inter))
        overlaps = torch.stack(overlaps)
        best, owner = overlaps.max(0)
        forced = (overlaps == overlaps.amax(1, keepdim=True)).any(0)  # every object's best anchor is positive
        positive, negative = (best >= 0.5) | forced, (best < 0.4) & ~forced
        positives += int(positive.sum())
        wanted = torch.zeros_like(one)
        wanted[positive] = F.one_hot(target["labels"][owner[positive]], CLASSES).float()
        p = one.sigmoid()
        loss = torch.where(wanted > 0, 0.25 * (1 - p) ** 2 * F.softplus(-one), 0.75 * p**2 * F.softplus(one))
        score += loss[positive | negative].sum()
        b, a = target["boxes"][owner[positive]], anchors[positive]
        size, centre = a[:, 2:] - a[:, :2], (a[:, 2:] + a[:, :2]) / 2
        delta = torch.cat([((b[:, 2:] + b[:, :2]) / 2 - centre) / size, ((b[:, 2:] - b[:, :2]) / size).log()], 1)
        box += (moves[positive] - delta).abs().sum()
    assert positives > 3
    assert float(found["cls"]) == pytest.approx(float(score) / positives, rel=1e-4)
    assert float(found["box"]) == pytest.approx(float(box) / positives, rel=1e-4)


def test_anchors_are_torchvisions_but_not_rounded_and_on_the_true_stride():
    maps = [torch.zeros(1, 1, 8, 12), torch.zeros(1, 1, 2, 3)]
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    ours = Anchors((8, 32), scales=(4, 4 * 2**0.5))
    theirs = AnchorGenerator(((32, 32 * 2**0.5), (128, 128 * 2**0.5)), ((0.5, 1.0, 2.0),) * 2)
    found, rounded = ours(images, maps)[0], theirs(images, maps)[0]
    assert 0.1 < float((found - rounded).abs().max()) <= 0.5
    # Of 100 pixels at stride 64 the map has two cells, from which torchvision takes a stride of 50.
    assert Anchors((64,), (1,)).levels([torch.zeros(1, 1, 2, 2)])[0][-1].tolist()[2] > 64


def test_boxes_are_pooled_from_the_level_of_their_size():
    maps = [torch.full((1, 1, 256 // stride, 256 // stride), float(place)) for place, stride in enumerate(STRIDES)]
    sides = torch.tensor([20.0, 111, 113, 223, 225, 250])
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], 1)
    assert Pooler(7, STRIDES)(maps, [boxes])[:, 0, 3, 3].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("make", [mask_rcnn, cascade_mask_rcnn, retinanet], ids=lambda make: make.__name__)
def test_every_parameter_learns_and_images_without_boxes_do_no_harm(make):
    torch.manual_seed(0)
    options = {} if make is retinanet else {"width": 16, "sampled": 16}
    body = make_body("resnet18", strides=RETINANET_STRIDES if make is retinanet else STRIDES)
    model = make(body, CLASSES, channels=16, **options).train()
    sizes = torch.tensor([[96, 128], [128, 100]])
    images = torch.randn(2, 3, 128, 128)
    sum(model(images, sizes, targets_of(sizes.tolist())).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    empty = targets_of([(96, 128)])
    losses = model(images[:1], sizes[:1], empty)
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert float(losses["box" if make is retinanet else "s0.box"]) == 0
    model.eval()
    for part in (model, getattr(model, "roi_heads", model)):
        part.threshold = 0.0
    with torch.no_grad():
        for one, (height, width) in zip(model(images, sizes), sizes.tolist()):
            assert len(one["boxes"]) == len(one["scores"]) > 0 and one["labels"].max() < CLASSES
            assert (one["boxes"] <= torch.tensor([width, height] * 2)).all() and (one["boxes"] >= 0).all()
            assert (one["scores"].diff() <= 0).all()
            assert make is retinanet or one["masks"].shape == (len(one["boxes"]), 28, 28)


def test_half_precision_does_not_move_anchors():
    torch.manual_seed(0)
    model = mask_rcnn(make_body("resnet18"), CLASSES, channels=16, width=16).eval()
    sizes = torch.tensor([[128, 128]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = model.pyramid(torch.randn(1, 3, 128, 128))
        images = ImageList(torch.zeros(1, 3, 128, 128), sizes.tolist())
        proposals, _ = model.rpn(images, named(maps))
    assert maps[0].dtype == torch.bfloat16 and proposals[0].dtype == torch.float32
    assert not torch.equal(proposals[0], proposals[0].bfloat16().float())


@pytest.mark.parametrize(("make", "trained_on"), [(mask_rcnn, 1000), (cascade_mask_rcnn, 2000)])
def test_the_second_stage_sees_as_many_proposals_as_are_set(make, trained_on):
    """mmdetection's numbers by default: 2,000 of a level before suppression in training, 1,000 in testing."""
    torch.manual_seed(0)
    sizes, images = [(96, 96)], torch.randn(1, 3, 96, 96)
    for proposals, before, after in ((None, (2000, 1000), (trained_on, 1000)), (24, (48, 48), (24, 24))):
        options = {} if proposals is None else {"proposals": proposals}
        model = make(make_body("resnet18"), CLASSES, channels=16, width=16, sampled=16, **options)
        model.rpn.nms_thresh = 1.0  # so that none is suppressed
        for mode in (True, False):
            model.train(mode)
            assert model.rpn.pre_nms_top_n() == before[not mode]
            assert model.rpn.post_nms_top_n() == after[not mode]
            maps = model.pyramid(images)
            found, _ = model.rpn(ImageList(images, sizes), named(maps), targets_of([(96, 96)] * 2)[:1])
            anchors = 3 * sum(x.shape[-1] * x.shape[-2] for x in maps)
            assert len(found[0]) == min(after[not mode], anchors)


COSTS = [  # head, body, M parameters, published GFLOPs, whether they count the products inside attention
    ("retinanet", "swin_tiny", 38.46, 245, False),
    ("cascade", "swin_tiny", 85.63, 745, True),
    ("cascade", "swin_small", 106.95, 838, True),
    ("cascade", "swin_base", 144.98, 982, True),
    ("upernet", "swin_tiny", 59.94, 945, True),
    ("upernet", "swin_small", 81.26, 1038, True),
    ("upernet", "swin_base", 121.28, 1188, True),
    ("upernet", "convnext_tiny", 60.24, 939, True),
    ("upernet", "deit_small", 51.78, None, True),
]


@pytest.mark.parametrize(("head", "name", "params", "flops", "attention"), COSTS)
def test_parameters_and_flops_are_those_published(head, name, params, flops, attention):
    def build():
        if head == "upernet":
            return upernet(make_body(name), 150)
        if head == "retinanet":
            return retinanet(make_body(name, strides=RETINANET_STRIDES), 80)
        return cascade_mask_rcnn(make_body(name), 80)

    cost = count(build, *(SEGMENTATION if head == "upernet" else DETECTION))
    assert round(cost.params / 1e6, 2) == params
    if flops is not None:
        counted = cost.flops - (0 if attention else cost.attention)
        assert counted / 1e9 == pytest.approx(flops, rel=0.003)


def test_upernet_counts_ignored_pixels_in_the_mean_and_nowhere_else():
    torch.manual_seed(0)
    model = upernet(make_body("convnext_atto"), 5, 16, 8).eval()
    images = torch.randn(2, 3, 64, 96)
    labels = torch.randint(5, (2, 64, 96))
    labels[:, :, 60:] = 255
    with torch.no_grad():
        found = model(images, None, labels)
        logits = model(images)
    assert logits.shape == (2, 5, 16, 24)
    log = F.interpolate(logits, (64, 96), mode="bilinear").log_softmax(1)
    kept = labels != 255
    picked = log.gather(1, labels.clamp(max=4)[:, None])[:, 0][kept]
    assert float(found["seg"]) == pytest.approx(float(-picked.sum() / labels.numel()), rel=1e-5)


def probabilities(*arguments, **options):
    return [torch.cat(list(bands), 1) for bands in class_probabilities(*arguments, **options)]


def test_a_whole_image_is_segmented_alike_in_any_batch_and_by_scales_and_mirror():
    torch.manual_seed(0)
    model = upernet(make_body("convnext_atto"), 5, 16, 8).eval()
    image = torch.randn(1, 3, 48, 80)
    padded = F.pad(image, (0, 16, 0, 16))
    alone = probabilities(model, image, [(48, 80)], [(60, 100)])[0]
    two = torch.cat([padded, torch.randn(1, 3, 64, 96)])
    batch = probabilities(model, two, [(48, 80), (64, 96)], [(60, 100)] * 2)[0]
    assert alone.shape == (5, 60, 100)
    torch.testing.assert_close(alone, batch)
    # By hand: each scale of the image and of its mirror image by itself, padded to multiples of 32 whose part beyond
    # the image is cut off again, then the mean of what they say.
    wanted = []
    for scale in (0.5, 1.0, 1.5):
        scaled = F.interpolate(image, scale_factor=scale, mode="bilinear", antialias=scale < 1)
        height, width = scaled.shape[-2:]
        for mirrored in (False, True):
            whole = F.pad(scaled.flip(-1) if mirrored else scaled, (0, -width % 32, 0, -height % 32))
            with torch.no_grad():
                logits = F.interpolate(model(whole), whole.shape[-2:], mode="bilinear")[..., :height, :width]
            logits = F.interpolate(logits, (60, 100), mode="bilinear")
            wanted.append((logits.flip(-1) if mirrored else logits).softmax(1)[0])
    both = probabilities(model, image, [(48, 80)], [(60, 100)], scales=(0.5, 1.0, 1.5), flip=True)[0]
    torch.testing.assert_close(both, torch.stack(wanted).mean(0))
    torch.testing.assert_close(
        probabilities(model, image.flip(-1), [(48, 80)], [(60, 100)], flip=True)[0].flip(-1),
        probabilities(model, image, [(48, 80)], [(60, 100)], flip=True)[0],
    )


@pytest.mark.parametrize("out", [(60, 100), (203, 151), (20, 33), (1, 900), (900, 1)])
def test_a_large_original_is_segmented_in_bands_of_rows(monkeypatch, out):
    """A photograph of 24 million pixels has 150 times as many probabilities: 14 GB, and as much again for each step."""
    torch.manual_seed(0)
    model = upernet(make_body("convnext_atto"), 5, 16, 8).eval()
    arguments = model, torch.randn(1, 3, 48, 80), [(48, 80)], [out]
    options = {"scales": (0.5, 1.0), "flip": True}
    with torch.no_grad():
        (whole,), (labels,) = probabilities(*arguments, **options), segment(*arguments, **options)
        assert torch.equal(labels, whole.argmax(0)) and labels.shape == out
        monkeypatch.setattr(upernet_module, "MOST", 3000)
        bands = list(next(class_probabilities(*arguments, **options)))
        assert len(bands) > 1 or out[0] == 1
        assert max(band.numel() for band in bands) <= max(3000, 5 * out[1])
        torch.testing.assert_close(torch.cat(bands, 1), whole)
        (found,) = segment(*arguments, **options)
    assert (found == labels).float().mean() > 0.99


@pytest.mark.parametrize(("name", "height", "width"), [("resnet18", 64, 64), ("vit_tiny_patch16_224", 64, 48)])
def test_an_image_is_taken_as_what_its_body_pads_it_to_and_not_squeezed(name, height, width):
    torch.manual_seed(0)
    model = upernet(make_body(name), 5, 16, 8).eval()
    for layer in (model.classifier[1], model.auxiliary_classifier[1]):
        torch.nn.init.normal_(layer.weight)
    images, labels = torch.randn(1, 3, 50, 40), torch.randint(5, (1, 50, 40))
    border = (0, width - 40, 0, height - 50)
    with torch.no_grad():
        found = model(images, None, labels)
        whole = model(F.pad(images, border), None, F.pad(labels, border, value=255))
        logits = model(images)
    for key in ("seg", "aux"):
        assert float(found[key]) * 50 * 40 == pytest.approx(float(whole[key]) * height * width, rel=1e-5)
    squeezed = F.interpolate(logits, (50, 40), mode="bilinear")
    assert float(F.cross_entropy(squeezed, labels)) != pytest.approx(float(found["seg"]), rel=1e-3)  # negative control
