"""ADE20K as the scene parsing benchmark ships it (ADEChallengeData2016).

``--data_path ADEChallengeData2016 --train_split training --val_split validation``: images/{training,validation}/*.jpg
and annotations/{training,validation}/*.png, whose 0 (no class) is ignored and whose 1 to 150 are classes 0 to 149.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dense.masks import LabelMaps, check_order
from dense.reading import read_text

CLASSES = 150
NAMES_FILE = "objectInfo150.txt"


def open_ade20k(root: str | Path, split: str, classes: Sequence[str] | None = None) -> LabelMaps:
    """One split. Classes get the names of ``root``/objectInfo150.txt, or numbers if it is not there.

    Raises:
        ValueError: no such folders, or a list of names that cannot be read.
    """
    root = Path(root)
    names = _names(root / NAMES_FILE)
    if classes is not None:
        check_order(root / NAMES_FILE, names, classes)
        names = list(classes)
    return LabelMaps(root / "images" / split, root / "annotations" / split, names, void_zero=True)


def _names(path: Path) -> list[str]:
    """The first name of each class; the table's lines are: number, ratio, images, images, names."""
    if not path.is_file():
        return [str(number) for number in range(1, CLASSES + 1)]
    rows = [line.split("\t") for line in read_text(path).splitlines()]
    names = {row[0].strip(): row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()}
    if list(names) != [str(number) for number in range(1, len(names) + 1)]:
        raise ValueError(f"{path} must list the classes in order, a number first and the names last, separated by tabs")
    return [name if list(names.values()).count(name) == 1 else f"{name} {number}" for number, name in names.items()]
