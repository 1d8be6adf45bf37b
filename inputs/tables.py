"""Labels in a table: reading CSV, TSV, JSON lines, JSON and Parquet, and joining the rows to images by their paths."""

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config.files import open_file
from inputs.formats import ENDINGS, ending
from inputs.members import label_text

COLUMNS = {
    "path": ("path file filename file_name filepath file_path image image_path image_name image_id imageid img key id"),
    "label": ("label labels class classes class_name target category tags"),
    "split": ("split set subset partition fold"),
}
KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


class Row(NamedTuple):
    """Path as the table has it, labels (none: an image that is not labelled), split or ""."""

    path: str
    labels: list[str]
    split: str


class Table:
    """The rows of a table, small: paths are held as hashes, labels and splits as numbers.

    ``paths(transform)`` hashes each path after a change; see `inputs.labelled`.
    """

    def __init__(self, name: str, rows: Callable[[], Iterable[Row]], several: bool = False) -> None:
        self.name, self._rows = name, rows
        classes: dict[str, int] = {}
        splits: dict[str, int] = {}
        starts, numbers, split_of = array("q", [0]), array("i"), array("i")
        for row in rows():
            if len(row.labels) > 1 and not several:
                raise ValueError(
                    f"--labels {name}: {row.path} has {len(row.labels)} labels ({', '.join(row.labels[:3])}), but "
                    "--task supervised takes one of each image: learn them all with --task multilabel"
                )
            numbers.extend(classes.setdefault(label, len(classes)) for label in row.labels)
            starts.append(len(numbers))
            split_of.append(splits.setdefault(row.split, len(splits)))
        if not classes:
            raise ValueError(f"--labels {name} has no labels")
        self.classes, self.splits = list(classes), list(splits)
        self.starts, self.numbers, self.split_of = (
            np.array(starts),
            np.array(numbers, dtype=np.int32),
            np.array(split_of),
        )

    def __len__(self) -> int:
        return len(self.split_of)

    def hashes(self, change: Callable[[str], str]) -> np.ndarray:
        """int64 (len,): Python's hash of each path after ``change``, the same within one process."""
        return np.fromiter((hash(os.fsencode(change(row.path))) for row in self._rows()), dtype=np.int64)

    def path(self, number: int) -> str:
        return next(row.path for k, row in enumerate(self._rows()) if k == number)


