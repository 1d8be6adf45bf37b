"""Joint transforms: boxes against the masks that went with them, sizes against the rule, the batch's padding."""

import random

import cv2
import numpy as np
import pytest
import torch

from dense.transforms import (
    IGNORED,
    PAD,
    DetectionTest,
    DetectionTrain,
    SegmentationTest,
    SegmentationTrain,
    collate,
    distort,
    fitted,
    resize_labels,
    scaled,
)


def scene(rng, height, width, count=3):
    """An image that shows its masks in its first channel, and their boxes."""
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    boxes = []
    for k in range(count):
        h, w = rng.randint(12, height // 2), rng.randint(12, width // 2)
        top, left = rng.randint(0, height - h), rng.randint(0, width - w)
        masks[k, top : top + h, left : left + w] = 1
        boxes.append([left, top, left + w, top + h])
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = 255 * masks.amax(0)
    labels = torch.arange(count)
    return image, {"boxes": torch.tensor(boxes).float(), "labels": labels, "masks": masks, "image_id": 4}


def box_of(mask):
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


@pytest.mark.parametrize("size", [128, 64])
def test_boxes_stay_around_their_masks(size):
    """Two hundred seeds of both policies, at the base size and at half of it."""
    transform = DetectionTrain(128, sides=(96, 128, 160), max_side=500)
    sides, cropped = set(), 0
    for seed in range(200):
        rng = random.Random(seed)
        start = scene(rng, rng.randint(90, 260), rng.randint(90, 260))
        image, target = transform(start, size, seed)
        masks, boxes = target["masks"], target["boxes"]
        assert image.shape[1:] == masks.shape[1:] and image.dtype == masks.dtype == torch.uint8
        assert len(boxes) == len(masks) == len(target["labels"]) and target["image_id"] == 4
        for mask, box in zip(masks, boxes):
            assert (box_of(mask) - box).abs().max() <= 1
        shown = image[0].float() / 255
        assert (shown - masks.amax(0).float() if len(masks) else shown).abs().mean() < 0.05
        cropped += len(masks) < 3
        sides.add(min(image.shape[1:]) if max(image.shape[1:]) < scaled(500, size, 128) else None)
        again = transform(start, size, seed)
        assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], boxes)
    assert sides - {None} == {scaled(side, size, 128) for side in (96, 128, 160)}


def test_crops_of_policy_b_cut_objects_away():
    rng = random.Random(0)
    start = scene(rng, 700, 1100, count=6)
    counts = {len(DetectionTrain(800)(start, 800, seed)[1]["boxes"]) for seed in range(40)}
    assert min(counts) < 6 and 6 in counts
    whole = {len(DetectionTrain(800, crop_prob=0)(start, 800, seed)[1]["boxes"]) for seed in range(10)}
    assert whole == {6}


def test_flips_happen_for_half_of_the_seeds():
    start = scene(random.Random(1), 100, 150)
    transform = DetectionTrain(100, sides=(100,), max_side=200, crop_prob=0)
    first = [transform(start, 100, seed)[1]["boxes"][0, 0].item() for seed in range(200)]
    left = start[1]["boxes"][0, 0].item()
    assert set(first) == {left, 150 - start[1]["boxes"][0, 2].item()}
    assert 70 < first.count(left) < 130


