"""Parts and unions of data sets: label maps and class subsets, a held-out part of the training set, several folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from config.files import read_text
from inputs.names import mix, name_hashes, natural


class Source(Protocol):
    """A data set by number, as the curriculum's sampler asks for it."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, i: int) -> Any:
        """Encoded bytes or a PIL image. Raises OSError or BadImage if there is no getting it."""

    def label(self, i: int) -> int | tuple[int, ...]:
        """Class number; of a source whose ``several`` is true, the class numbers of the image, ascending."""

    def labels(self) -> np.ndarray:
        """All labels, integers (len,); if there are several of an image, bool (len, classes)."""

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

    dropped: Sequence[str] = ()  # messages on images that were skipped because they cannot be used

    @property
    def several(self) -> bool:
        return several_labels(self.source)

    def label(self, i: int) -> int | tuple[int, ...]:
        label = self.source.label(self._place(i))
        return label if self._relabel is None else _relabelled(label, self._relabel)

    def labels(self) -> np.ndarray:
        labels = self.source.labels()[self.places()]
        return labels if self._relabel is None else _all_relabelled(labels, self._relabel, len(self.classes))

    def places(self) -> np.ndarray:
        """Numbers in the source of all images, (len,)."""
        lengths = np.diff(self._before)
        return np.arange(len(self)) + np.repeat(self._first - self._before[:-1], lengths)


class Joined:
    """Several sources one after the other; their classes, by name, in natural order or in the order given.

    Raises:
        ValueError: a source has a class that ``classes`` lacks.
    """

    def __init__(self, sources: Sequence[Source], classes: Sequence[str] | None = None):
        self.sources = list(sources)
        names = list(classes) if classes is not None else natural({name for s in sources for name in s.classes})
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

    @property
    def several(self) -> bool:
        return any(map(several_labels, self.sources))

    def label(self, i: int) -> int | tuple[int, ...]:
        k, place = self._place(i)
        return _relabelled(self.sources[k].label(place), self._relabel[k])

    def labels(self) -> np.ndarray:
        parts = zip(self.sources, self._relabel)
        return np.concatenate([_all_relabelled(s.labels(), relabel, len(self.classes)) for s, relabel in parts])


def several_labels(source: Source) -> bool:
    """Whether images of a source may have several labels each."""
    return getattr(source, "several", False)


def class_counts(source: Source) -> list[int]:
    """Images of each class."""
    labels = source.labels()
    return (np.bincount(labels, minlength=len(source.classes)) if labels.ndim == 1 else labels.sum(0)).tolist()


def targets(label: int | tuple[int, ...], classes: int) -> int | np.ndarray:
    """What is learned of an image: its class number, or float32 (classes,) with 1 for each of several labels."""
    if not isinstance(label, tuple):
        return label
    hot = np.zeros(classes, dtype=np.float32)
    hot[list(label)] = 1
    return hot


def _relabelled(label: int | tuple[int, ...], relabel: np.ndarray) -> int | tuple[int, ...]:
    if isinstance(label, tuple):
        return tuple(sorted({int(relabel[k]) for k in label if relabel[k] >= 0}))
    return int(relabel[label])


def _all_relabelled(labels: np.ndarray, relabel: np.ndarray, classes: int) -> np.ndarray:
    if labels.ndim == 1:
        return relabel[labels]
    table = np.zeros((len(labels), classes), dtype=bool)
    for old, new in enumerate(relabel.tolist()):
        if new >= 0:
            table[:, new] |= labels[:, old]
    return table


