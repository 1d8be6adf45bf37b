"""Dense data sets: what is read against scenes whose objects are known; every kind of fault named, counted, bounded."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dense_data
from dense_data import CATEGORY_IDS, CLASSES, COMPRESSED, CROWD, EMPTY, TURNED, scenes
from pycocotools import mask as pycoco

from curriculum import CurriculumSampler, build_plan
from dense.annotations import BadAnnotation, check_segmentation, decode_counts, to_rle
from dense.reading import read_image, upright_size
from dense.scenes import TrainScenes, open_scenes
from dense.tasks import Scenes, eval_loader, training_batches
from dense.transforms import DetectionTest, DetectionTrain, SegmentationTrain
from inputs.bad_files import BadFiles
from inputs.decode import BadImage


@pytest.fixture(scope="module")
def made():
    return scenes()


@pytest.fixture(scope="module")
def coco(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    dense_data.write_coco(root, made)
    dense_data.write_coco(root, scenes(8, seed=1), "val", first_id=500)
    return root


def open_coco(root, split="train", train=True, masks=True, **more):
    return open_scenes("detection", "coco", root, split, train=train, masks=masks, **more)


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_coco_is_read_as_it_was_made(coco, made, capsys):
    source = open_coco(coco)
    assert "1 of 24 images have no box" in capsys.readouterr().err
    assert source.classes == list(CLASSES) and source.category_ids == dict(enumerate(CATEGORY_IDS))
    kept = [k for k in range(24) if k != EMPTY]
    assert source.ids == [10 + 3 * k for k in kept] and not source.faults
    for place, k in enumerate(kept):
        image, target = source.read(place)
        assert image.shape[1:] == made[k].image.shape[:2]
        assert (image.permute(1, 2, 0).float() - torch.from_numpy(made[k].image).float()).abs().mean() < 6
        assert target["labels"].tolist() == [label for label, _, _ in made[k].objects]  # no crowd
        assert target["image_id"] == 10 + 3 * k
        for box, mask, (_, _, true) in zip(target["boxes"], target["masks"].numpy(), made[k].objects):
            assert box.tolist() == box_of(true)
            overlap = (mask & true).sum() / (mask | true).sum()
            assert overlap == 1 if k in COMPRESSED else overlap > 0.85


def test_scoring_keeps_crowds_and_images_without_boxes(coco):
    source = open_coco(coco, train=False)
    assert len(source) == 24 and source.read(EMPTY)[1]["boxes"].shape == (0, 4)
    assert source.read(EMPTY)[1]["masks"].shape[0] == 0
    truth = source.ground_truth()
    crowds = [record for record in truth["annotations"] if record["iscrowd"]]
    assert len(crowds) == 1 and crowds[0]["image_id"] == 10 + 3 * CROWD
    height, width = crowds[0]["segmentation"]["size"]
    assert pycoco.area(crowds[0]["segmentation"]) == (height - height // 2) * (width - width // 4)
    assert [record["id"] for record in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))


def test_masks_are_pycocotools(coco):
    content = json.loads((coco / "annotations/instances_train.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    kinds = set()
    for record in content["annotations"]:
        segmentation, (height, width) = record["segmentation"], sizes[record["image_id"]]
        if isinstance(segmentation, list):
            theirs = pycoco.merge(pycoco.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            theirs = pycoco.frPyObjects(segmentation, height, width)
        else:
            theirs = segmentation
            assert decode_counts(segmentation["counts"]) == dense_data.runs(pycoco.decode(segmentation) > 0)
        kinds.add(type(segmentation["counts"] if isinstance(segmentation, dict) else segmentation))
        ours = to_rle(segmentation, height, width)
        assert np.array_equal(pycoco.decode(ours), pycoco.decode(theirs))
    assert kinds == {list, str}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_only_to_the_size_that_was_annotated(orientation, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert np.array_equal(read_image(tmp_path / "a.png", (5, 9), "x"), pixels)
    assert np.array_equal(read_image(tmp_path / "a.png", None), turned)
    assert upright_size(tmp_path / "a.png") == turned.shape[:2]
    if orientation > 4:
        assert np.array_equal(read_image(tmp_path / "a.png", (9, 5), "x"), turned)
    else:
        with pytest.raises(BadImage, match=r"the image is 9 x 5 pixels, but x is for 5 x 9"):
            read_image(tmp_path / "a.png", (9, 5), "x")


def test_the_turned_scene_is_on_its_side_in_the_file(coco, made):
    stored = Image.open(coco / f"train/scene_{TURNED:02d}.jpg").size
    assert stored == made[TURNED].image.shape[:2] != stored[::-1]


def test_validation_follows_the_training_set_s_classes(coco, tmp_path, made):
    classes = ["triangle", "more", "disc", "box"]
    source = open_coco(coco, "val", train=False, classes=classes)
    assert source.category_ids == {2: 2, 3: 7, 0: 40}
    with pytest.raises(ValueError, match=r"1 categories that the training set lacks: box"):
        open_coco(coco, "val", train=False, classes=["triangle", "disc"])


@pytest.mark.parametrize("layout", ["val.json", "annotations/val.json", "val/_annotations.coco.json", "named.json"])
def test_layouts(layout, coco, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    for path in (coco / "val").iterdir():
        (tmp_path / "val" / path.name).symlink_to(path)
    (tmp_path / layout).write_bytes((coco / "annotations/instances_val.json").read_bytes())
    if layout == "named.json":
        (tmp_path / "val").rename(tmp_path / "images")
    source = open_coco(tmp_path, "named.json" if layout == "named.json" else "val", train=False)
    assert len(source) == 8 and source.read(0)[0].shape[0] == 3


def test_voc_is_coco_without_masks(made, tmp_path):
    dense_data.write_voc(tmp_path, made)
    source = open_scenes("detection", "voc", tmp_path, "trainval", train=False)
    assert source.classes == sorted(CLASSES) and len(source) == 24
    for k, scene in enumerate(made):
        target = source.read(k)[1]
        assert [source.classes[label] for label in target["labels"]] == [
            CLASSES[label] for label, _, _ in scene.objects
        ]
        assert target["boxes"].tolist() == [box_of(mask) for _, _, mask in scene.objects]
    difficult = [record["iscrowd"] for record in source.ground_truth()["annotations"] if record["image_id"] == 1]
    assert difficult == [0] * (len(made[0].objects) - 1) + [1]
    training = open_scenes("detection", "voc", tmp_path, "trainval", train=True)
    assert len(training) == 23 and len(training.read(0)[1]["labels"]) == len(made[0].objects) - 1
    with pytest.raises(ValueError, match="has boxes alone"):
        open_scenes("detection", "voc", tmp_path, "trainval", train=True, masks=True)


def test_voc_beside_the_images_and_joined(made, tmp_path):
    for part in ("a", "b"):
        dense_data.write_voc(tmp_path / part, made[:3])
        for path in [*(tmp_path / part / "JPEGImages").iterdir(), *(tmp_path / part / "Annotations").iterdir()]:
            (tmp_path / f"{part}_flat").mkdir(exist_ok=True)
            path.rename(tmp_path / f"{part}_flat" / path.name)
    source = open_scenes("detection", "voc", tmp_path, "a_flat+b_flat", train=True)
    assert len(source) == 6 and torch.equal(source.read(0)[1]["boxes"], source.read(3)[1]["boxes"])


def test_ade20k_and_masks_hold_the_same_labels(made, tmp_path):
    dense_data.write_ade20k(tmp_path / "ade", made)
    ade = open_scenes("segmentation", "ade20k", tmp_path / "ade", "training", train=True)
    assert ade.classes == list(CLASSES) and len(ade) == 24
    for palette in (False, True):
        root = tmp_path / f"masks {palette}"
        dense_data.write_masks(root, made, palette=palette)
        masks = open_scenes("segmentation", "masks", root, "train", train=True)
        assert masks.classes == [*CLASSES, "background"]
        for k, scene in enumerate(made):
            assert np.array_equal(ade.read(k)[1].numpy(), dense_data.label_map(scene))
            assert np.array_equal(masks.read(k)[1].numpy(), dense_data.label_map(scene, 3))


def test_ade20k_without_its_list_of_names_has_150_numbered_classes(made, tmp_path):
    dense_data.write_ade20k(tmp_path, made[:2])
    (tmp_path / "objectInfo150.txt").unlink()
    source = open_scenes("segmentation", "ade20k", tmp_path, "training", train=True)
    assert source.classes == [str(number) for number in range(1, 151)]


# ---- loaders ----------------------------------------------------------------------------------------------------
def batches(source, workers, transform=None, start=0):
    plan = build_plan("none", epochs=2, num_images=len(source), batch_size=4, base_size=128)
    sampler = CurriculumSampler(plan, seed=3, start_step=start)
    data = TrainScenes(source, transform or DetectionTrain(128, sides=(96, 128), max_side=200), BadFiles(0.5))
    return list(training_batches(data, sampler, workers, pin=False))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Scenes):
        return same(vars(a), vars(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_samples_depend_neither_on_workers_nor_on_where_a_run_resumes(coco):
    source = open_coco(coco)
    alone, shared = batches(source, 0), batches(source, 2)
    assert same(alone, shared) and same(alone[7:], batches(source, 0, start=7))
    assert not same(alone[0], alone[5])
    images, targets = alone[0]
    sizes, targets = targets.sizes, targets.targets
    assert images.shape[2] % 32 == images.shape[3] % 32 == 0 and images.dtype == torch.uint8
    for (height, width), target in zip(sizes.tolist(), targets):
        assert target["masks"].shape[1:] == (height, width)
        assert (target["boxes"][:, 2:] <= torch.tensor([width, height])).all()


def test_a_training_image_that_is_gone_is_replaced_and_recorded(coco, made, tmp_path, capsys):
    root = tmp_path / "data"
    dense_data.write_coco(root, made)
    (root / "train/scene_04.jpg").unlink()
    (root / "train/scene_06.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 23 training images are missing, --max_bad 0 allows 0 .*scene_04"):
        open_coco(root, max_bad=0)
    source = open_coco(root, max_bad=0.1)
    folder = tmp_path / "out"
    data = TrainScenes(source, DetectionTrain(128, (96,), 200), BadFiles(0.1, folder))
    seen = [data[index, 128, None, 7][1]["image_id"] for index in range(len(source))]
    assert len(seen) == 23 and not {10 + 3 * 4, 10 + 3 * 6} & set(seen)
    lines = (folder / "bad_files.txt").read_text().splitlines()
    assert len(lines) == 2 and "scene_04.jpg (image 22 of" in lines[0] and "No such file" in lines[0]
    with pytest.raises(ValueError, match="1 of 24 validation images are missing, scores need every one"):
        open_coco(root, train=False, max_bad=0.5)


def test_evaluation_gives_each_image_once_over_two_processes(coco):
    source = open_coco(coco, "val", train=False)
    loaders = [eval_loader(source, DetectionTest(128, 200), rank, 2, 0, False) for rank in (0, 1)]
    targets = [target for loader in loaders for _, part, _ in loader for target in part.targets]
    assert sorted(target["image_id"] for target in targets) == source.ids
    assert {target["original_size"] for target in targets} == {source.read(i)[0].shape[1:] for i in range(8)}


def test_segmentation_batches(made, tmp_path):
    dense_data.write_masks(tmp_path, made)
    source = open_scenes("segmentation", "masks", tmp_path, "train", train=True)
    transform = SegmentationTrain(128, crop=96, side=128, max_side=256)
    images, scenes = batches(source, 0, transform)[0]
    labels = scenes.targets
    assert images.shape == (4, 3, 96, 96) and labels.shape == (4, 96, 96) and labels.dtype == torch.int64
    assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 255}


# ---- bad input --------------------------------------------------------------------------------------------------
def changed(tmp_path, made, change):
    """A COCO data set of 24 scenes whose json was changed by a function."""
    content = dense_data.write_coco(tmp_path, made)
    change(content)
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    return tmp_path


def update(**values):
    return lambda content: content["annotations"][0].update(values)


def background_alone(content):
    height, width = content["images"][0]["height"], content["images"][0]["width"]
    content["annotations"][0]["segmentation"] = {"size": [height, width], "counts": [height * width]}


FAULTS = {
    "outside": (update(bbox=[900, 10, 20, 20]), r"the box \[900.0, 10.0, 20.0, 20.0\] lies outside the image, 1\d\d x"),
    "left": (update(bbox=[-30, 10, 20, 20]), "lies outside the image"),
    "no width": (update(bbox=[10, 10, 0, 20]), "has no area"),
    "negative": (update(bbox=[10, 10, 20, -5]), "has no area"),
    "not finite": (update(bbox=[10, 10, float("nan"), 5]), "is not four numbers"),
    "three numbers": (update(bbox=[10, 10, 5]), "is not four numbers"),
    "words": (update(bbox=["a", 10, 5, 5]), "malformed"),
    "no box": (update(bbox=None), "there is no bbox"),
    "category": (update(category_id=3), "its category_id 3 is not among the categories that the file lists"),
    "image": (update(image_id=11), "its image_id 11 is not among the images"),
    "mask's size": (update(segmentation={"size": [5, 6], "counts": [30]}), r"the mask is 6 x 5 pixels, but the image"),
    "counts": (update(segmentation=[[1, 2, 3, 4]]), "three points or more"),
    "polygon": (update(segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "coordinates are not pixels"),
    "polygon outside": (update(segmentation=[[900, 9, 950, 9, 950, 50]]), "enclose nothing of the image, 1"),
    "line": (update(segmentation=[[9, 9, 20, 9, 30, 9]]), "its polygons enclose nothing of the image"),
    "background alone": (background_alone, "the mask has no pixels"),
    "none": (update(segmentation=[]), "there is no segmentation"),
    "no annotation": (lambda content: content["annotations"].__setitem__(0, 17), "annotation 17"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_annotations_that_cannot_be_used_are_named_counted_and_bounded(fault, tmp_path, made, capsys):
    change, reason = FAULTS[fault]
    root = changed(tmp_path / "data", made, change)
    with pytest.raises(ValueError, match=r"1 of \d\d annotations cannot be used, --max_bad 0.001 allows 0 .*" + reason):
        open_coco(root)
    source = open_coco(root, max_bad=0.05, folder=tmp_path / "out")
    (line,) = (tmp_path / "out/bad_annotations.txt").read_text().splitlines()
    assert "instances_train.json: annotation 1" in line
    if fault not in ("image", "no annotation"):
        assert "annotation 100 of image 10 (scene_00.jpg): " in line
    assert "warning: dropped 1 of" in capsys.readouterr().err
    clean = open_coco(changed(tmp_path / "clean", made, lambda content: None))
    assert len(source._labels) == len(clean._labels) - 1


def test_two_bad_annotations_are_over_a_budget_of_one(tmp_path, made):
    def change(content):
        for record in content["annotations"][:2]:
            record["category_id"] = 99

    root = changed(tmp_path, made, change)
    number = len(json.loads((root / "annotations/instances_train.json").read_text())["annotations"])
    with pytest.raises(ValueError, match=rf"2 of {number} annotations cannot be used, --max_bad 0.02 allows 1"):
        open_coco(root, max_bad=0.02)


def test_a_box_that_reaches_beyond_the_image_is_cut_and_said(tmp_path, made, capsys):
    root = changed(tmp_path, made, update(bbox=[-8, 10, 20, 5000]))
    source = open_coco(root)
    height = made[0].image.shape[0]
    assert source.read(0)[1]["boxes"][0].tolist() == [0, 10, 12, height]
    said = capsys.readouterr().err
    assert "1 boxes reach beyond their image and were cut to it" in said and "annotation 100 of image 10" in said


def test_boxes_alone_serve_a_detector_without_masks(tmp_path, made):
    def change(content):
        for record in content["annotations"]:
            del record["segmentation"]

    root = changed(tmp_path, made, change)
    assert open_coco(root, masks=False).read(0)[1]["masks"] is None
    with pytest.raises(ValueError, match=r"has boxes without segmentations.*--head retinanet"):
        open_coco(root)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("images"), "needs a list 'images'"),
        (lambda c: c.update(annotations={}), "needs a list 'annotations'"),
        (lambda c: c.update(images=[]), "lists no images"),
        (lambda c: c.update(categories=[]), "lists no categories"),
        (lambda c: c.update(annotations=[]), "no image has a box to train on"),
        (lambda c: c["images"][1].update(id=10), "two images have the id 10"),
        (lambda c: c["images"][1].pop("file_name"), "an image needs a number as id, a file_name"),
        (lambda c: c["categories"][0].update(name="disc"), "two categories have the id 2 or the name 'disc'"),
        (lambda c: c["categories"][0].pop("id"), "a category needs a number as id and a name"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole(change, message, tmp_path, made):
    with pytest.raises(ValueError, match=message):
        open_coco(changed(tmp_path, made, change), max_bad=1.0)


def test_what_is_not_there(tmp_path, coco):
    with pytest.raises(ValueError, match="there is no COCO json for the split 'test'; looked for annotations/inst"):
        open_coco(coco, "test")
    with pytest.raises(ValueError, match="--data_path: there is no folder"):
        open_coco(tmp_path / "none")
    with pytest.raises(ValueError, match="--data_set coco does not fit --task segmentation: choose ade20k or masks"):
        open_scenes("segmentation", "coco", coco, "train", train=True)
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train.json is not json"):
        open_coco(tmp_path)


def test_an_image_of_another_size_than_the_json_says(tmp_path, made):
    root = changed(tmp_path, made, lambda c: c["images"][0].update(height=700, width=900))
    source = open_coco(root, masks=False)
    with pytest.raises(BadImage, match=r"the image is \d+ x \d+ pixels, but .*instances_train.json is for 900 x 700"):
        source.read(0)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_ordinary_file_is_not_read(kind, tmp_path, made):
    """Reading a pipe or /dev/zero would never end."""
    root = changed(tmp_path, made, lambda c: [image.pop("width") for image in c["images"]])
    path = root / "train/scene_00.jpg"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    source = open_coco(root, masks=False)
    with pytest.raises(BadImage, match="this is no ordinary file"):
        source.read(0)


def test_sizes_that_the_json_leaves_out_are_the_files(tmp_path, made):
    root = changed(tmp_path, made, lambda c: [image.pop("width") for image in c["images"]])
    source = open_coco(root, train=False)
    assert [source._size(k) for k in range(24)] == [scene.image.shape[:2] for scene in made]
    assert source.read(TURNED)[0].shape[1:] == made[TURNED].image.shape[:2]


def broken_masks(root, made, name, picture):
    dense_data.write_masks(root, made[:4])
    picture.save(root / "masks/train" / name)
    source = open_scenes("segmentation", "masks", root, "train", train=True, max_bad=0.5)
    return source.read(1)


def test_label_maps_that_cannot_be_used(made, tmp_path):
    labels = dense_data.label_map(made[1], 3)
    with pytest.raises(BadImage, match=r"hold the value 9 in 1 pixels, but there are 4 classes \(0 to 3\)"):
        beyond = labels.copy()
        beyond[0, 0] = 9
        broken_masks(tmp_path / "a", made, "001.png", Image.fromarray(beyond))
    with pytest.raises(BadImage, match=r"the image is .*001.png is for 20 x 10"):
        broken_masks(tmp_path / "b", made, "001.png", Image.new("L", (20, 10)))
    with pytest.raises(BadImage, match=r"are RGB: they need one channel"):
        broken_masks(tmp_path / "c", made, "001.png", Image.fromarray(made[1].image))
    ignored = labels.copy()
    ignored[0, 0] = 255
    assert broken_masks(tmp_path / "d", made, "001.png", Image.fromarray(ignored))[1][0, 0] == 255


def test_images_without_labels_and_labels_without_image(made, tmp_path):
    dense_data.write_masks(tmp_path, made[:4])
    (tmp_path / "masks/train/001.png").unlink()
    (tmp_path / "images/train/002.jpg").unlink()
    with pytest.raises(ValueError, match=r"2 of 4 training images are missing.*002.jpg \(which belongs to .*002.png"):
        open_scenes("segmentation", "masks", tmp_path, "train", train=True, max_bad=0)
    source = open_scenes("segmentation", "masks", tmp_path, "train", train=True, max_bad=0.5)
    data = TrainScenes(source, SegmentationTrain(64, 64, 64, 128), BadFiles(0.5, tmp_path / "out"))
    assert len([data[index, 64, None, 1] for index in range(4)]) == 4
    record = (tmp_path / "out/bad_files.txt").read_text()
    assert "001.jpg: the labels" in record and "002.jpg: No such file" in record
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"must be listed one a line.*classes.txt cannot be read: No such"):
        open_scenes("segmentation", "masks", tmp_path, "train", train=True)


def test_lists_may_begin_with_a_byte_order_mark_and_are_named_if_they_are_no_utf_8(made, tmp_path):
    def opened(data_set, root, split):
        task = "detection" if data_set == "voc" else "segmentation"
        return open_scenes(task, data_set, root, split, train=True)

    dense_data.write_masks(tmp_path / "masks", made[:2])
    dense_data.write_ade20k(tmp_path / "ade20k", made[:2])
    dense_data.write_voc(tmp_path / "voc", made[:2])
    for data_set, name, split in (
        ("masks", "classes.txt", "train"),
        ("ade20k", "objectInfo150.txt", "training"),
        ("voc", "ImageSets/Main/trainval.txt", "trainval"),
    ):
        root, path = tmp_path / data_set, tmp_path / data_set / name
        text, before = path.read_bytes(), opened(data_set, root, split)
        path.write_bytes(b"\xef\xbb\xbf" + text)
        after = opened(data_set, root, split)
        assert after.classes == before.classes and len(after) == 2 and after.missing() == []
        path.write_bytes(text + b"\xff\xfe\n")
        with pytest.raises(ValueError, match=rf"{name} cannot be read: not a text file"):
            opened(data_set, root, split)


def test_voc_faults(made, tmp_path):
    dense_data.write_voc(tmp_path, made)
    annotations = sorted((tmp_path / "Annotations").iterdir())
    annotations[0].write_text("<annotation>")
    annotations[1].write_text(annotations[1].read_text().replace("<xmin>", "<xmin>9").replace("<xmax>", "<xmax>9"))
    annotations[2].unlink()
    with pytest.raises(ValueError, match=r"\d+ of \d+ annotations cannot be used"):
        open_scenes("detection", "voc", tmp_path, "trainval", train=True)
    source = open_scenes("detection", "voc", tmp_path, "trainval", train=True, max_bad=0.5)
    text = "\n".join(source.faults)
    assert "000.xml: not an xml file" in text and "002.xml: No such file" in text
    assert "annotation 1 in" in text and "of image 2 (JPEGImages/trainval_001.jpg)" in text  # long paths are cut
    assert "lies outside the image" in text


@pytest.mark.parametrize(
    "counts, reason",
    [
        ("P", "ends within"),
        ("\x7f", "broken"),
        ([-3, 33], "not numbers"),
        ([29], "are of 29 pixels, not 5 x 6"),
        (5, "are not numbers"),
    ],
)
def test_broken_run_lengths(counts, reason):
    with pytest.raises(BadAnnotation, match=reason):
        check_segmentation({"size": [5, 6], "counts": counts}, (5, 6))
