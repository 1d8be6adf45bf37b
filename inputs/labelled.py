"""Images whose labels are written elsewhere: a table's rows joined to the images of a folder or of archives."""

import os
import posixpath
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from inputs.names import natural
from inputs.tables import Table
from inputs.views import Source, View


class Labelled(View):
    """The images of a flat index that a table labels, in the index's order.

    Args:
        source: a `FolderIndex` or `TarIndex` made with ``flat=True``.
        table: the labels.
        where: path of the source's root below --data_path, which the table's paths may begin with; "" for itself.
        split: value of the table's split column; None: all rows.
        classes: of the training set, for a validation set; default: those of the rows, numbers sorted as numbers.
        several: images may have several labels: then `label` gives a tuple of class numbers, ascending, and `labels`
            a table, bool (len, classes).

    Attributes:
        unlabelled: images without a row or with an empty label. unused: rows (of the split) without an image.

    Raises:
        ValueError: no row fits an image, rows that contradict each other, names that fit several images, or classes
            that are not in ``classes``.
    """

    def __init__(
        self,
        source: Source,
        table: Table,
        where: str = "",
        split: str | None = None,
        classes: Sequence[str] | None = None,
        several: bool = False,
    ) -> None:
        rows = np.arange(len(table)) if split is None else np.flatnonzero(table.split_of == table.splits.index(split))
        images, order, found = _join(source, table, rows, where)
        labels_per_row = np.diff(table.starts)[order]
        image_of, number_of = np.repeat(images, labels_per_row), _gather(table, order)
        pairs = np.unique(np.stack([image_of, number_of]), axis=1)  # by image, then by label: repeated rows once
        image_of, number_of = pairs
        keep = np.zeros(len(source), dtype=bool)
        keep[images if several else image_of] = True  # several: an image may have none of the labels
        counts = np.bincount(image_of, minlength=len(source))
        if not several and len(twice := np.flatnonzero(counts > 1)):
            both = " and ".join(table.classes[number] for number in number_of[image_of == twice[0]][:2])
            raise ValueError(
                f"--labels {table.name}: {len(twice)} images have rows with different labels, the first is "
                f"{source.relative(int(twice[0]))}: {both}; several labels of one image need "
                "--task multilabel"
            )
        present = [table.classes[number] for number in np.unique(number_of)]
        names = list(classes) if classes is not None else natural(present)
        unknown = sorted(set(present) - set(names))
        if unknown:
            raise ValueError(
                f"--labels {table.name} has {len(unknown)} classes of validation images that no training image has: "
                f"{', '.join(unknown[:3])}"
            )
        super().__init__(source, keep, names)
        number = {name: label for label, name in enumerate(names)}
        relabel = np.array([number.get(name, -1) for name in table.classes], dtype=np.int32)
        self._several, self.table = several, table.name
        self._numbers = relabel[number_of]
        self._starts = np.concatenate([[0], np.cumsum(counts[keep])])
        self.unlabelled, self.unused = int(len(source) - keep.sum()), int(len(rows) - found)

    @property
    def several(self) -> bool:
        return self._several

    def label(self, i: int) -> int | tuple[int, ...]:
        self._place(i)
        own = self._numbers[self._starts[i] : self._starts[i + 1]].tolist()
        return tuple(sorted(own)) if self._several else own[0]

    def labels(self) -> np.ndarray:
        if not self._several:
            return self._numbers
        table = np.zeros((len(self), len(self.classes)), dtype=bool)
        table[np.repeat(np.arange(len(self)), np.diff(self._starts)), self._numbers] = True
        return table


def _gather(table: Table, rows: np.ndarray) -> np.ndarray:
    """The label numbers of these rows, one after the other."""
    lengths = np.diff(table.starts)[rows]
    begins = np.cumsum(lengths) - lengths
    places = np.arange(int(lengths.sum())) + np.repeat(table.starts[:-1][rows] - begins, lengths)
    return table.numbers[places]


def _join(source: Source, table: Table, rows: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(image, row) of each row that names an image, and how many rows do.

    Paths are compared in several ways, from the strictest on: below --data_path, below the split's folder, by file
    name; each with the ending, without it, and up to the first dot. The first that fits every row counts, else the one
    that fits most.
    """
    base = source.root[: len(source.root) - len(where)].rstrip("/")

    def normal(path: str) -> str:
        return posixpath.normpath(path.replace("\\", "/").removeprefix(base + "/"))

    best, ambiguous = None, None
    for locate in _locations(source, where):
        for cut in (str, lambda path: posixpath.splitext(path)[0], _to_first_dot):
            of_rows = table.hashes(lambda path, cut=cut: cut(normal(path)))[rows]
            of_images = np.fromiter((hash(os.fsencode(cut(path))) for path in locate()), dtype=np.int64)
            order = np.argsort(of_images, kind="stable")
            of_images = of_images[order]
            place = np.minimum(np.searchsorted(of_images, of_rows), len(order) - 1)
            fits = of_images[place] == of_rows
            place, chosen = place[fits], rows[fits]
            after = np.minimum(place + 1, len(order) - 1)
            twins = np.flatnonzero((after > place) & (of_images[after] == of_images[place]))
            if len(twins):
                spots = order[place[twins[0]]], order[after[twins[0]]]
                ambiguous = ambiguous or (int(chosen[twins[0]]), *(source.relative(int(spot)) for spot in spots))
                continue
            if len(place) > (best[2] if best else 0):
                best = order[place], chosen, len(place)
            if len(place) == len(rows):
                return best
    if best is None and ambiguous:
        row, first, second = ambiguous
        raise ValueError(
            f"--labels {table.name}: the row {table.path(row)} fits several images, {first} and {second}: write the "
            "paths below --data_path"
        )
    if best is None:
        raise ValueError(
            f"--labels {table.name}: none of its {len(rows)} rows names one of the {len(source)} images of "
            f"{source.root} (the first row: {table.path(int(rows[0])) if len(rows) else 'none'}; the first image: "
            f"{source.relative(0)})"
        )
    return best


def _locations(source: Source, where: str) -> Iterator[Callable[[], Iterator[str]]]:
    """Ways to call all images, each as a function that gives their names in order."""
    begin = f"{where}/" if where else ""

    def paths() -> Iterator[str]:
        return (os.fsdecode(path) for path in source.relatives())

    if where:
        yield lambda: (begin + path for path in paths())
    yield paths
    if hasattr(source, "shards"):
        yield lambda: (path.partition("/")[2] for path in paths())  # without the archive
    yield lambda: (posixpath.basename(path) for path in paths())


def _to_first_dot(path: str) -> str:
    folder, name = posixpath.split(path)
    return posixpath.join(folder, name.split(".", 1)[0])
