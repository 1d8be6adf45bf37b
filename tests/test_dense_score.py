"""Scores of detections and label maps: known cases, pycocotools and loops as oracles, one and two processes."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dense_data
from pycocotools import mask as pycoco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dense.scenes import open_scenes
from dense.score import (
    COCO_NUMBERS,
    DetectionScorer,
    SegmentationScorer,
    coco_results,
    coco_scores,
    confusion,
    paste,
    to_original,
)
from dense.tasks import eval_loader
from dense.transforms import DetectionTest, SegmentationTest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    dense_data.write_coco(root / "coco", dense_data.scenes())
    dense_data.write_masks(root / "masks", dense_data.scenes())
    return root


def open_source(root, masks=True):
    return open_scenes("detection", "coco", root / "coco", "train", train=False, masks=masks)


def perfect(source, i, size, side=112):
    """What a detector would say that knows image ``i``, in the pixels of the resized image."""
    image, target = source.read(i)
    scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
    soft = torch.zeros(len(target["boxes"]), side, side)
    for place, (box, mask) in enumerate(zip(target["boxes"], target["masks"])):
        left, top, right, bottom = box.int().tolist()
        cut = mask[None, None, top:bottom, left:right].float()
        soft[place] = torch.nn.functional.interpolate(cut, (side, side), mode="bilinear")[0, 0]
    return {
        "boxes": target["boxes"] * scale,
        "scores": torch.linspace(0.9, 0.5, len(target["boxes"])),
        "labels": target["labels"],
        "masks": soft,
    }


def fill(scorer, source, rank=0, world_size=1, change=lambda detection: detection):
    for _, scenes, _ in eval_loader(source, DetectionTest(140, 200), rank, world_size, 0, False):
        sizes, targets = scenes.sizes, scenes.targets
        found = [change(perfect(source, t["index"], size)) for t, size in zip(targets, sizes.tolist())]
        scorer.add(found, targets, sizes)
    return scorer


def test_perfect_detections_score_everything(root):
    source = open_source(root)
    scores = fill(DetectionScorer(source, True), source).scores()
    # The detector also finds the crowd, which counts neither for nor against it.
    assert (
        scores["images"] == 24 and scores["box_AP"] == pytest.approx(100) and scores["mask_AP50"] == pytest.approx(100)
    )
    assert scores["mask_AP"] > 93  # soft masks of 112 x 112 lose a little of the edges
    assert set(scores["per_class"]) == {"disc", "box", "triangle"}
    assert all(set(row) == {"box_AP", "mask_AP"} and row["box_AP"] > 99 for row in scores["per_class"].values())
    assert scores["box_AP_large"] is None  # no object is that large


def test_boxes_of_a_known_overlap(root):
    """Boxes 0.72 as wide, same height: IoU .72, so .50 to .70 match and .75 to .95 do not."""
    source = open_source(root, masks=False)

    def narrow(detection):
        boxes = detection["boxes"].clone()
        middle, half = (boxes[:, 0] + boxes[:, 2]) / 2, 0.36 * (boxes[:, 2] - boxes[:, 0])
        boxes[:, 0], boxes[:, 2] = middle - half, middle + half
        return {**detection, "boxes": boxes}

    with_masks = open_source(root)
    scorer = DetectionScorer(source, False)
    for _, scenes, _ in eval_loader(source, DetectionTest(140, 200), 0, 1, 0, False):
        sizes, targets = scenes.sizes, scenes.targets
        found = [narrow(perfect(with_masks, t["index"], size)) for t, size in zip(targets, sizes.tolist())]
        scorer.add(found, targets, sizes)
    scores = scorer.scores()
    assert (scores["box_AP50"], scores["box_AP75"]) == (pytest.approx(100), 0)
    assert scores["box_AP"] == pytest.approx(50) and "mask_AP" not in scores


def test_labels_that_are_wrong_score_nothing(root):
    source = open_source(root, masks=True)
    wrong = fill(
        DetectionScorer(source, False), source, change=lambda found: {**found, "labels": (found["labels"] + 1) % 3}
    ).scores()
    assert wrong["box_AP"] < 5
    nothing = fill(
        DetectionScorer(source, False), source, change=lambda found: {key: part[:0] for key, part in found.items()}
    ).scores()
    assert nothing["box_AP"] == 0 and nothing["per_class"]["disc"]["box_AP"] == 0


def random_case(rng):
    """A ground truth and results of a few images and categories, with crowds, ties, misses and empty images."""
    images = [{"id": int(k), "height": 60, "width": 80} for k in rng.choice(1000, rng.integers(1, 5), replace=False)]
    categories = [{"id": int(k), "name": str(k)} for k in rng.choice(90, rng.integers(1, 4), replace=False)]
    annotations, results = [], []

    def rle(box):
        mask = np.zeros((60, 80), np.uint8)
        x, y, w, h = (int(v) for v in box)
        mask[y : y + h + 1, x : x + w + 1] = rng.random((len(mask[y : y + h + 1]), min(w + 1, 80 - x))) < 0.9
        out = pycoco.encode(np.asfortranarray(mask))
        return {"size": out["size"], "counts": out["counts"].decode()}, int(mask.sum())

    for image in images:
        for category in categories:
            for _ in range(rng.integers(0, 4)):
                box = [*rng.uniform(0, 40, 2), *rng.uniform(3, 38 if rng.random() < 0.5 else 12, 2)]
                box = [
                    float(min(value, 79 - box[0] if k == 2 else 59 - box[1] if k == 3 else 79))
                    for k, value in enumerate(box)
                ]
                mask, area = rle(box)
                record = {"image_id": image["id"], "category_id": category["id"], "bbox": box, "segmentation": mask}
                crowd = int(rng.random() < 0.15)
                annotations.append({**record, "id": len(annotations) + 1, "area": area, "iscrowd": crowd})
                for _ in range(rng.integers(0, 3)):
                    moved = [float(max(0.0, value + shift)) for value, shift in zip(box, rng.normal(0, 2, 4))]
                    moved = [moved[0], moved[1], min(moved[2] + 1, 79 - moved[0]), min(moved[3] + 1, 59 - moved[1])]
                    results.append(
                        {
                            **record,
                            "bbox": moved,
                            "segmentation": rle(moved)[0],
                            "score": float(rng.integers(1, 9) / 10),
                        }
                    )
    return {"images": images, "annotations": annotations, "categories": categories}, results


def test_the_twelve_numbers_are_pycocotools():
    rng, compared = np.random.default_rng(0), 0
    for _ in range(200):
        truth, results = random_case(rng)
        if not results or not truth["annotations"]:
            continue
        for kind in ("bbox", "segm"):
            with contextlib.redirect_stdout(io.StringIO()):
                known = COCO()
                known.dataset = truth
                known.createIndex()
                given = [{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in results]
                theirs = COCOeval(known, known.loadRes(given), kind)
                theirs.evaluate()
                theirs.accumulate()
                theirs.summarize()
            numbers, classes = coco_scores(truth, results, kind)
            expected = [None if value < 0 else 100 * value for value in theirs.stats]
            assert [numbers[key] for key in COCO_NUMBERS] == expected
            for place, number in enumerate(theirs.params.catIds):
                part = theirs.eval["precision"][:, :, place, 0, 2]
                part = part[part > -1]
                assert classes[number] == (pytest.approx(100 * part.mean()) if len(part) else None)
            compared += 1
    assert compared > 300


def test_detections_return_to_the_original_image():
    found = {
        "boxes": torch.tensor([[10.0, 20.0, 50.0, 60.0], [-5.0, 0.0, 400.0, 30.0]]),
        "scores": torch.tensor([0.2, 0.7]),
        "labels": torch.tensor([1, 0]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    back = to_original(found, (100, 200), (50, 400), masks=True)
    assert back["boxes"].tolist() == [[20, 10, 100, 30], [0, 0, 400, 15]]
    first, second = coco_results(back, 7, {0: 90, 1: 3})
    assert first["category_id"] == 90 and second["bbox"] == [20, 10, 80, 20] and first["score"] == pytest.approx(0.7)
    mask = pycoco.decode(second["segmentation"])
    assert mask.shape == (50, 400) and mask.sum() == pytest.approx(80 * 20, rel=0.1)
    assert mask[12:29, 22:99].all() and not mask[:, :19].any() and not mask[33:].any()
    assert coco_results(back, 7, {0: 90}) == [first]


def test_masks_are_pasted_where_their_values_lie():
    """Against the bilinear formula at every pixel's centre, in boxes at any place, some beyond the image."""
    rng = np.random.default_rng(0)
    boxes = np.stack([rng.uniform(-10, 50, 20), rng.uniform(-10, 40, 20)], 1)
    boxes = np.concatenate([boxes, boxes + rng.uniform(0.4, 40, (20, 2))], 1)
    soft = rng.random((20, 6, 6)) < 0.6
    found = paste(torch.from_numpy(soft).float()[:, None], torch.from_numpy(boxes).float(), (45, 60))
    assert len(found) == 20 and paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), (45, 60)) == []
    for rle, cells, (left, top, right, bottom) in zip(found, soft, boxes):
        padded = np.pad(cells.astype(float), 1)
        expected = np.zeros((45, 60))
        for row in range(45):
            for column in range(60):
                y, x = (row + 0.5 - top) / (bottom - top) * 6 + 0.5, (column + 0.5 - left) / (right - left) * 6 + 0.5
                if 0 <= y < 7 and 0 <= x < 7:
                    i, j = int(y), int(x)
                    wy, wx = np.array([1 - (y - i), y - i]), np.array([1 - (x - j), x - j])
                    expected[row, column] = wy @ padded[i : i + 2, j : j + 2] @ wx
        near = np.abs(expected - 0.5) < 1e-4
        assert ((pycoco.decode(rle) == (expected >= 0.5)) | near).all()


