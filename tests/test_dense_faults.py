"""Dense tasks: what a run must notice of its data, of weights for other classes, and of validation scenes."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import checkpoint_fields
from dense_data import CLASSES, scenes, write_coco, write_masks, write_voc
from PIL import Image

from config import Config, UsageError, plain
from config.checks import check_settings
from dense.backbones import make_body
from dense.detectors import mask_rcnn
from dense.reading import read_image
from dense.scenes import open_scenes
from dense.weights import load_dense
from inputs.views import fingerprint
from models import checkpoints
from models.export import main as export
from training.build import describe, open_sources
from training.identity import differing_images


@pytest.fixture(scope="module")
def made():
    return scenes(6, seed=4)


@pytest.fixture
def coco(made, tmp_path):
    write_coco(tmp_path / "coco", made)
    write_coco(tmp_path / "coco", scenes(5, seed=1), "val", first_id=500)
    return tmp_path / "coco"


@pytest.fixture
def masks(made, tmp_path):
    write_masks(tmp_path / "masks", made)
    write_masks(tmp_path / "masks", scenes(5, seed=1), "val")
    return tmp_path / "masks"


def change(root, split, how):
    path = root / f"annotations/instances_{split}.json"
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def open_coco(root, split="train", **more):
    return open_scenes("detection", "coco", root, split, train=split == "train", masks=True, **more)


def rename(root, content, file):
    (root / "train" / content["images"][2]["file_name"]).rename(root / "train" / file)
    content["images"][2]["file_name"] = file


@pytest.mark.parametrize(
    "how",
    [
        lambda root, content: rename(root, content, "another.jpg"),
        lambda root, content: content["annotations"][2].update(bbox=[1, 1, 9, 9]),
        lambda root, content: content["annotations"][2].update(
            category_id=next(n for n in (2, 7, 40) if n != content["annotations"][2]["category_id"])
        ),
    ],
    ids=["a file", "a box", "a class"],
)
def test_other_images_boxes_or_classes_are_other_data(coco, tmp_path, how):
    before = fingerprint(open_coco(coco))
    shutil.copytree(coco, tmp_path / "elsewhere")
    assert fingerprint(open_coco(tmp_path / "elsewhere")) == before
    change(coco, "train", lambda content: how(coco, content))
    after = fingerprint(open_coco(coco))
    assert after["images"] == before["images"] and after["digest"] != before["digest"]


def test_an_evaluation_says_that_the_scenes_are_not_the_run_s(coco):
    content = {"identity": {"validation": fingerprint(open_coco(coco, "val"))}}
    source = open_coco(coco, "val")
    assert differing_images(source, source, content, "w.pth", Config()) == []
    change(coco, "val", lambda content: content["annotations"][0].update(bbox=[1, 1, 9, 9]))
    source = open_coco(coco, "val")
    (line,) = differing_images(source, source, content, "w.pth", Config())
    assert "the validation images are not those of the run that wrote w.pth" in line


def broken(path):
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("kind", ["coco", "masks"])
def test_all_validation_scenes_that_cannot_be_used_are_named_before_the_first_step(request, kind):
    root = request.getfixturevalue(kind)
    folder = root / ("val" if kind == "coco" else "images/val")
    first, *_, last = sorted(folder.iterdir())
    first.write_bytes(b"")
    broken(last)
    names = [first.name, last.name]
    if kind == "masks":
        Image.new("L", (20, 10)).save(root / "masks/val/002.png")
        names.append("002.jpg: the image is")
    arguments = ("detection", "coco") if kind == "coco" else ("segmentation", "masks")
    with pytest.raises(
        ValueError, match=rf"{len(names)} of 5 validation images cannot be used, and scores need"
    ) as seen:
        open_scenes(*arguments, root, "val", train=False, masks=True, max_bad=1.0)
    assert all(name in str(seen.value) for name in names) and "\n" not in str(seen.value)


def settings(root, task):
    return Config(task=task, data_set=root.name, data_path=str(root), mixup=0, cutmix=0, reprob=0, smoothing=0)


def test_classes_of_a_checkpoint_order_those_of_boxes_and_never_those_of_label_maps(coco, masks):
    turned = ["triangle", "disc", "box"]
    train, val = open_sources(settings(coco, "detection"), turned)
    assert train.classes == val.classes == turned
    at = open_sources(settings(coco, "detection"))[0]
    names = [[source.classes[k] for k in source.read(0)[1]["labels"]] for source in (train, at)]
    assert names[0] == names[1] and at.classes == list(CLASSES)
    # Data with one class more, or fewer, are left as they are: the comparison of the two runs says it.
    assert open_sources(settings(coco, "detection"), ["disc", "box"])[0].classes == list(CLASSES)
    assert open_sources(settings(coco, "detection"), [*turned, "cat"])[0].classes == list(CLASSES)
    own = open_sources(settings(masks, "segmentation"), ["background", *turned])[0].classes
    assert own == [*CLASSES, "background"]


def test_label_maps_of_other_numbers_than_the_model_s_are_refused(masks):
    with pytest.raises(ValueError, match=r"classes.txt: class 0 is disc, but box for the model"):
        open_scenes(
            "segmentation", "masks", masks, "val", train=False, classes=["box", "disc", "triangle", "background"]
        )
    with pytest.raises(ValueError, match=r"classes.txt: class 3 is background, but no class for the model"):
        open_scenes("segmentation", "masks", masks, "val", train=False, classes=list(CLASSES))
    assert len(open_scenes("segmentation", "masks", masks, "val", train=False, classes=[*CLASSES, "ground"])) == 5


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return mask_rcnn(make_body("resnet18"), 3, channels=16, width=32)


@pytest.mark.parametrize("where", ["classes", "CLASSES", "dataset_meta"])
def test_a_head_for_as_many_other_classes_is_a_new_one_and_said(detector, tmp_path, where):
    names = {"classes": {"classes": ["ant", "bee", "cat"]}, "CLASSES": {"meta": {"CLASSES": ("ant", "bee", "cat")}}}
    names["dataset_meta"] = {"meta": {"dataset_meta": {"classes": ("ant", "bee", "cat")}}}
    torch.save({"state_dict": detector.state_dict(), **names[where]}, tmp_path / "w.pth")
    model = mask_rcnn(make_body("resnet18"), 3, channels=16, width=32)
    report = load_dense(model, tmp_path / "w.pth", classes=["ant", "bee", "dog"])
    layers = {name.rpartition(".")[0].rpartition(".")[2] for name in report.random}
    assert layers == {"cls_score", "bbox_pred", "mask_fcn_logits"}
    assert "new class layers: w.pth knows other classes than these 3" in str(report)
    assert not load_dense(model, tmp_path / "w.pth", classes=["ant", "bee", "cat"]).random
    assert not load_dense(model, tmp_path / "w.pth").random


@pytest.mark.parametrize("orientation", range(2, 9))
def test_16_bits_are_the_8_high_ones_of_a_turned_image_too(tmp_path, orientation):
    values = (torch.arange(600).reshape(20, 30) * 100).to(torch.uint16).numpy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    Image.fromarray((values >> 8).astype("uint8")).save(tmp_path / "b.png", exif=exif)
    found, expected = (read_image(tmp_path / name, None) for name in ("a.png", "b.png"))
    assert (found == expected).all() and found.min() < 5 and found.max() > 200


@pytest.mark.parametrize("kind", ["coco", "masks"])
def test_images_that_are_reduced_to_8_bits_are_counted_beside_the_data(kind, request):
    root = request.getfixturevalue(kind)
    config = Config(task={"coco": "detection", "masks": "segmentation"}[kind], data_set=kind, data_path=str(root))
    train, _ = sources = open_sources(config)
    (before,) = describe(config, sources)
    assert before.startswith(f"data: {len(train)} training and 5 validation scenes, ") and before.endswith(" classes")
    with Image.open(train.path(2)) as image:
        deep = Image.new("I;16", image.size, 300)
    deep.save(train.path(2), "PNG")
    (line,) = describe(config, sources)
    said = f"; 1 of {len(train)} training images looked at are 16-bit grey (reduced to the 8 high bits)"
    assert line == before + said


def test_a_few_missing_training_images_are_within_the_budget_of_every_task(coco):
    os.unlink(coco / "train/scene_01.jpg")
    assert len(open_coco(coco)) == 5
    with pytest.raises(ValueError, match="1 of 5 training images are missing, --max_bad 0 allows 0"):
        open_coco(coco, max_bad=0)


@pytest.mark.parametrize(
    "more",
    [
        {"eval_data": "DIR"},
        {"real_labels": True},
        {"class_map": "FILE"},
        {"val_share": "10%"},
        {"val_per_class": 5},
        {"color_jitter": 0.4},
    ],
)
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_settings_that_would_do_nothing_are_refused(tmp_path, task, more):
    config = settings(tmp_path, task)
    check_settings(replace(config, magnitude="none"))
    with pytest.raises(UsageError, match=f"--{next(iter(more))}"):
        check_settings(replace(config, magnitude="none", **more))


@pytest.mark.parametrize("task", ["detection", "segmentation", "mae"])
def test_suggestions_are_for_classifiers(tmp_path, task):
    with pytest.raises(UsageError, match=f"--suggest is for classifiers, not for --task {task}"):
        check_settings(replace(settings(tmp_path, task), magnitude="none", suggest=True))


@pytest.mark.parametrize("form", ["timm", "official", "hub", "onnx"])
def test_a_detector_is_exported_by_its_own_command(detector, tmp_path, capsys, form):
    config = plain(replace(settings(tmp_path, "detection"), model="resnet18"))
    fields = checkpoint_fields(model=detector.state_dict(), config=config, classes=list(CLASSES), identity=None)
    checkpoints.save(tmp_path / "w.pth", fields)
    assert export([str(tmp_path / "w.pth"), str(tmp_path / "out"), "--format", form]) == 1
    assert "export it by python -m dense.export" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_lists_that_are_pipes_are_not_waited_for(masks, made, tmp_path):
    (masks / "classes.txt").unlink()
    os.mkfifo(masks / "classes.txt")
    with pytest.raises(ValueError, match=r"the classes must be listed.*classes.txt cannot be read: not a regular file"):
        open_scenes("segmentation", "masks", masks, "train", train=True)
    write_voc(tmp_path / "voc", made)
    folder = tmp_path / "voc"
    first = sorted(folder.rglob("*.xml"))[0]
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(ValueError, match=r"cannot be used.*not a regular file"):
        open_scenes("detection", "voc", folder, "trainval", train=True, max_bad=0.0)


@pytest.mark.parametrize("name", ["{}.jfif", "{}.JPE", "{}.img", "{}"])
def test_scenes_are_images_by_their_content_whatever_they_are_called(masks, made, tmp_path, name):
    folder = masks / "images/val"
    for path in folder.iterdir():
        path.rename(folder / name.format(path.stem))
    (folder / "notes.txt").write_text("no image")
    source = open_scenes("segmentation", "masks", masks, "val", train=False)
    assert len(source) == 5 and source.read(1)[0].shape[0] == 3
    write_voc(tmp_path / "voc", made)
    for path in (tmp_path / "voc/JPEGImages").iterdir():
        path.rename(path.with_name(name.format(path.stem)))
    assert len(open_scenes("detection", "voc", tmp_path / "voc", "trainval", train=False)) == 6
