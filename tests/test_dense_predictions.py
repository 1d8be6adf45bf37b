"""Predictions as files that other programs and this one read again, and what is drawn on pictures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_data import CLASSES, label_map, scenes, write_image
from pycocotools import mask as pycoco
from pycocotools.coco import COCO

from dense.draw import colours, draw_labels, draw_objects
from dense.masks import LabelMaps, read_classes
from dense.predictions import DetectionWriter, LabelWriter, flat_name
from dense.scenes import open_scenes


def detection(scene):
    """Detections of a scene's objects at twice its size, masks 28 x 28 all foreground."""
    boxes = []
    for _, _, mask in scene.objects:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([2 * columns[0], 2 * rows[0], 2 * (columns[-1] + 1), 2 * (rows[-1] + 1)])
    count = len(boxes)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.linspace(0.4, 0.9, count),
        "labels": torch.tensor([label for label, _, _ in scene.objects], dtype=torch.int64),
        "masks": torch.ones(count, 1, 28, 28),
    }


def tensor(scene):
    return torch.from_numpy(scene.image).permute(2, 0, 1)


@pytest.mark.parametrize("masks", [True, False])
def test_detections_are_a_coco_json_that_pycocotools_and_training_read(masks, tmp_path, capsys):
    made = scenes(6)
    writer = DetectionWriter(tmp_path / "out", CLASSES, masks, pictures=True)
    for k, scene in enumerate(made):
        size = tuple(2 * length for length in scene.image.shape[:2])
        writer.add(f"a/{k}.jpg", tensor(scene), detection(scene), size)
        (tmp_path / "out/a").mkdir(exist_ok=True)
        write_image(scene.image, tmp_path / f"out/a/{k}.jpg")
    path = writer.close()
    assert path == tmp_path / "out/predictions.json" and len(list((tmp_path / "out/pictures").iterdir())) == 6
    assert not list((tmp_path / "out").glob("*.tmp"))
    known = COCO(str(path))
    assert [category["name"] for category in known.loadCats(known.getCatIds())] == list(CLASSES)
    content = json.loads(path.read_text())
    assert known.loadRes(content["annotations"]).getAnnIds() == known.getAnnIds()
    first = [record for record in content["annotations"] if record["image_id"] == 1]
    assert [record["score"] for record in first] == sorted((record["score"] for record in first), reverse=True)
    x, y, w, h = first[-1]["bbox"]
    assert [x, y, x + w, y + h] == (detection(made[0])["boxes"][0] / 2).tolist()
    if masks:
        assert pycoco.area(first[-1]["segmentation"]) == w * h
    source = open_scenes("detection", "coco", tmp_path / "out", "predictions.json", train=True, masks=masks)
    assert source.read(0)[1]["labels"].tolist() == detection(made[0])["labels"].flip(0).tolist()


def test_detections_of_a_data_set_keep_its_ids(tmp_path):
    (scene,) = scenes(1)
    writer = DetectionWriter(tmp_path, CLASSES, False, category_ids={0: 2, 1: 7, 2: 40})
    writer.add("x.jpg", tensor(scene), detection(scene), tuple(2 * n for n in scene.image.shape[:2]), image_id=90)
    content = json.loads(writer.close().read_text())
    assert content["images"][0]["id"] == 90 and {c["id"] for c in content["categories"]} == {2, 7, 40}
    assert {record["category_id"] for record in content["annotations"]} <= {2, 7, 40}


