"""COCO json as a data set: polygons and RLE, crowds, images without boxes, any ids, any classes.

Where the files of ``--data_path ROOT --train_split NAME`` are looked for, first found first:

- annotations: ROOT/NAME (a .json file), ROOT/annotations/instances_NAME.json, ROOT/annotations/NAME.json,
  ROOT/NAME.json, ROOT/NAME/_annotations.coco.json
- images: below ROOT/NAME, ROOT/images/NAME, ROOT/images, ROOT; where the first image of the json is
"""

from __future__ import annotations

import json
import os
import pickle
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dense.annotations import (
    BadAnnotation,
    check_segmentation,
    cut_box,
    mask_library,
    owner,
    read_area,
    read_box,
    short,
    to_rle,
)
from dense.reading import check_image, missing_files, read_image, to_tensor, upright_size
from inputs.names import hash_of

OVERHANG = 1.0  # pixels that a box may reach beyond its image before a message says that it was cut


class CocoScenes:
    """The images of a COCO json with their objects, in the file's order. What is kept of each object are arrays, so
    that loader workers share the memory of a large file.

    Labels are 0 to C - 1: the places of the categories in the order of their ids, or in ``classes`` by name. Boxes are
    cut to the image. In training, crowds are dropped, and images without a box skipped. Annotations
    that cannot be used are in ``faults``, one line each; what else is worth saying in ``notes``.

    Args:
        content: what the json holds. where: its path, for messages.
        folder: what file names are relative to.
        train: for training, not for scoring.
        masks: whether each object needs one; without, segmentations are not looked at.
        classes: of the training set; default: the file's own.

    Raises:
        ValueError: the content is no COCO json, has no images or no categories, or categories that ``classes`` lacks.
    """

    def __init__(
        self,
        content: Any,
        where: str | Path,
        folder: str | Path,
        *,
        train: bool,
        masks: bool,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.where, self.folder, self.masks = str(where), Path(folder), masks
        self.faults: list[str] = []
        self.notes: list[str] = []
        names = _categories(content, self.where)
        self.classes = list(classes) if classes is not None else list(names.values())
        unknown = [name for name in names.values() if name not in self.classes]
        if unknown:
            raise ValueError(
                f"{self.where} has {len(unknown)} categories that the training set lacks: {', '.join(unknown[:3])}"
            )
        self.category_ids = {self.classes.index(name): number for number, name in names.items()}
        self._read_images(content)
        self._read_annotations(content, {number: label for label, number in self.category_ids.items()}, train)
        if train:
            boxes = np.bincount(self._image, minlength=len(self.ids))
            self._keep(boxes > 0)
        if not self.ids:
            faults = f" ({len(self.faults)} cannot be used, the first: {self.faults[0]})" if self.faults else ""
            raise ValueError(f"{self.where}: no image has a box to train on{faults}")
        # Objects by image: those of image i are first[i] to first[i + 1].
        order = np.argsort(self._image, kind="stable")
        self._reorder(order)
        self._first = np.searchsorted(self._image, np.arange(len(self.ids) + 1))

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Scene ``i`` (see `dense.scenes`). Raises OSError or BadImage if its file cannot be used."""
        pixels = read_image(self.path(i), self._size(i), self.where)
        height, width = pixels.shape[:2]
        objects = range(self._first[i], self._first[i + 1])
        masks = None
        if self.masks:
            masks = np.zeros((len(objects), height, width), np.uint8)
            for mask, k in zip(masks, objects):
                mask[:] = mask_library().decode(to_rle(self._segmentation(k), height, width))
            masks = torch.from_numpy(masks)
        return to_tensor(pixels), {
            "boxes": torch.from_numpy(self._boxes[objects.start : objects.stop].copy()),
            "labels": torch.from_numpy(self._labels[objects.start : objects.stop].astype(np.int64)),
            "masks": masks,
            "image_id": self.ids[i],
        }

    def check(self, i: int) -> None:
        """Raises as :meth:`read` where the image cannot be used."""
        check_image(self.path(i), self._size(i), self.where)

    def hashes(self) -> np.ndarray:
        """A number for each image that follows from its file's name and its objects' classes and boxes, uint32 (N,)."""
        found = np.empty(len(self), np.uint32)
        for i, file in enumerate(self.files):
            own = slice(self._first[i], self._first[i + 1])
            found[i] = hash_of(
                self._stated[own].tobytes(), hash_of(self._labels[own].tobytes(), hash_of(os.fsencode(file)))
            )
        return found

    def path(self, i: int) -> str:
        return str(self.folder / self.files[i])

    def name(self, i: int) -> str:
        return f"{self.path(i)} (image {self.ids[i]} of {self.where})"

    def image_id(self, i: int) -> int:
        return self.ids[i]

    def label(self, i: int) -> int:
        return 0  # what a scene shows is in its target

    def labels(self) -> np.ndarray:
        """All 0, as :meth:`label`."""
        return np.zeros(len(self), np.int64)

    def missing(self) -> list[str]:
        """Names of the images whose file is not there."""
        return [self.name(i) for i in missing_files(map(self.path, range(len(self))))]

    def ground_truth(self) -> dict[str, Any]:
        """What detections are scored against, as a COCO json: crowds too, boxes as the file has them, new ids from 1
        (the scoring libraries take the id 0 for no match)."""
        annotations = []
        for k, image in enumerate(self._image.tolist()):
            record = {
                "id": k + 1,
                "image_id": self.ids[image],
                "category_id": self.category_ids[int(self._labels[k])],
                "bbox": self._stated[k].tolist(),
                "area": float(self._areas[k]),
                "iscrowd": int(self._crowd[k]),
            }
            if self.masks:
                record["segmentation"] = to_rle(self._segmentation(k), *self._size(image))
            annotations.append(record)
        images = [
            {"id": number, "file_name": file, "height": height, "width": width}
            for number, file, (height, width) in zip(self.ids, self.files, self._sizes.tolist())
        ]
        categories = [{"id": number, "name": self.classes[label]} for label, number in self.category_ids.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _size(self, i: int) -> tuple[int, int] | None:
        height, width = self._sizes[i].tolist()
        return (height, width) if height else None

    def _segmentation(self, k: int) -> Any:
        return pickle.loads(self._segments[self._spans[k, 0] : self._spans[k, 1]])

    def _read_images(self, content: Any) -> None:
        self.ids: list[int] = []
        self.files: list[str] = []
        sizes = []
        for record in _records(content, "images", self.where):
            try:
                number, file = record["id"], record["file_name"]
                if not isinstance(number, int) or not isinstance(file, str) or not file or "\0" in file:
                    raise TypeError
                size = (int(record.get("height") or 0), int(record.get("width") or 0))
                if not 0 <= min(size) <= max(size) < 2**31:
                    raise ValueError
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
                raise ValueError(
                    f"{self.where}: an image needs a number as id, a file_name, a height and a width; one is "
                    f"{short(record)}"
                ) from None
            self.ids.append(number)
            self.files.append(file)
            sizes.append(size if min(size) else upright_size(self.folder / file))
        self._row = {number: row for row, number in enumerate(self.ids)}
        if len(self._row) < len(self.ids):
            twice = next(number for row, number in enumerate(self.ids) if self._row[number] != row)
            raise ValueError(f"{self.where}: two images have the id {twice}")
        if not self.ids:
            raise ValueError(f"{self.where} lists no images")
        self._sizes = np.array(sizes, dtype=np.int64)

    def _read_annotations(self, content: Any, labels: dict[int, int], train: bool) -> None:
        records = _records(content, "annotations", self.where)
        self.annotations = len(records)
        images, classes, crowds = array("q"), array("i"), array("b")
        boxes, stated, areas, ends = array("f"), array("d"), array("d"), array("q", [0])
        segments = bytearray()
        cut, bare = [], 0
        for record in records:
            try:
                row, label = owner(record, self._row, "image_id"), owner(record, labels, "category_id")
                size = self._size(row)
                crowd = bool(record.get("iscrowd"))
                if crowd and train:
                    continue
                segmentation = record.get("segmentation") or None
                if self.masks:
                    if segmentation is None:
                        bare += 1
                        raise BadAnnotation("there is no segmentation, which a detector with masks needs")
                    check_segmentation(segmentation, size)
                box = read_box(record, segmentation, size)
                xyxy, overhang = cut_box(box, size)
            except BadAnnotation as error:
                self.faults.append(f"{self._place(record)}: {error}")
                continue
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
                self.faults.append(f"{self._place(record)}: malformed ({type(error).__name__}: {short(error)})")
                continue
            if overhang > OVERHANG:
                cut.append(f"{self._place(record)}, by {overhang:.0f} pixels")
            images.append(row)
            classes.append(label)
            crowds.append(crowd)
            stated.extend(box)
            boxes.extend(xyxy)
            areas.append(read_area(record, box))
            if self.masks:
                segments += pickle.dumps(segmentation, -1)
            ends.append(len(segments))
        if bare and not images:
            raise ValueError(
                f"{self.where} has boxes without segmentations, but the detector needs masks: choose --head "
                "retinanet, or --head_args {masks: false}"
            )
        if cut:
            self.notes.append(f"warning: {len(cut)} boxes reach beyond their image and were cut to it: {cut[0]}")
        self._image, self._labels = np.array(images, np.int64), np.array(classes, np.int32)
        self._crowd = np.array(crowds, bool)
        self._boxes = np.array(boxes, np.float32).reshape(-1, 4)
        self._stated, self._areas = np.array(stated, np.float64).reshape(-1, 4), np.array(areas, np.float64)
        self._segments, self._spans = bytes(segments), np.stack([ends[:-1], ends[1:]], 1)

    def _place(self, record: Any) -> str:
        """Which annotation a message is about."""
        if not isinstance(record, dict):
            return f"{self.where}: annotation {short(record)}"
        number, image = record.get("id"), record.get("image_id")
        row = self._row.get(image) if isinstance(image, int) else None
        file = "" if row is None else f" ({self.files[row]})"
        return f"{self.where}: annotation {short(number)} of image {short(image)}{file}"

    def _keep(self, images: np.ndarray) -> None:
        """Leaves only these images, bool (N,)."""
        if images.all():
            return
        self.notes.append(
            f"{self.where}: {np.count_nonzero(~images)} of {len(images)} images have no box and are not trained on"
        )
        rows = np.flatnonzero(images).tolist()
        self.ids, self.files = [self.ids[row] for row in rows], [self.files[row] for row in rows]
        self._row = {number: row for row, number in enumerate(self.ids)}
        self._sizes = self._sizes[images]
        self._image = (np.cumsum(images) - 1)[self._image]

    def _reorder(self, order: np.ndarray) -> None:
        for name in ("_image", "_labels", "_crowd", "_boxes", "_stated", "_areas", "_spans"):
            setattr(self, name, np.ascontiguousarray(getattr(self, name)[order]))


def open_coco(
    root: str | Path, split: str, *, train: bool, masks: bool, classes: Sequence[str] | None = None
) -> CocoScenes:
    """The split ``NAME`` below ``root`` (see the top of this file).

    Raises:
        ValueError: no such files, or a json that is none.
    """
    root = Path(root)
    name = Path(split).stem.removeprefix("instances_") if split.endswith(".json") else split
    places = [
        *([root / split] if split.endswith(".json") else []),
        root / "annotations" / f"instances_{name}.json",
        root / "annotations" / f"{name}.json",
        root / f"{name}.json",
        root / name / "_annotations.coco.json",
    ]
    where = next((place for place in places if place.is_file()), None)
    if where is None:
        tried = ", ".join(str(place.relative_to(root)) for place in places)
        raise ValueError(f"--data_path {root}: there is no COCO json for the split {split!r}; looked for {tried}")
    try:
        content = json.loads(where.read_bytes())
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not json: {short(error)}") from None
    return CocoScenes(content, where, _image_folder(content, root, name), train=train, masks=masks, classes=classes)


def _records(content: Any, key: str, where: str) -> list:
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{where} is not a COCO json: it needs a list {key!r} (of images, annotations and categories)")
    return records


def _categories(content: Any, where: str) -> dict[int, str]:
    """Names by id, in the order of ids."""
    names: dict[int, str] = {}
    for record in _records(content, "categories", where):
        number, name = (record.get("id"), record.get("name")) if isinstance(record, dict) else (None, None)
        if not isinstance(number, int) or not isinstance(name, str):
            raise ValueError(f"{where}: a category needs a number as id and a name; one is {short(record)}")
        if number in names or name in names.values():
            raise ValueError(f"{where}: two categories have the id {number} or the name {name!r}")
        names[number] = name
    if not names:
        raise ValueError(f"{where} lists no categories")
    return dict(sorted(names.items()))


def _image_folder(content: Any, root: Path, name: str) -> Path:
    places = [root / name, root / "images" / name, root / "images", root]
    try:
        first = content["images"][0]["file_name"]
        return next(place for place in places if (place / first).is_file())
    except (StopIteration, LookupError, TypeError, ValueError):
        return next(place for place in places if place.is_dir())