def map_classes(source: Source, path: str | Path) -> View:
    """Keeps the classes that a file lists, under the labels it gives them.

    Each line has the name of a class of the data set and, after a tab, that of the label; without a tab the label has
    the class's name. Several classes may share a label. Labels are numbered by first appearance. Classes that are not
    listed are skipped; lines that are empty or start with # too.

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
    labels = source.labels()
    keep = relabel[labels] >= 0 if labels.ndim == 1 else labels[:, relabel >= 0].any(1)
    return View(source, keep, classes, relabel)


def in_order(source: Source, classes: Sequence[str] | None) -> Source:
    """The source with its classes numbered in the order of ``classes``, if these are the same classes."""
    if classes is None or list(classes) == list(source.classes) or set(classes) != set(source.classes):
        return source
    relabel = np.array([list(classes).index(name) for name in source.classes])
    return View(source, np.ones(len(source), dtype=bool), classes, relabel)


def hold_out(source: Source, per_class: int | None = None, share: float | None = None) -> tuple[View, View, list[str]]:
    """Splits a training set without a validation set: (training images, validation images, classes that spare none).

    Whether an image is held out depends on a hash of its relative path and a threshold, so that adding, removing or
    renaming other images does not move it to the other part. The threshold is ``share``; with ``per_class`` it is that
    of about so many images in each class, at most a tenth: the class's size counts rounded to a power of two, lest
    every image more or less shift it. A class of which all images would be held out spares none. Images without any
    label are held out as if they were a class.

    Raises:
        ValueError: neither or both are given, one is out of range, or no image at all is held out.
    """
    if (per_class is None) == (share is None):
        raise ValueError("--val_per_class and --val_share both hold images out: give one of them")
    if per_class is not None and per_class < 1:
        raise ValueError(f"--val_per_class is {per_class}: at least one image of each class is needed")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--val_share is {share:g}: a share lies between 0 and 1 (or 0% and 100%)")
    labels, classes = source.labels(), len(source.classes)
    single = labels.ndim == 1
    sizes = np.bincount(labels, minlength=classes) if single else labels.sum(0)

    def threshold(count):
        """Of a class of so many images."""
        if share is not None:
            return np.full(np.shape(count), share)
        return np.minimum(per_class / 2.0 ** np.round(np.log2(np.maximum(count, 1))), 0.1)

    thresholds = threshold(sizes)
    if single:
        own = thresholds[labels]
    else:  # an image of several classes is held out by the least eager of them; those of none are as a class
        own, without = np.where(labels, thresholds, 1.0).min(1), ~labels.any(1)
        own[without] = threshold(without.sum())
    held = mix(path_hashes(source)) < np.minimum(own * 2.0**64, 2.0**64 - 2048).astype(np.uint64)
    spared = np.bincount(labels[held], minlength=classes) if single else labels[held].sum(0)
    whole = spared == sizes
    held &= ~(whole[labels] if single else (labels & whole).any(1))
    spared = np.bincount(labels[held], minlength=classes) if single else labels[held].sum(0)
    if not held.any():
        setting = f"--val_per_class {per_class}" if share is None else f"--val_share {share:g}"
        raise ValueError(
            f"{setting} holds out none of {len(labels)} images: there are too few; raise it (--val_share 30%), or add "
            "a validation folder"
        )
    none = [name for name, count, size in zip(source.classes, spared.tolist(), sizes.tolist()) if size and not count]
    return View(source, ~held), View(source, held), none


def path_hashes(source: Source) -> np.ndarray:
    """A number for each image that follows from its relative path alone, uint32 (len,)."""
    if isinstance(source, Joined):
        return np.concatenate([path_hashes(part) for part in source.sources])
    if isinstance(source, View):
        return path_hashes(source.source)[source.places()]
    if hasattr(source, "hashes"):
        return source.hashes()
    return name_hashes("/".join(source.name(i).split("/")[-2:]) for i in range(len(source)))


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells two sets of labelled images apart, in plain types: ``images`` and ``classes``, how many; ``digest`` of
    relative paths and the names of their classes; ``order`` of these images, and of all classes.

    It does not depend on where the data lie. Contents are not read.
    """
    names = mix(name_hashes(map(str, source.classes)))
    labels, paths = source.labels(), mix(path_hashes(source))
    of_class = names[labels] if labels.ndim == 1 else labels.astype(np.uint64) @ names
    images = mix(paths ^ mix(of_class))
    ordered = np.concatenate([images, names])
    order = mix(ordered ^ mix(np.arange(len(ordered)))).sum(dtype=np.uint64)
    return {
        "images": len(source),
        "classes": len(source.classes),
        "digest": f"{int(images.sum(dtype=np.uint64)):016x}",
        "order": f"{int(order):016x}",
    }