def test_no_objects_no_masks():
    image, target = scene(random.Random(0), 100, 120, count=1)
    empty = {**target, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": target["masks"][:0]}
    for seed in range(6):
        out, result = DetectionTrain(128, sides=(96,), max_side=200)((image, empty), 64, seed)
        assert result["boxes"].shape == (0, 4) and result["masks"].shape == (0, *out.shape[1:])
        assert DetectionTrain(128, (96,), 200)((image, {**target, "masks": None}), 128, seed)[1]["masks"] is None


def test_sizes_of_the_test_image():
    # mmcv's rule: the factor that fits both bounds, halves up
    for height, width, expected in ((480, 640, (800, 1067)), (427, 640, (800, 1199)), (300, 900, (444, 1333))):
        assert fitted(height, width, 800, 1333) == expected
        image, target = DetectionTest()((torch.zeros(3, height, width, dtype=torch.uint8), None))
        assert image.shape[1:] == expected and target == {"original_size": (height, width)}
    image, target = SegmentationTest()((torch.zeros(3, 300, 1500, dtype=torch.uint8), torch.zeros(300, 1500)))
    assert image.shape[1:] == (410, 2048) and target["label"].shape == (300, 1500)


def test_sides_of_the_dense_curriculum():
    assert [scaled(side, 400, 800) for side in (480, 512, 800, 1333)] == [256, 256, 416, 672]
    assert [scaled(512, size, 512) for size in (256, 384, 512)] == [256, 384, 512]
    assert scaled(1333, 800, 800) == 1333


def test_labels_are_resized_to_the_nearest_pixel():
    labels = torch.randint(0, 5, (37, 53), dtype=torch.uint8)
    out = resize_labels(labels, (74, 106))
    assert torch.equal(out, labels.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_segmentation_crops_show_what_their_labels_say():
    rng = np.random.default_rng(0)
    for seed in range(40):
        height, width = rng.integers(60, 200, 2)
        labels = torch.zeros(int(height), int(width), dtype=torch.uint8)
        labels[: height // 2, : width // 3] = 1
        labels[height // 2 :, : width // 3] = 2
        image = labels[None].expand(3, -1, -1) * 100
        transform = SegmentationTrain(128, crop=96, side=100, max_side=300, distort=False)
        for size, crop in ((128, 96), (64, 64)):
            out, target = transform((image, labels), size, seed)
            assert out.shape == (3, crop, crop) and target.shape == (crop, crop)
            shown = target != IGNORED
            assert ((out[0].float() / 100 - target.float()).abs()[shown] > 0.5).float().mean() < 0.06
            assert (out.permute(1, 2, 0)[~shown] == torch.tensor(PAD)).all()


def test_a_class_fills_no_more_than_its_share_of_a_crop_if_that_can_be():
    labels = torch.zeros(200, 200, dtype=torch.uint8)
    labels[:30] = 1
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    options = {"crop": 64, "side": 200, "max_side": 200, "ratio": (1, 1), "distort": False}

    def shares(**more):
        transform = SegmentationTrain(64, **options, **more)
        return [(transform((image, labels), 64, seed)[1] == 0).float().mean().item() for seed in range(60)]

    assert np.mean([share > 0.75 for share in shares()]) < 0.3 < np.mean([s > 0.75 for s in shares(cat_max_ratio=1.1)])


def test_photometric_distortion_against_the_formulas():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    changed, seen = 0, 0
    for seed in range(300):
        out = distort(image, random.Random(seed)).permute(1, 2, 0).numpy()
        changed += not np.array_equal(out, pixels)
        rng = random.Random(seed)
        shift = rng.uniform(-32, 32) if rng.random() < 0.5 else 0
        contrast = rng.random() < 0.5 and rng.uniform(0.5, 1.5)
        rng.random()
        colours = [rng.random() < 0.5 and rng.uniform(0.5, 1.5), rng.random() < 0.5]
        if not any(colours):
            bright = np.clip(pixels + np.float32(shift), 0, 255).astype(np.uint8).astype(np.float32)
            bright = np.clip(bright * (contrast or 1), 0, 255).astype(np.uint8)
            assert np.array_equal(out, bright)
            seen += 1
    assert seen > 40 and 250 < changed < 300
    grey = torch.full((3, 4, 4), 90, dtype=torch.uint8)  # saturation and hue leave grey as it is
    assert all(len(distort(grey, random.Random(seed)).unique()) == 1 for seed in range(30))
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 0].astype(int)
    shifts = set()
    for seed in range(60):
        out = cv2.cvtColor(distort(image, random.Random(seed)).permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2HSV)
        shifts.add(int(np.median((out[..., 0].astype(int) - hsv + 90) % 180 - 90)))
    assert -19 <= min(shifts) < -8 and 8 < max(shifts) <= 18


def test_the_batch_is_padded_to_a_multiple_with_the_mean_colour():
    samples = [(torch.full((3, h, w), 7, dtype=torch.uint8), {"k": k}) for k, (h, w) in enumerate([(40, 70), (65, 30)])]
    images, sizes, targets = collate(samples)
    assert images.shape == (2, 3, 96, 96) and sizes.tolist() == [[40, 70], [65, 30]] and sizes.dtype == torch.int64
    assert targets == [{"k": 0}, {"k": 1}]
    for image, (height, width) in zip(images, sizes.tolist()):
        assert (image[:, :height, :width] == 7).all()
        outside = torch.ones(96, 96, dtype=torch.bool)
        outside[:height, :width] = False
        assert (image.permute(1, 2, 0)[outside] == torch.tensor(PAD)).all()
    labels = collate([(image, torch.ones(image.shape[1:], dtype=torch.uint8)) for image, _ in samples])[2]
    assert labels.shape == (2, 96, 96) and labels.dtype == torch.int64 and labels.unique().tolist() == [1, 255]


@pytest.mark.parametrize("options", [{"sides": ()}, {"sides": (0,)}, {"max_side": 600}])
def test_sides_that_cannot_work(options):
    with pytest.raises(ValueError, match="--train_sides"):
        DetectionTrain(800, **options)
    with pytest.raises(ValueError, match="--crop is 0"):
        SegmentationTrain(512, crop=0)
