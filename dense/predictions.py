"""Predictions as files: detections as a COCO json, label maps as PNGs, and on request pictures of both."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dense.annotations import mask_library
from dense.draw import SHOWN, draw_labels, draw_objects, palette_bytes
from dense.score import coco_results, to_original


class DetectionWriter:
    """Writes ``folder``/predictions.json once closed: images, categories (ids from 1), and as annotations each
    detection with its score. So it opens wherever a COCO json does, and its ``annotations`` are COCO's results.

    Args:
        folder: made if it is not there. classes: names, in the order of labels.
        masks: whether detections have masks. pictures: whether to draw ``folder``/pictures/NAME.jpg too, with
            the detections of a score of 0.3 and more.
        category_ids: id of each label's category, to write what a data set's own file calls it.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str],
        masks: bool,
        pictures: bool = False,
        category_ids: dict[int, int] | None = None,
    ) -> None:
        self.folder, self.classes, self.masks = Path(folder), list(classes), masks
        self.pictures = _picture_folder(self.folder, pictures)
        self.taken: set[str] = set()  # names of files that are written
        self.category_ids = category_ids or {label: label + 1 for label in range(len(self.classes))}
        names = [{"id": number, "name": self.classes[label]} for label, number in self.category_ids.items()]
        self.content: dict[str, list] = {"images": [], "annotations": [], "categories": names}

    def add(
        self,
        name: str,
        image: torch.Tensor,
        detection: dict[str, torch.Tensor],
        size: tuple[int, int],
        image_id: int | None = None,
    ) -> None:
        """Takes the detections of one image.

        Args:
            name: of the file. image: uint8 (3, H, W), as it is in the file.
            detection: in the pixels of the resized image, ``size`` (height, width); masks soft.
            image_id: default: numbered from 1.
        """
        height, width = image.shape[-2:]
        number = len(self.content["images"]) + 1 if image_id is None else image_id
        found = to_original(detection, size, (height, width), self.masks)
        self.content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        for result in coco_results(found, number, self.category_ids):
            area = result["bbox"][2] * result["bbox"][3]
            more = {"id": len(self.content["annotations"]) + 1, "area": area, "iscrowd": 0}
            self.content["annotations"].append({**result, **more})
        if self.pictures:
            keep = np.flatnonzero(found["scores"] >= SHOWN)
            boxes, labels, scores = (torch.from_numpy(found[key][keep]) for key in ("boxes", "labels", "scores"))
            masks = _decoded([found["masks"][k] for k in keep], height, width) if self.masks else None
            drawn = draw_objects(image, boxes, labels, self.classes, scores, masks)
            save_picture(drawn, self.pictures / f"{free_name(name, self.taken)}.jpg")

    def close(self) -> Path:
        """Writes the json; returns its path."""
        path = self.folder / "predictions.json"
        _write(path, json.dumps(self.content).encode())
        return path


class LabelWriter:
    """Writes a label map per image, ``folder``/NAME.png: a palette PNG whose pixels are the numbers of the classes, as
    ``--data_set masks`` reads them; and classes.txt.

    Args:
        folder: made if it is not there. classes: names, in the order of labels.
        pictures: whether to draw ``folder``/pictures/NAME.jpg too.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str], pictures: bool = False) -> None:
        self.folder, self.classes = Path(folder), list(classes)
        self.pictures = _picture_folder(self.folder, pictures)
        self.taken: set[str] = set()  # names of files that are written
        self.palette = palette_bytes(len(self.classes))
        _write(self.folder / "classes.txt", "".join(f"{name}\n" for name in self.classes).encode())

    def add(self, name: str, image: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes the label map (H, W) of an image, uint8 (3, H, W), as it is in the file."""
        picture = Image.fromarray(labels.detach().to(torch.uint8).cpu().numpy(), "P")
        picture.putpalette(self.palette)
        name = free_name(name, self.taken)
        path = self.folder / f"{name}.png"
        picture.save(path.with_suffix(".tmp"), "PNG")
        os.replace(path.with_suffix(".tmp"), path)
        if self.pictures:
            drawn = draw_labels(image, labels.cpu(), len(self.classes))
            save_picture(drawn, self.pictures / f"{name}.jpg")


def flat_name(name: str) -> str:
    """A file's name without extension; folders become part of it, so that no two images write the same file.

    >>> flat_name("a/b.jpg")
    'a_b'
    """
    return "_".join(Path(name).with_suffix("").parts).lstrip("/_.") or "image"


def free_name(name: str, taken: set[str]) -> str:
    """:func:`flat_name`, with the file's ending or a number where another image has it; ``taken`` grows by it.

    >>> taken = set()
    >>> [free_name(name, taken) for name in ("a/b.jpg", "a/b.png", "a_b.jpg")]
    ['a_b', 'a_b.png', 'a_b.jpg']
    """
    flat = flat_name(name)
    ways = itertools.chain([flat, flat + Path(name).suffix], (f"{flat}_{number}" for number in itertools.count(2)))
    found = next(way for way in ways if way not in taken)
    taken.add(found)
    return found


def save_picture(image: torch.Tensor, path: Path) -> None:
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path, quality=92)


def _picture_folder(folder: Path, wanted: bool) -> Path | None:
    try:
        (folder / "pictures" if wanted else folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--predict_to {folder} cannot be a folder: {error.strerror}") from None
    return folder / "pictures" if wanted else None


def _decoded(rles: list[dict[str, Any]], height: int, width: int) -> torch.Tensor:
    masks = np.zeros((len(rles), height, width), bool)
    for place, rle in enumerate(rles):
        masks[place] = mask_library().decode(rle)
    return torch.from_numpy(masks)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
