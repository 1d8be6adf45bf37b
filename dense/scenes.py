"""Dense data sets as a run asks for them: opened by name, what is wrong with them reported, scenes by number.

A source (`CocoScenes`, `LabelMaps`) is a `inputs.views.Source` whose ``read(i)`` gives a scene: (uint8 image (3, H, W),
target). The target is a dict for detection, with ``boxes`` float32 (K, 4) xyxy in pixels, ``labels`` int64 (K,) from 0
to C - 1, ``masks`` uint8 (K, H, W) or None and ``image_id``; for segmentation it is a uint8 label map (H, W) in which
255 is ignored.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dense.ade20k import open_ade20k
from dense.coco import open_coco
from dense.masks import open_masks
from dense.voc import open_voc
from inputs.bad_files import BadFiles, budget, load
from inputs.decode import BadImage
from inputs.readable import look_at_all
from utils import from_main

FAULTS_NAME = "bad_annotations.txt"
DETECTION_SETS = ("coco", "voc")
SEGMENTATION_SETS = ("ade20k", "masks")
SHOWN = 20  # of those that cannot be used, in a message


def open_scenes(
    task: str,
    data_set: str,
    root: str | Path,
    split: str,
    *,
    train: bool,
    masks: bool = False,
    classes: Sequence[str] | None = None,
    max_bad: float = 0.001,
    folder: str | Path | None = None,
):
    """Opens one split of a data set for a dense task, and says what is wrong with it.

    Annotations that cannot be used are listed in ``folder``/bad_annotations.txt, and dropped if they are at most the
    share ``max_bad``. A training image that is missing is replaced when its turn comes (`inputs.bad_files`); missing
    ones beyond its budget, or any that evaluation needs and cannot use, are an error here already.

    Args:
        task: ``detection`` or ``segmentation``.
        data_set: ``coco`` or ``voc``; ``ade20k`` or ``masks``.
        root, split: where it lies; see the module of that name for the layouts.
        train: training drops crowds and, for detection, images without boxes.
        masks: whether objects need masks (detection).
        classes: of the training set, for a validation set.
        max_bad: largest share of annotations, and of training images, that may be unusable.
        folder: for the list of faults; None: nowhere.

    Raises:
        ValueError: data that is not there or cannot be used; names the setting or file, and the mend.
    """
    fitting = DETECTION_SETS if task == "detection" else SEGMENTATION_SETS
    if data_set not in fitting:
        raise ValueError(f"--data_set {data_set} does not fit --task {task}: choose {' or '.join(fitting)}")
    if not Path(root).is_dir():
        raise ValueError(f"--data_path: there is no folder {root}")
    if task == "detection":
        opener = open_coco if data_set == "coco" else open_voc
        source = opener(root, split, train=train, masks=masks, classes=classes)
        report_faults(source.faults, source.annotations, max_bad, folder)
        for note in source.notes:
            _say(note)
    else:
        source = (open_ade20k if data_set == "ade20k" else open_masks)(root, split, classes)
    _check_missing(source, train, max_bad)
    if not train:
        _check_readable(source, root)
    return source


class TrainScenes(Dataset):
    """Items are asked for by the sampler's ``(index, size, magnitude, seed)``: (image (3, h, w), target), transformed.

    A scene that cannot be used is recorded and replaced, as `datasets.TrainSet` does it.
    """

    def __init__(self, source, transform, bad_files: BadFiles) -> None:
        self.source, self.transform, self.bad_files = source, transform, bad_files

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: tuple[int, int, float | None, int]) -> tuple[torch.Tensor, Any]:
        index, size, _, seed = sample
        scene, _ = self.bad_files.load(self.source, index, seed, lambda scene: self.transform(scene, size, seed))
        return scene


class EvalScenes(Dataset):
    """Items are (image (3, h, w), target) by number; the target also has ``index``. A bad scene is an error."""

    def __init__(self, source, transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image, target = load(self.source, index, self.transform)
        return image, {**target, "image_id": self.source.image_id(index), "index": index}


def report_faults(faults: list[str], annotations: int, max_bad: float, folder: str | Path | None) -> None:
    """Lists annotations that cannot be used in ``folder``/bad_annotations.txt and warns of them.

    Raises:
        ValueError: they are more than the share ``max_bad`` of all.
    """
    if not 0 <= max_bad <= 1:
        raise ValueError(f"--max_bad is {max_bad}: a share of the training set lies in [0, 1]")
    if not faults:
        return
    where = ""
    if folder is not None:
        path = Path(folder) / FAULTS_NAME
        where = f"; they are listed in {path}"
        if _is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            known = path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else []
            lines = dict.fromkeys([*known, *faults])
            path.write_text("".join(f"{line}\n" for line in lines), "utf-8", "surrogateescape")
    allowed = int(max_bad * annotations)
    if len(faults) > allowed:
        raise ValueError(
            f"{len(faults)} of {annotations} annotations cannot be used, --max_bad {max_bad:g} allows {allowed} (the "
            f"first: {faults[0]}){where}: mend or remove them, or raise --max_bad"
        )
    _say(f"warning: dropped {len(faults)} of {annotations} annotations (the first: {faults[0]}){where}")


def _check_missing(source, train: bool, max_bad: float) -> None:
    missing = source.missing()
    allowed = budget(max_bad, len(source)) if train else 0
    if len(missing) > allowed:
        kind = "training" if train else "validation"
        limit = f"--max_bad {max_bad:g} allows {allowed}" if train else "scores need every one"
        raise ValueError(
            f"{len(missing)} of {len(source)} {kind} images are missing, {limit} (the first: {missing[0]}): add the "
            "files, or remove the images from the annotations"
        )


def _check_readable(source, root: str | Path) -> None:
    """Raises ValueError where validation scenes cannot be used, with all of them; the main process looks for all."""
    faults = list(look_at_all(len(source), str(root), partial(_faults, source))) if _is_main() else []
    if faults := from_main(faults):
        shown = "; ".join(faults[:SHOWN]) + "; ..." * (len(faults) > SHOWN)
        raise ValueError(
            f"{len(faults)} of {len(source)} validation images cannot be used, and scores need every one: {shown}. "
            "Write good files under these names, or remove the images from the validation set"
        )


def _faults(source, places: range) -> list[str]:
    found = []
    for place in places:
        try:
            source.check(place)
        except (BadImage, OSError) as error:
            found.append(f"{source.name(place)}: {getattr(error, 'strerror', None) or error}")
    return found


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _say(text: str) -> None:
    if _is_main():
        print(text, file=sys.stderr)
