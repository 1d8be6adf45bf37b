"""Small published data sets in the files their authors ship: CIFAR-10 and -100, Flowers-102, Stanford Dogs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from inputs.views import Joined, Source


def open_published(name: str, root: str | Path, split: str) -> Source:
    """Opens splits of a data set, several joined by + (Flowers-102 is trained on train+val).

    Args:
        name: one of ``PUBLISHED``.
        root: where its files lie. torchvision's data sets are downloaded to it if they do not.

    Raises:
        ValueError: no such split, or files that are not there and cannot be had; names them.
    """
    maker, splits = PUBLISHED[name]
    parts = split.split("+")
    for part in parts:
        if part not in splits:
            raise ValueError(
                f"--data_set {name} has no split {part!r}: choose {' or '.join(splits)} with --train_split and "
                "--val_split, several joined by +"
            )
    sources = [maker(root, part) for part in parts]
    return sources[0] if len(sources) == 1 else Joined(sources, sources[0].classes)


def _downloaded(maker: Callable[..., Any]) -> Any:
    """torchvision's data set, from its files or, where they are missing or damaged, from its authors' server."""
    try:
        return maker(download=False)
    except RuntimeError:
        try:
            return maker(download=True)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"--data_path has no {maker.func.__name__}, and it cannot be downloaded: {reason}"
            ) from None


class Cifar:
    """CIFAR-10 or -100, all of it in memory."""

    def __init__(self, maker: type, root: str | Path, split: str) -> None:
        self._data = _downloaded(partial(maker, root, train=split == "train"))
        self.classes: list[str] = list(self._data.classes)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, i: int) -> Image.Image:
        return self._data[i][0]

    def label(self, i: int) -> int:
        return int(self._data.targets[i])

    def labels(self) -> np.ndarray:
        return np.asarray(self._data.targets)

    def name(self, i: int) -> str:
        return f"{type(self._data).__name__} image {i}"


class Files:
    """Image files with labels. Subclasses fill ``classes``, ``_paths`` and ``_labels``."""

    classes: list[str]
    _paths: list[Path]
    _labels: np.ndarray

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, i: int) -> bytes:
        return self._paths[i].read_bytes()

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def labels(self) -> np.ndarray:
        return self._labels

    def name(self, i: int) -> str:
        return str(self._paths[i])


class Flowers(Files):
    """Oxford's Flowers-102 as torchvision lays it out: 1,020 images to train, 1,020 to validate, 6,149 to test."""

    def __init__(self, root: str | Path, split: str) -> None:
        data = _downloaded(partial(datasets.Flowers102, root, split=split))
        self.classes = list(getattr(data, "classes", map(str, range(1, 103))))  # older versions have no names
        self._paths, self._labels = data._image_files, np.asarray(data._labels)


class Dogs(Files):
    """Stanford Dogs as its two archives unpack: ``Images/`` and the lists of 12,000 images to train, 8,580 to test.

    Classes have their folders' names (n02085620-Chihuahua) in the order of the lists' labels.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        root = Path(root)
        names, labels = self._list(root, "train")
        self.classes = [""] * 120
        for name, label in zip(names, labels):
            self.classes[label] = name.partition("/")[0]
        if split != "train":
            names, labels = self._list(root, split)
        self._paths, self._labels = [root / "Images" / name for name in names], labels

    @staticmethod
    def _list(root: Path, split: str) -> tuple[list[str], np.ndarray]:
        """Paths below Images/ and labels from 0 of ``lists/<split>_list.mat``, which may lie in the root too."""
        from scipy.io import loadmat

        file = f"{split}_list.mat"
        path = next((path for path in (root / "lists" / file, root / file) if path.is_file()), None)
        if path is None or not (root / "Images").is_dir():
            raise ValueError(
                f"--data_path: {root} is not Stanford Dogs; unpack its archives images.tar and lists.tar there, so "
                f"that it holds Images/ and lists/{file}"
            )
        try:
            content = loadmat(path, squeeze_me=True)
            names = [str(name) for name in np.atleast_1d(content["file_list"])]
            labels = np.atleast_1d(content["labels"]).astype(np.int64) - 1
        except Exception as error:  # what scipy raises depends on where a damaged file was hit
            raise ValueError(f"{path} is not a list of Stanford Dogs: {' '.join(str(error).split())}") from None
        if len(names) != len(labels) or not ((labels >= 0) & (labels < 120)).all():
            raise ValueError(f"{path} is not a list of Stanford Dogs: {len(names)} files, {len(labels)} labels")
        return names, labels


# Name -> how to open a split, and its splits.
PUBLISHED: dict[str, tuple[Callable[[str | Path, str], Source], tuple[str, ...]]] = {
    "cifar10": (partial(Cifar, datasets.CIFAR10), ("train", "val")),
    "cifar100": (partial(Cifar, datasets.CIFAR100), ("train", "val")),
    "flowers102": (Flowers, ("train", "val", "test")),
    "stanford_dogs": (Dogs, ("train", "test")),
}
