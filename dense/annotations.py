"""One annotation of a COCO json: its box, its mask as polygons or RLE, and what can be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class BadAnnotation(ValueError):
    """Why one annotation cannot be used."""


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons or an RLE, compressed or not -> compressed RLE, as the COCO libraries make it; plain types alone."""
    library = mask_library()
    if isinstance(segmentation, list):
        return plain_rle(library.merge(library.fr_py_objects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return plain_rle(library.fr_py_objects(segmentation, height, width))
    return segmentation


def plain_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """An RLE of the COCO libraries, its bytes as text for json."""
    return {"size": list(rle["size"]), "counts": bytes(rle["counts"]).decode()}


def check_segmentation(segmentation: Any, size: tuple[int, int] | None) -> None:
    """Raises BadAnnotation if a mask of this (height, width) cannot be made of it."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise BadAnnotation(
                    f"a polygon needs three points or more, as x, y, x, y, ...; one is {short(polygon)}"
                )
            if not all(isinstance(value, int | float) and abs(value) <= 1e6 for value in polygon):  # nor nan
                raise BadAnnotation(f"a polygon's coordinates are not pixels: {short(polygon)}")
        if size is not None and not any(_encloses(polygon, *size) for polygon in segmentation):
            raise BadAnnotation(
                f"its polygons enclose nothing of the image, {size[1]} x {size[0]} pixels: {short(segmentation)}"
            )
        return
    if not isinstance(segmentation, dict) or "size" not in segmentation or "counts" not in segmentation:
        raise BadAnnotation(
            f"a segmentation is a list of polygons or an RLE with size and counts, not {segmentation!s:.60}"
        )
    have = segmentation["size"]
    if not isinstance(have, list) or len(have) != 2 or not all(isinstance(length, int) for length in have):
        raise BadAnnotation(f"the mask's size is {short(have)}, not [height, width]")
    if size is not None and tuple(have) != size:
        raise BadAnnotation(f"the mask is {have[1]} x {have[0]} pixels, but the image {size[1]} x {size[0]}")
    counts = segmentation["counts"]
    runs = decode_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise BadAnnotation("the mask's RLE counts are not numbers of pixels")
    if sum(runs) != have[0] * have[1]:
        raise BadAnnotation(f"the mask's RLE counts are of {sum(runs)} pixels, not {have[0]} x {have[1]}")
    if not any(runs[1::2]):
        raise BadAnnotation("the mask has no pixels: its RLE is background alone")


def _encloses(polygon: Sequence[float], height: int, width: int) -> bool:
    """Whether the rectangle around a polygon x, y, x, y, ... has a part inside the image."""
    return all(
        max(min(values), 0) < min(max(values), length)
        for values, length in ((polygon[::2], width), (polygon[1::2], height))
    )


def decode_counts(text: str) -> list[int]:
    """Run lengths of a compressed RLE: base 32 in characters from 48 on, from the third on as differences to the last
    but one. Raises BadAnnotation if it ends within a number or has other characters."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise BadAnnotation("the mask's compressed RLE is broken")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (1 << shift) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise BadAnnotation("the mask's compressed RLE ends within a number")
    return runs


def cut_box(box: Sequence[float], size: tuple[int, int] | None) -> tuple[list[float], float]:
    """xywh -> (xyxy inside an image of this (height, width), how many pixels it reached beyond).

    Raises:
        BadAnnotation: nothing of it is inside, or it has no area.
    """
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise BadAnnotation(f"the box {short([x, y, w, h])} (x, y, width, height) has no area")
    if size is None:
        return [x, y, x + w, y + h], 0.0
    height, width = size
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        raise BadAnnotation(f"the box {short([x, y, w, h])} lies outside the image, {width} x {height} pixels")
    return [left, top, right, bottom], max(left - x, top - y, x + w - right, y + h - bottom)


def read_box(record: dict, segmentation: Any, size: tuple[int, int] | None) -> list[float]:
    """xywh as the annotation has it, or around its mask."""
    if "bbox" not in record and segmentation is not None and size is not None:
        check_segmentation(segmentation, size)
        return [float(value) for value in mask_library().to_bbox(to_rle(segmentation, *size))]
    if not isinstance(record.get("bbox"), list):
        raise BadAnnotation("there is no bbox")
    box = [float(value) for value in record["bbox"]]
    if len(box) != 4 or not all(math.isfinite(value) and abs(value) < 1e9 for value in box):
        raise BadAnnotation(f"the box {short(box)} is not four numbers of pixels: x, y, width, height")
    return box


def read_area(record: dict, box: Sequence[float]) -> float:
    area = record.get("area")
    fits = isinstance(area, int | float) and abs(area) < 1e18 and area >= 0
    return float(area) if fits else box[2] * box[3]


def owner(record: dict, known: dict[int, int], key: str) -> int:
    number = record[key]
    if number not in known:
        listed = "images" if key == "image_id" else "categories"
        raise BadAnnotation(f"its {key} {short(number)} is not among the {listed} that the file lists")
    return known[number]


def short(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 80 else text[:77] + "..."


def mask_library():
    try:
        from hotcoco import mask
    except ImportError:
        raise ValueError("COCO masks and scores need hotcoco: pip install hotcoco") from None
    return mask
