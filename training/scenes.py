"""What a run of detection or segmentation is made of beside a classifier's parts: sizes, data, transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from config import Config, UsageError, as_usage
from curriculum import Plan
from datasets import Source
from dense.scenes import open_scenes
from dense.tasks import Scenes
from dense.transforms import SIDES, DetectionTrain, SegmentationTrain, collate

OBJECTS = 100  # of a blank image: as many as the fullest of COCO have, and more than a second stage samples


def head_of(config: Config) -> str:
    """What stands on the body of a detector or segmenter."""
    return config.head or ("mask_rcnn" if config.task == "detection" else "upernet")


def has_masks(config: Config) -> bool:
    """Whether a detector predicts masks, and so needs them."""
    return head_of(config) in ("mask_rcnn", "cascade") and (config.head_args or {}).get("masks", True)


def base_size(config: Config) -> int:
    """The plan's full size: of a detector the short side of test images, of a segmenter the crop."""
    if config.task == "detection":
        return test_sides(config)[0]
    return config.crop if config.task == "segmentation" else config.input_size


def test_sides(config: Config) -> tuple[int, int]:
    """Short side and longest side of a detector's or segmenter's test images."""
    side, longest = (800, 1333) if config.task == "detection" else (512, 2048)
    return config.test_side or side, config.max_side or longest


def open_dense(config: Config, train: bool, classes: Sequence[str] | None = None) -> Source:
    """One split of a data set of boxes or label maps. Raises UsageError."""
    if config.data_path is None:
        raise UsageError("--data_path is not set: name the folder that holds the data set")
    split = config.train_split if train else config.val_split
    options = {"masks": has_masks(config), "classes": classes, "max_bad": config.max_bad, "folder": config.output_dir}
    with as_usage():
        return open_scenes(config.task, config.data_set, config.data_path, split, train=train, **options)


def make_scene_transform(config: Config, plan: Plan) -> DetectionTrain | SegmentationTrain:
    """What becomes of a training image of a detector or segmenter, and of its boxes, masks or labels."""
    side, longest = test_sides(config)
    with as_usage():
        if config.task == "detection":
            sides = config.train_sides or SIDES
            return DetectionTrain(plan.base_size, sides, longest, config.hflip, config.crop_prob)
        return SegmentationTrain(plan.base_size, config.crop, side, longest, flip=config.hflip)


def blank_scenes(config: Config, plan: Plan, images: int, size: int) -> tuple[torch.Tensor, Scenes]:
    """A batch that takes as much time and memory as the largest that training can meet at this input size."""
    height, width = make_scene_transform(config, plan).largest(size, images)
    blank = torch.zeros(3, height, width, dtype=torch.uint8)
    if config.task == "segmentation":
        target = torch.zeros(height, width, dtype=torch.uint8)
    else:
        side = torch.linspace(8, min(height, width), OBJECTS)
        target = {"boxes": torch.stack([side * 0, side * 0, side, side], 1)}
        target["labels"] = torch.zeros(OBJECTS, dtype=torch.long)
        target["masks"] = torch.ones(OBJECTS, height, width, dtype=torch.uint8) if has_masks(config) else None
    batch, sizes, targets = collate([(blank, target)] * images)
    return batch, Scenes(sizes, targets)
