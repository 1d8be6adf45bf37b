"""Label maps as a data set for segmentation: a folder of images and a folder of PNGs of the same names.

Layouts of ``--data_path ROOT --train_split NAME``: images in ROOT/images/NAME and labels in ROOT/masks/NAME, or
ROOT/NAME/images and ROOT/NAME/masks. ROOT/classes.txt has a class a line; a label's pixels hold the number of the
class, from 0 in the file's order, in one channel, grey or palette; 255 is ignored.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dense.reading import check_image, is_image, missing_files, read_bytes, read_image, read_text, to_tensor
from dense.transforms import IGNORED
from inputs.decode import BadImage


class LabelMaps:
    """Images with a class for each pixel, in the order of their names.

    An image without labels, or labels without an image, stays in the set, and reading it says so.

    Args:
        images, labels: the two folders.
        classes: names of the classes.
        void_zero: whether the files' 0 is ignored and class c is stored as c + 1 (ADE20K).

    Raises:
        ValueError: a folder is not there or empty; more than 255 classes.
    """

    def __init__(self, images: str | Path, labels: str | Path, classes: Sequence[str], void_zero: bool = False) -> None:
        self.classes, self.void_zero = list(classes), void_zero
        if not 0 < len(self.classes) <= IGNORED:
            raise ValueError(f"there are {len(self.classes)} classes: a label map has 1 to {IGNORED}")
        files, maps = _files(Path(images), is_image), _files(Path(labels), _is_map)
        if not files:
            raise ValueError(f"{images} has no images")
        self.stems = sorted({*files, *maps})
        self.images = [str(files.get(stem, Path(images) / f"{stem}.jpg")) for stem in self.stems]
        self.label_paths = [str(maps.get(stem, Path(labels) / f"{stem}.png")) for stem in self.stems]

    def __len__(self) -> int:
        return len(self.stems)

    def read(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scene ``i`` (see `dense.scenes`). Raises OSError or BadImage if one of its files cannot be used."""
        labels = read_labels(self.label_paths[i], len(self.classes), self.void_zero)
        return to_tensor(read_image(self.images[i], labels.shape, self.label_paths[i])), torch.from_numpy(labels)

    def check(self, i: int) -> None:
        """Raises as :meth:`read` where one of the files cannot be used."""
        labels = read_labels(self.label_paths[i], len(self.classes), self.void_zero)
        check_image(self.images[i], labels.shape, self.label_paths[i])

    def path(self, i: int) -> str:
        return self.images[i]

    def name(self, i: int) -> str:
        return self.path(i)

    def image_id(self, i: int) -> int:
        return i

    def label(self, i: int) -> int:
        return 0  # what a scene shows is in its target

    def labels(self) -> np.ndarray:
        """All 0, as :meth:`label`."""
        return np.zeros(len(self), np.int64)

    def missing(self) -> list[str]:
        """Names of the images and labels that are not there."""
        return [
            f"{paths[i]} (which belongs to {others[i]})"
            for paths, others in ((self.images, self.label_paths), (self.label_paths, self.images))
            for i in missing_files(paths)
        ]


def open_masks(root: str | Path, split: str, classes: Sequence[str] | None = None) -> LabelMaps:
    """The split ``NAME`` below ``root`` (see the top of this file).

    Raises:
        ValueError: no such folders, or no classes.txt.
    """
    root = Path(root)
    places = [(root / "images" / split, root / "masks" / split), (root / split / "images", root / split / "masks")]
    found = next((pair for pair in places if all(folder.is_dir() for folder in pair)), None)
    if found is None:
        tried = ", or ".join(" and ".join(str(folder.relative_to(root)) for folder in pair) for pair in places)
        raise ValueError(f"--data_path {root}: there are no folders {tried}")
    names = root / "classes.txt"
    if classes is not None and names.is_file():
        check_order(names, read_classes(names), classes)
    return LabelMaps(*found, classes if classes is not None else read_classes(names))


def check_order(where: Path, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError where ``known``, the model's classes, have other numbers in the label maps than the model
    gives them."""
    if len(names) != len(known) or (set(names) == set(known) and list(names) != list(known)):
        number = next(
            (k for k, (ours, theirs) in enumerate(zip(names, known)) if ours != theirs), min(len(names), len(known))
        )
        ours, theirs = (list(some)[number] if number < len(some) else "no class" for some in (names, known))
        raise ValueError(
            f"{where}: class {number} is {ours}, but {theirs} for the model: label maps hold the numbers of the "
            "classes, so that both must list the same ones in the same order"
        )


def read_classes(path: Path) -> list[str]:
    """Names from a file, one a line. Raises ValueError if it is not there, or names a class twice."""
    try:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"the classes must be listed one a line, in the order of their numbers: {error}") from None
    if len(set(names)) < len(names):
        raise ValueError(f"{path} lists a class twice")
    return names


def read_labels(path: str | Path, classes: int, void_zero: bool = False) -> np.ndarray:
    """uint8 (H, W): class numbers below ``classes``, or 255.

    Raises:
        OSError, BadImage: no such file; it cannot be decoded, has several channels, or numbers beyond the classes.
    """
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            values = np.array(image) if mode in ("L", "P", "1", "I", "I;16") else None
    except Exception as error:  # PIL's plugins let many types through on broken files
        raise BadImage(f"the labels {path} cannot be decoded: {' '.join(str(error).split())}") from error
    if values is None:
        raise BadImage(f"the labels {path} are {mode}: they need one channel of class numbers, grey or palette")
    values = values.astype(np.int32)
    if void_zero:
        values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
    beyond = (values != IGNORED) & ((values < 0) | (values >= classes))
    if beyond.any():
        value = int(values[beyond][0]) + int(void_zero)
        raise BadImage(
            f"the labels {path} hold the value {value} in {np.count_nonzero(beyond)} pixels, but there are {classes} "
            f"classes ({int(void_zero)} to {classes - 1 + int(void_zero)})"
        )
    return values.astype(np.uint8)


def _read(path: str | Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise BadImage(f"the labels {path} cannot be read: {error.strerror}") from error


def _is_map(path: Path) -> bool:
    return path.suffix.lower() == ".png" and not path.name.startswith(".")


def _files(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """Paths by stem. Raises ValueError if two differ in the extension alone."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if wanted(path):
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path.name} have the same name: labels go by name")
            found[path.stem] = path
    return found
