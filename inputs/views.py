"""Parts and unions of data sets: label maps and class subsets, a held-out part of the training set, several folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from config.files import read_text


class Source(Protocol):
    """A data set by number, as the curriculum's sampler asks for it."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, i: int) -> Any:
        """Encoded bytes or a PIL image. Raises OSError or BadImage if there is no getting it."""

    def label(self, i: int) -> int: ...

    def labels(self) -> np.ndarray:
        """All labels, integers (len,)."""

    def name(self, i: int) -> str:
        """What a message calls image ``i``."""


class View:
    """Some images of a source, in its order, perhaps under other labels.

    It holds the runs of consecutive images, not their numbers: a class subset of a folder is a few runs, whatever the
    number of images.

    Args:
        source: what is looked at.
        keep: bool (len(source),).
        classes: names of the labels. relabel: new label of each old one; default: unchanged.
    """

    def __init__(
        self,
        source: Source,
        keep: np.ndarray,
        classes: Sequence[str] | None = None,
        relabel: np.ndarray | None = None,
    ):
        self.source = source
        self.classes = list(classes) if classes is not None else source.classes
        self._relabel = relabel
        edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
        self._first, stops = edges[::2], edges[1::2]
        self._before = np.concatenate([[0], np.cumsum(stops - self._first)])

    def __len__(self) -> int:
        return int(self._before[-1])

    def _place(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        run = int(np.searchsorted(self._before, i, side="right")) - 1
        return int(self._first[run] + i - self._before[run])

    def read(self, i: int) -> Any:
        return self.source.read(self._place(i))

    def name(self, i: int) -> str:
        return self.source.name(self._place(i))

    def label(self, i: int) -> int:
        label = self.source.label(self._place(i))
        return label if self._relabel is None else int(self._relabel[label])

    def labels(self) -> np.ndarray:
        lengths = np.diff(self._before)
        places = np.arange(len(self)) + np.repeat(self._first - self._before[:-1], lengths)
        labels = self.source.labels()[places]
        return labels if self._relabel is None else self._relabel[labels]


class Joined:
    """Several sources one after the other; their classes, by name, in one sorted list or in the order given.

    Raises:
        ValueError: a source has a class that ``classes`` lacks.
    """

    def __init__(self, sources: Sequence[Source], classes: Sequence[str] | None = None):
        self.sources = list(sources)
        names = list(classes) if classes is not None else sorted({name for s in sources for name in s.classes})
        self.classes = names
        label_of = {name: label for label, name in enumerate(names)}
        unknown = sorted({name for source in sources for name in source.classes} - set(names))
        if unknown:
            raise ValueError(f"{len(unknown)} classes are not the training set's: {', '.join(unknown[:3])}")
        self._relabel = [np.array([label_of[name] for name in source.classes]) for source in self.sources]
        self._before = np.concatenate([[0], np.cumsum([len(source) for source in self.sources])])

    def __len__(self) -> int:
        return int(self._before[-1])

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        k = int(np.searchsorted(self._before, i, side="right")) - 1
        return k, i - int(self._before[k])

    def read(self, i: int) -> Any:
        k, place = self._place(i)
        return self.sources[k].read(place)

    def name(self, i: int) -> str:
        k, place = self._place(i)
        return self.sources[k].name(place)

    def label(self, i: int) -> int:
        k, place = self._place(i)
        return int(self._relabel[k][self.sources[k].label(place)])

    def labels(self) -> np.ndarray:
        return np.concatenate([relabel[s.labels()] for relabel, s in zip(self._relabel, self.sources)])


def map_classes(source: Source, path: str | Path) -> View:
    """Keeps the classes that a file lists, under the labels it gives them.

    Each line has the name of a class of the data set and, after a tab, that of the label; without a tab the label has
    the class's name. Several classes may share a label. Labels are numbered by first appearance. Classes that are not
    listed are left out; lines that are empty or start with # too.

    Raises:
        ValueError: the file cannot be read, lists no class or one twice, or one that the data set does not have.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise ValueError(f"--class_map {path} cannot be read: {error.strerror}") from None
    pairs = [line.strip().split("\t") for line in lines if line.strip() and not line.startswith("#")]
    wanted = {pair[0].strip(): pair[-1].strip() for pair in pairs}
    if not wanted or len(wanted) != len(pairs):
        raise ValueError(f"--class_map {path} lists {'a class twice' if wanted else 'no class'}")
    unknown = sorted(set(wanted) - set(source.classes))
    if unknown:
        raise ValueError(f"--class_map {path}: the data set has no class {', '.join(unknown[:3])}")
    classes = list(dict.fromkeys(wanted.values()))
    label_of = {name: classes.index(label) for name, label in wanted.items()}
    relabel = np.array([label_of.get(name, -1) for name in source.classes])
    return View(source, relabel[source.labels()] >= 0, classes, relabel)


def hold_out(source: Source, per_class: int, seed: int = 0) -> tuple[View, View]:
    """Splits a training set without a validation set: (training, validation) images.

    Validation gets ``per_class`` images of each class, at most a tenth of the class, chosen by ``seed`` alone.

    Raises:
        ValueError: ``per_class`` is below 1, or no class has ten images.
    """
    if per_class < 1:
        raise ValueError(f"--val_per_class is {per_class}: at least one image of each class is needed")
    labels = source.labels()
    # Images in random order, then by class: the first ones of each class are a random choice of it.
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels, minlength=len(source.classes))
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    taken = order[rank < np.repeat(np.minimum(per_class, sizes // 10), sizes)]
    if not len(taken):
        raise ValueError(f"--val_per_class {per_class}: no class has the ten images that leaving one out takes")
    held = np.zeros(len(labels), dtype=bool)
    held[taken] = True
    return View(source, ~held), View(source, held)
