"""Pascal VOC xml as a data set of boxes.

Layouts of ``--data_path ROOT --train_split NAME``: Pascal's own (ROOT/ImageSets/Main/NAME.txt lists what is in
ROOT/Annotations and ROOT/JPEGImages), or a folder ROOT/NAME with each image's .xml beside it. Several are joined by +,
and Pascal's folders may be named before the list: VOC2007/trainval+VOC2012/trainval.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from config.files import read_bytes
from dense.coco import CocoScenes
from dense.reading import is_image, read_text


def open_voc(
    root: str | Path, split: str, *, train: bool, masks: bool, classes: Sequence[str] | None = None
) -> CocoScenes:
    """The objects of a split. Difficult ones count as COCO's crowds: not trained on, neither right nor wrong.

    Pascal's pixels are numbered from 1 and its corners belong to the box: xmin 1, xmax 10 is 0 to 10 here.

    Args:
        classes: of the training set; default: all that occur, sorted.

    Raises:
        ValueError: no such files, or masks are wanted.
    """
    if masks:
        raise ValueError(
            "--data_set voc has boxes alone, but the detector needs masks: choose --head retinanet, or --head_args "
            "{masks: false}"
        )
    root = Path(root)
    pairs = [pair for part in split.split("+") for pair in _list(root, part)]
    content: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    faults = []
    for number, (xml, image) in enumerate(pairs, 1):
        try:
            height, width, objects = read_xml(xml)
        except (OSError, ValueError) as error:
            faults.append(f"{xml}: {getattr(error, 'strerror', None) or error}")
            height, width, objects = 0, 0, []
        file = os.path.relpath(image, root)
        content["images"].append({"id": number, "file_name": file, "height": height, "width": width})
        for place, (name, box, difficult) in enumerate(objects, 1):
            annotation = {"id": f"{place} in {xml}", "image_id": number, "category_id": name, "bbox": box}
            content["annotations"].append({**annotation, "iscrowd": int(difficult)})
    known = {annotation["category_id"] for annotation in content["annotations"]}
    names = list(classes) if classes is not None else sorted(known)
    numbers = {name: number for number, name in enumerate(names, 1)}
    for annotation in content["annotations"]:
        annotation["category_id"] = numbers.get(annotation["category_id"], annotation["category_id"])
    content["categories"] = [{"id": number, "name": name} for name, number in numbers.items()]
    source = CocoScenes(content, root / split, root, train=train, masks=False, classes=names)
    source.faults += faults
    source.annotations += len(faults)
    return source


def read_xml(path: Path) -> tuple[int, int, list[tuple[str, list[float], bool]]]:
    """(height, width, [(class, box xywh in pixels from 0, difficult)]); height and width are 0 if not stated.

    Raises:
        OSError: no such file. ValueError: not an annotation.
    """
    try:
        tree = ElementTree.fromstring(read_bytes(path))
    except (ElementTree.ParseError, LookupError, UnicodeError) as error:
        raise ValueError(f"not an xml file: {error}") from None
    height, width = (_number(tree, f"size/{side}", 0) for side in ("height", "width"))
    objects = []
    for place, item in enumerate(tree.findall("object"), 1):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"object {place} has no name")
        left, top, right, bottom = (_number(item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        objects.append((name, box, (item.findtext("difficult") or "0").strip() == "1"))
    return int(height), int(width), objects


def _number(item: ElementTree.Element, path: str, default: float | None = None) -> float:
    text = item.findtext(path)
    if text is None and default is not None:
        return default
    try:
        value = float(text)
        if abs(value) < 2**31:
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{path} is {text!r}, not a number of pixels")


def _list(root: Path, split: str) -> list[tuple[Path, Path]]:
    """(annotation, image) of each image of a split."""
    base, name = (root / split).parent, Path(split).name
    listed = base / "ImageSets" / "Main" / f"{name}.txt"
    if listed.is_file():
        names = [line.split()[0] for line in read_text(listed).splitlines() if line.strip()]
        images = base / "JPEGImages"
        found = {path.stem: path for path in images.iterdir() if is_image(path)} if images.is_dir() else {}
        return [(base / "Annotations" / f"{stem}.xml", found.get(stem, images / f"{stem}.jpg")) for stem in names]
    folder = root / split
    if not folder.is_dir():
        raise ValueError(
            f"--data_path {root}: there is neither {listed.relative_to(root)} nor a folder {split} with images and xml"
        )
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = {path.stem: path for path in files if is_image(path)}
    xmls = {path.stem: path for path in files if path.suffix.lower() == ".xml"}
    if not images:
        raise ValueError(f"{folder} has no images")
    stems = sorted({*images, *xmls})
    return [(folder / f"{stem}.xml", images.get(stem, folder / f"{stem}.jpg")) for stem in stems]
