"""Mutated annotation files: every one is read or refused with one line that names it; no traceback, no hang."""

import copy
import json
import random
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dense_data
from dense_data import scenes

from dense.coco import CocoScenes
from dense.scenes import TrainScenes, open_scenes
from dense.transforms import DetectionTrain, collate
from inputs.bad_files import BadFiles
from inputs.decode import BadImage

CASES = 2000
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 10, 2**31, 2**63, 2**70, -(2**40), 10**400, 0.5, 1e308, -1e9),
    *(float("nan"), float("inf"), "", "a", "10", "\0", "../../x", "é" * 200, [], {}, [[]], [{}], [1, 2], [[1, 2, 3]]),
    *({"size": [4, 4], "counts": [16]}, {"size": [4, 4], "counts": "zzzz"}, {"counts": []}, [[0, 0, 9, 9, 1e5, 3]]),
)


def mutated(content, rng):
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        holder, key = content, rng.choice(list(content))
        key = rng.choice(("annotations", key)) if "annotations" in content else key
        while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.95:
            holder = holder[key]
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        action = rng.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(rng.choice(holder)))
        elif action == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice((-holder[key], holder[key] * 1000, holder[key] + 1, holder[key] // 3))
        elif action == 3 and isinstance(holder[key], str):
            text = holder[key]
            holder[key] = text[: rng.randrange(len(text) + 1)] + chr(rng.randrange(1, 300)) * rng.randrange(3)
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        if not content:
            break
    return content


def test_mutated_json(tmp_path):
    content = dense_data.write_coco(tmp_path, scenes(12))
    rng, outcomes = random.Random(0), {"read": 0, "faults": 0, "refused": 0, "bad image": 0}
    for case in range(CASES):
        changed = mutated(content, rng)
        started = time.monotonic()
        train = bool(case % 2)
        try:
            source = CocoScenes(changed, "FILE.json", tmp_path / "train", train=train, masks=case % 3 > 0)
        except ValueError as error:
            assert "FILE.json" in str(error) and "\n" not in str(error) and len(str(error)) < 1000, changed
            outcomes["refused"] += 1
            continue
        outcomes["faults"] += bool(source.faults)
        assert all("FILE.json" in line and "\n" not in line and len(line) < 700 for line in source.faults)
        source.missing()
        if not train:
            json.dumps(source.ground_truth())
        for k in {rng.randrange(len(source)) for _ in range(6)}:
            try:
                image, target = source.read(k)
                boxes = target["boxes"]
                assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
                assert (
                    (boxes[:, 2:].amax(0) <= image.new_tensor([image.shape[2], image.shape[1]])).all()
                    if len(boxes)
                    else 1
                )
                outcomes["read"] += 1
            except (BadImage, OSError):
                outcomes["bad image"] += 1
        assert time.monotonic() - started < 20
    assert min(outcomes.values()) > 10, outcomes


@pytest.mark.parametrize("data_set", ["coco", "voc"])
def test_mutated_bytes(data_set, tmp_path, capsys):
    if data_set == "coco":
        dense_data.write_coco(tmp_path, scenes(3))
        path, split = tmp_path / "annotations/instances_train.json", "train"
    else:
        dense_data.write_voc(tmp_path, scenes(3))
        path, split = tmp_path / "Annotations/trainval_001.xml", "trainval"
    data, rng, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 3, 10))):
            place = rng.randrange(len(broken))
            broken[place : place + rng.choice((1, 1, 5))] = rng.randbytes(rng.choice((0, 1, 4)))
        path.write_bytes(broken)
        try:
            source = open_scenes("detection", data_set, tmp_path, split, train=True, max_bad=0.9)
            source.read(0)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1200
            refused += 1
    assert refused > 20 or data_set == "voc"


TEXTS = ("", "0", "-5", "1e999", "nan", "abc", "9" * 11, "0x10", "1_0", "3.7", "disc", "\x85", "é" * 300, "2147483647")


def test_mutated_xml(tmp_path, capsys):
    """Elements of a VOC annotation dropped, doubled, renamed, nested, or with another text; then cut and batched."""
    dense_data.write_voc(tmp_path, scenes(3))
    path = tmp_path / "Annotations/trainval_001.xml"
    text, rng, outcomes = path.read_text(), random.Random(2), {"read": 0, "refused": 0, "faults": 0}
    for case in range(300):
        tree = ElementTree.fromstring(text)
        for _ in range(rng.choice((1, 1, 2, 6))):
            parent = rng.choice([item for item in tree.iter() if len(item)] or [tree])
            if not len(parent):
                break
            item, action = rng.choice(list(parent)), rng.randrange(6)
            if action == 0:
                parent.remove(item)
            elif action == 1:
                parent.append(copy.deepcopy(item))
            elif action == 2:
                item.tag = rng.choice(("object", "name", "bndbox", "xmin", "size", "other"))
            elif action == 3:
                item.append(copy.deepcopy(rng.choice(list(parent))))
            else:
                item.text = rng.choice(TEXTS)
        path.write_bytes(ElementTree.tostring(tree))
        try:
            source = open_scenes("detection", "voc", tmp_path, "trainval", train=case % 2 > 0, max_bad=0.9)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1200
            outcomes["refused"] += 1
            continue
        outcomes["faults"] += bool(source.faults)
        assert all("trainval_001" in fault and "\n" not in fault for fault in source.faults)
        data = TrainScenes(source, DetectionTrain(64, (64, 96), 160), BadFiles(1.0))
        _, sizes, targets = collate([data[k, 64, None, case] for k in range(len(source))])
        for (height, width), target in zip(sizes.tolist(), targets):
            assert (target["boxes"][:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
            assert (target["boxes"] >= 0).all() and (target["labels"] < len(source.classes)).all()
        outcomes["read"] += 1
    assert outcomes["read"] > 200 and outcomes["faults"] > 30, outcomes


def test_an_xml_that_grows_or_asks_for_other_files_is_a_fault(tmp_path, capsys):
    """Entities within entities, another file's text, and 100,000 nested elements."""
    dense_data.write_voc(tmp_path, scenes(3))
    path = tmp_path / "Annotations/trainval_001.xml"
    tens = "".join(f'<!ENTITY a{k + 1} "{f"&a{k};" * 10}">' for k in range(10))
    (tmp_path / "secret.txt").write_text("disc")
    for start, name in (
        (f'<!DOCTYPE a [<!ENTITY a0 "aaaaaaaaaa">{tens}]>', "&a10;"),
        (f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{tmp_path}/secret.txt">]>', "&x;"),
        ("<a>" * 100_000, "disc"),
    ):
        path.write_text(f"{start}<annotation><object><name>{name}</name></object></annotation>")
        source = open_scenes("detection", "voc", tmp_path, "trainval", train=True, max_bad=0.9)
        (fault,) = source.faults
        assert "trainval_001.xml: not an xml file: " in fault and len(fault) < 400
