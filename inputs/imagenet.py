"""ImageNet's validation images as they are shipped, in one folder, with their labels in a list beside it."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from inputs.tables import Row, Table

KAGGLE = "LOC_val_solution.csv"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
DEVKITS = (".", "data", "devkit/data", "ILSVRC2012_devkit_t12/data", "devkit", "ILSVRC2012_devkit_t12")
NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


def validation_labels(folder: Path) -> Table | None:
    """The wnids of ImageNet's flat validation folder, from the list in its usual place; None for other folders.

    Looked for in the folder and up to four above it: Kaggle's LOC_val_solution.csv, and the devkit's ground truth with
    its meta.mat (or map_clsloc.txt), which tells the wnids of its numbers.

    Raises:
        ValueError: they are ImageNet's validation images, but there is no list, or one that is damaged.
    """
    with_names = next((path for path in folder.iterdir() if NAME.fullmatch(path.name)), None)
    if with_names is None:
        return None
    places = [folder, *folder.absolute().parents[:4]]
    for place in places:
        if (place / KAGGLE).is_file():
            return Table(str(place / KAGGLE), lambda path=place / KAGGLE: _of_kaggle(path))
    for place in places:
        for devkit in DEVKITS:
            if (path := place / devkit / TRUTH).is_file():
                wnids = _wnids(path.parent)
                return Table(str(path), lambda path=path, wnids=wnids: _of_devkit(path, wnids))
    raise ValueError(
        f"--data_path: {folder} holds ImageNet's validation images without class folders, and neither {KAGGLE} "
        "(Kaggle) nor ILSVRC2012_devkit_t12 (image-net.org) lies there or above it: put one there, or name a table "
        "with --labels"
    )


def _of_kaggle(path: Path) -> Iterator[Row]:
    """``ImageId,PredictionString``: the prediction string begins with the wnid, boxes follow."""
    with open(path, encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            words = (record.get("PredictionString") or "").split()
            if not record.get("ImageId") or not words:
                raise ValueError(f"{path} is not Kaggle's list of ImageNet's validation labels")
            yield Row(record["ImageId"], words[:1], "")


def _of_devkit(path: Path, wnids: dict[int, str]) -> Iterator[Row]:
    """One number a line, of the images in the order of their names."""
    for place, line in enumerate(path.read_text(encoding="utf-8").split(), 1):
        if not line.isdigit() or int(line) not in wnids:
            raise ValueError(f"{path} line {place}: {line} is no number of a class")
        yield Row(f"ILSVRC2012_val_{place:08d}.JPEG", [wnids[int(line)]], "")


def _wnids(data: Path) -> dict[int, str]:
    """Number -> wnid, of a devkit's data folder."""
    if (data / "map_clsloc.txt").is_file():
        rows = [
            line.split() for line in (data / "map_clsloc.txt").read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        return {int(row[1]): row[0] for row in rows}
    try:
        from scipy.io import loadmat

        synsets = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # what scipy raises depends on where a damaged file was hit
        raise ValueError(f"{data / 'meta.mat'} cannot be read: {' '.join(str(error).split())}") from None