def test_confusion_is_what_loops_count():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 6, (40, 30), generator=generator)
    label[label == 5] = 255
    prediction = torch.randint(0, 5, (40, 30), generator=generator)
    expected = np.zeros((5, 5), int)
    for row in range(40):
        for column in range(30):
            if label[row, column] != 255:
                expected[label[row, column], prediction[row, column]] += 1
    assert np.array_equal(confusion(prediction, label.to(torch.uint8), 5).numpy(), expected)


def label_scores(root, change, rank=0, world_size=1):
    source = open_scenes("segmentation", "masks", root / "masks", "train", train=False)
    scorer = SegmentationScorer(source)
    for _, scenes, _ in eval_loader(source, SegmentationTest(100, 300), rank, world_size, 0, False):
        targets = scenes.targets
        scorer.add([change(target["label"].long()) for target in targets], targets)
    return scorer


def test_iou_of_known_predictions(root):
    scores = label_scores(root, lambda label: label).scores()
    assert scores["mIoU"] == scores["mAcc"] == scores["aAcc"] == 100 and scores["images"] == 24
    background = label_scores(root, lambda label: torch.full_like(label, 3)).scores()
    share = background["aAcc"]
    assert background["per_class"]["background"] == {"IoU": pytest.approx(share), "Acc": 100}
    assert background["mIoU"] == pytest.approx(share / 4) and background["per_class"]["disc"] == {"IoU": 0, "Acc": 0}
    merged = label_scores(root, lambda label: torch.where(label == 0, 1, label)).scores()
    assert merged["per_class"]["disc"]["IoU"] == 0 and merged["per_class"]["triangle"]["IoU"] == 100