def read_table(
    path: str | Path, columns: Sequence[str] | None = None, separator: str | None = None, several: bool = False
) -> Table:
    """Opens a table of labels.

    Args:
        path: .csv or .tsv (with a line of column names, or path and label alone), .jsonl (an object a line), .json (a
            list of such objects, or a mapping of paths to labels) or .parquet.
        columns: names of the columns with the path, the label and, if there is one, the split; default: the usual ones.
        separator: between the labels of one image; lists and repeated rows state several too.
        several: images may have several labels.

    Raises:
        ValueError: it cannot be read, lacks a column, or has several labels where one is expected.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"--labels {path}: its ending must be one of {' '.join(KINDS)}")
    try:
        with open_file(path) as file:  # no pipe, which would be waited for
            stamp = os.fstat(file.fileno()).st_mtime_ns
        return _cached(path, stamp, tuple(columns) if columns else None, separator, several)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--labels {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


@lru_cache(maxsize=2)  # training and validation set are read from the same one
def _cached(path: Path, stamp: int, columns: tuple | None, separator: str | None, several: bool) -> Table:
    return Table(str(path), lambda: _rows(path, columns, separator, several), several)


def _rows(path: Path, columns: tuple | None, separator: str | None, several: bool) -> Iterator[Row]:
    places = None
    for number, record in enumerate(_records(path), 1):
        places = places or _places(path, list(record), columns, several)
        value = record.get(places["path"])
        if value is None or value == "":
            raise ValueError(f"--labels {path}: row {number} has no {places['path']}")
        split = record.get(places["split"]) if places["split"] else ""
        if places["label"] is None:
            labels = _marked(path, number, record, {places["path"], places["split"]})
        else:
            labels = _labels(record.get(places["label"]), separator, several)
        if labels is None:
            raise ValueError(
                f"--labels {path}: row {number} has {places['label']} {record[places['label']]!r}: a label is a text "
                "or a whole number"
            )
        yield Row(str(value), labels, "" if split is None else str(split))


def _marked(path: Path, number: int, record: dict[str, Any], others: set[str | None]) -> list[str]:
    """The labels of a row with a column of 0 and 1 for each class."""
    marked = []
    for name, value in record.items():
        if name not in others:
            mark = {"0": False, "0.0": False, "": False, "1": True, "1.0": True}.get(str(value).strip())
            if isinstance(value, bool):
                mark = value
            if mark is None:
                raise ValueError(
                    f"--labels {path}: row {number} has {name} {value!r}: without a column of labels each column is a "
                    "class, marked 0 or 1; name the columns of paths and labels with --label_columns"
                )
            if mark:
                marked.append(name)
    return marked


def _labels(value: Any, separator: str | None, several: bool) -> list[str] | None:
    """The labels of a cell, none if it is empty; None for what is no label."""
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str):
        if several and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                return None
        elif separator:
            value = [part for part in (text.strip() for text in value.split(separator)) if part]
    found = label_text(value)
    if found is None:
        return [] if isinstance(value, str) else None
    return list(dict.fromkeys(found)) if isinstance(found, list) else [found]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(path)
    elif kind in (".csv", ".tsv"):
        yield from _separated(path, "\t" if kind == ".tsv" else ",")
    else:
        with open(path, encoding="utf-8-sig") as file:
            content = (json.loads(line) for line in file if line.strip()) if kind == ".jsonl" else json.load(file)
            if isinstance(content, dict):
                content = ({"path": key, "label": value} for key, value in content.items())
            for record in content:
                if not isinstance(record, dict):
                    raise ValueError(f"--labels {path}: {str(record)[:60]!r} is no row with a path and a label")
                yield record


def _separated(path: Path, separator: str) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        if separator == "," and first.count(";") > first.count(","):
            separator = ";"
        file.seek(0)
        reader = csv.reader(file, delimiter=separator)
        names = None
        for cells in reader:
            if not cells:
                continue
            if names is None:
                # Without a line of names the first cell is the path of an image.
                headless = ending(cells[0]) in ENDINGS
                names = ["path", "label", "split"][: len(cells)] if headless else [cell.strip() for cell in cells]
                if not headless:
                    continue
            yield dict(zip(names, cells))


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(f"--labels {path} needs a package: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        # Columns of numbers and texts (and lists of them): not the bytes of images.
        wanted = [field.name for field in file.schema_arrow if "binary" not in str(field.type)]
        for batch in file.iter_batches(columns=wanted):
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"--labels {path} cannot be read: {' '.join(str(error).split())}") from None


def _places(path: Path, names: list[str], columns: tuple | None, several: bool) -> dict[str, str | None]:
    """Which column of ``names`` holds path, label and split (None: no such column; without labels each is a class)."""
    if columns:
        for name in columns:
            if name not in names:
                raise ValueError(f"--label_columns: {path} has no column {name}; it has {', '.join(names)}")
        return dict(zip(("path", "label", "split"), (*columns, None)))
    lower = {name.lower(): name for name in reversed(names)}
    found = {
        what: next((lower[usual] for usual in words.split() if usual in lower), None) for what, words in COLUMNS.items()
    }
    for what in ("path", "label"):
        if found[what] is None and not (what == "label" and several and found["path"]):
            raise ValueError(
                f"--labels {path}: none of its columns ({', '.join(names)}) has a usual name for the {what}: name them "
                "with --label_columns '[path, label]' or '[path, label, split]'"
            )
    return found