def test_label_maps_are_pngs_that_training_reads(tmp_path):
    made = scenes(4)
    writer = LabelWriter(tmp_path / "labels", CLASSES, pictures=True)
    (tmp_path / "images").mkdir()
    for k, scene in enumerate(made):
        write_image(scene.image, tmp_path / f"images/{k}.jpg")
        writer.add(f"{k}.jpg", tensor(scene), torch.from_numpy(label_map(scene)))
    assert read_classes(tmp_path / "labels/classes.txt") == list(CLASSES)
    source = LabelMaps(tmp_path / "images", tmp_path / "labels", CLASSES)
    for k, scene in enumerate(made):
        assert np.array_equal(source.read(k)[1].numpy(), label_map(scene))
        shown = np.array(Image.open(tmp_path / f"labels/{k}.png").convert("RGB"))
        assert all((shown[mask] == colours(3)[label]).all() for label, _, mask in scene.objects)
    assert len(list((tmp_path / "labels/pictures").iterdir())) == 4


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--predict_to .*file cannot be a folder"):
        DetectionWriter(tmp_path / "file", CLASSES, False)


def test_names_of_images_in_folders_do_not_meet():
    assert flat_name("a/b.jpg") == "a_b" != flat_name("b.jpg") and flat_name("/tmp/x.y.png") == "tmp_x.y"


def test_objects_are_drawn_in_the_colours_of_their_classes():
    image = torch.full((3, 120, 160), 100, dtype=torch.uint8)
    before = image.clone()
    masks = torch.zeros(1, 120, 160)
    masks[0, 60:90, 70:90] = 1
    out = draw_objects(image, torch.tensor([[20.0, 30.0, 100.0, 110.0]]), torch.tensor([1]), CLASSES, masks=masks)
    colour = torch.tensor(colours(3)[1], dtype=torch.uint8)
    assert torch.equal(image, before) and out.dtype == torch.uint8
    assert torch.equal(out[:, 80, 20], colour) and torch.equal(out[:, 110, 60], colour)
    mixed = (colour.float() + 100) / 2
    assert (out[:, 75, 80].float() - mixed).abs().max() <= 1
    assert torch.equal(out[:, 5, 5], before[:, 5, 5]) and torch.equal(out[:, 100, 40], before[:, 0, 0])


@pytest.mark.parametrize("box", [[-40.0, -40.0, 500.0, 500.0], [10.2, 10.2, 10.3, 10.3], [159.9, 119.9, 160.0, 120.0]])
def test_any_box_can_be_drawn(box):
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    assert draw_objects(image, torch.tensor([box]), torch.tensor([0]), CLASSES, torch.tensor([0.5])).any()
    assert torch.equal(draw_objects(image, torch.zeros(0, 4), torch.zeros(0).long(), CLASSES), image)


def test_label_maps_are_drawn_half_over_the_image():
    image = torch.full((3, 4, 6), 80, dtype=torch.uint8)
    labels = torch.full((4, 6), 255, dtype=torch.uint8)
    labels[:2] = 2
    out = draw_labels(image, labels, 3)
    assert (out[:, 2:] == 80).all()
    assert (out[:, 0, 0].float() - (torch.tensor(colours(3)[2]) + 80) / 2).abs().max() <= 0.5


def test_colours_of_classes_differ_and_stay():
    assert len(set(colours(150))) == 150 and colours(150)[:5] == colours(5)


def test_images_that_differ_in_their_ending_alone_are_not_written_over(tmp_path):
    labels, detections = LabelWriter(tmp_path / "labels", CLASSES, pictures=True), []
    made = scenes(3)
    for name, scene in zip(("a.jpg", "a.png", "x/../a.jpg"), made):
        labels.add(name, tensor(scene), torch.from_numpy(label_map(scene)))
        detections.append(name)
    shown = {path.name for path in (tmp_path / "labels").glob("*.png")}
    assert {"a.png", "a.png.png"} < shown and len(shown) == 3
    assert len(list((tmp_path / "labels/pictures").iterdir())) == 3
    writer = DetectionWriter(tmp_path / "boxes", CLASSES, False, pictures=True)
    for name, scene in zip(detections, made):
        writer.add(name, tensor(scene), detection(scene), tuple(2 * n for n in scene.image.shape[:2]))
    assert len(list((tmp_path / "boxes/pictures").iterdir())) == 3