def test_a_class_that_neither_occurs_nor_is_predicted_does_not_count(root):
    scorer = label_scores(root, lambda label: label)
    scorer.matrix[2] = scorer.matrix[:, 2] = 0
    scores = scorer.scores()
    assert scores["per_class"]["triangle"] == {"IoU": None, "Acc": None} and scores["mIoU"] == 100


def test_label_maps_without_a_class_are_no_score(root):
    scorer = label_scores(root, lambda label: label)
    scorer.matrix.zero_()
    with pytest.raises(ValueError, match=r"no pixel of the 24 label maps has a class.*masks/train/000.png"):
        scorer.scores()


@pytest.mark.parametrize("fault", ["twice", "left out"])
def test_an_image_scored_twice_or_not_at_all_is_an_error(fault, root):
    source = open_source(root)
    scorer = fill(DetectionScorer(source, False), source)
    scorer.seen = scorer.seen + scorer.seen[:1] if fault == "twice" else scorer.seen[1:]
    with pytest.raises(RuntimeError, match=r"but the data set has 24; image 10 (more than once|not at all)"):
        scorer.scores()


def process(rank, root, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    source = open_source(root)
    detection = fill(DetectionScorer(source, True), source, rank, 2, worse).scores()
    labels = label_scores(root, shifted, rank, 2).scores()
    torch.save((detection, labels), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def worse(found):
    generator = torch.Generator().manual_seed(len(found["boxes"]))
    return {**found, "boxes": found["boxes"] + torch.randn(found["boxes"].shape, generator=generator) * 4}


def shifted(label):
    return label.roll(3, 1)


def test_two_processes_score_what_one_does(root, tmp_path):
    mp.spawn(process, (root, tmp_path), 2)
    source = open_source(root)
    alone = fill(DetectionScorer(source, True), source, change=worse).scores()
    assert 0 < alone["box_AP"] < 90
    expected = (alone, label_scores(root, shifted).scores())
    assert all(torch.load(tmp_path / f"{rank}.pth", weights_only=False) == expected for rank in (0, 1))
