"""The dense demo's scenes: masks against pixels, the two kinds of annotation against each other, determinism."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco
from pycocotools.coco import COCO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import demo_scenes

from dense.scenes import open_scenes


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "set"
    return out, demo_scenes.build(out, seed=0, train=16, val=4)


def test_boxes_masks_and_label_maps_say_the_same(built):
    """Each pixel of a label map is the class of the one object that shows there, and pycocotools reads the file."""
    out, counts = built
    covered = 0
    for split, scenes in (("training", 16), ("validation", 4)):
        known = COCO(str(out / "annotations" / f"instances_{split}.json"))
        assert len(known.imgs) == scenes and len(known.anns) == counts[split] >= 2 * scenes
        for number, image in known.imgs.items():
            labels = np.array(Image.open(out / "annotations" / split / f"{number:04d}.png"))
            picture = Image.open(out / "images" / split / image["file_name"])
            assert picture.size == (image["width"], image["height"]) == labels.shape[::-1]
            expected = np.ones(labels.shape, int)
            for record in known.loadAnns(known.getAnnIds(number)):
                mask = known.annToMask(record).astype(bool)
                x, y, w, h = record["bbox"]
                around = pycoco.toBbox(known.annToRLE(record))
                assert np.abs(around - [x, y, w, h]).max() <= 2 and abs(mask.sum() - record["area"]) < 0.1 * mask.sum()
                expected[mask] = record["category_id"] + 1
                covered += isinstance(record["segmentation"], dict)
            assert (expected != labels).mean() < 0.02
    assert covered > 3


def test_both_tasks_open_the_folder(built):
    detection = open_scenes("detection", "coco", built[0], "training", train=True, masks=True)
    segmentation = open_scenes("segmentation", "ade20k", built[0], "validation", train=False)
    assert detection.classes == list(demo_scenes.CLASSES) and segmentation.classes == ["background", *detection.classes]
    assert len(detection) == 16 and len(segmentation) == 4
    assert not detection.faults and set(segmentation.read(0)[1].unique().tolist()) <= set(range(6))


def test_the_same_seed_gives_the_same_files_and_another_one_others(built, tmp_path):
    demo_scenes.build(tmp_path / "again", seed=0, train=16, val=4)
    assert digest(tmp_path / "again") == digest(built[0])
    demo_scenes.build(tmp_path / "other", seed=1, train=2, val=1)
    assert not {name for name, _ in digest(tmp_path / "other").items() & digest(built[0]).items() if "jpg" in name}


def test_a_finished_set_is_kept_and_another_one_not_overwritten(built, tmp_path):
    assert demo_scenes.build(built[0], seed=0, train=16, val=4) == built[1]
    with pytest.raises(FileExistsError, match="already holds something else"):
        demo_scenes.build(built[0], seed=0, train=17, val=4)


def test_pixels_of_an_object_come_from_its_photograph(built):
    """A coin is grey and a cup is not, wherever they lie."""
    content = json.loads((built[0] / "annotations/instances_training.json").read_text())
    colours = {"coin": [], "cup": []}
    for record in content["annotations"]:
        name = demo_scenes.CLASSES[record["category_id"] - 1]
        if name in colours:
            x, y, w, h = record["bbox"]
            image = Image.open(built[0] / "images/training" / f"{record['image_id']:04d}.jpg")
            pixels = np.array(image.crop((x + w // 3, y + h // 3, x + 2 * w // 3, y + 2 * h // 3))).astype(int)
            colours[name].append((pixels.max(-1) - pixels.min(-1)).mean())
    assert np.median(colours["coin"]) < 10 < 40 < np.median(colours["cup"])
