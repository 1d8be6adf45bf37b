"""Images in Parquet files, by number: a folder or a URL of them, Hugging Face's data sets among them; pyarrow alone.

Nothing is copied: an image is read out of its row group, whose rows are decoded a few at a time up to it. Groups of 100
rows, as Hugging Face writes them, cost about what decoding the JPEG costs; larger ones cost in proportion.
"""

from __future__ import annotations

import fnmatch
import json
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from config.urls import is_url
from inputs.decode import BadImage
from inputs.index_file import IndexWriter, Progress, open_or_build
from inputs.members import label_text
from inputs.names import hash_of, natural
from inputs.remote import file_system, retried
from inputs.shards import LocalShards, Shards, in_threads, index_name, open_shards
from inputs.splits import USUAL

IMAGE_NAMES, LABEL_NAMES = ("image", "img", "jpg", "jpeg", "png"), ("label", "labels", "class", "cls", "fine_label")
OPEN_FILES = 16  # of each thread
FORMAT = 1  # of what the index holds; others are built again
ROWS = 8  # decoded at a time: what bounds the memory of a look-up


class Columns(NamedTuple):
    """Where a file has its images and labels: paths in the schema, and the classes' names where it states them."""

    image: str
    label: str
    names: list[str] | None


class ParquetIndex:
    """Rows of the Parquet files of a folder, one file or a URL, in the order of the files' names.

    The images are the column that Hugging Face's metadata call an image, else one called image (img, jpg, png), else
    the only binary one: bytes, or a struct of bytes and path. Labels are the ClassLabel, else a column called label
    (labels, class, cls): numbers or names.

    Args:
        root, cache_dir, classes, cache_size: as `TarIndex` has them.

    Raises:
        ValueError: pyarrow is missing, no files, no such columns, or a class that is not in ``classes``.
    """

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        classes: Sequence[str] | None = None,
        cache_size: int | None = None,
        pattern: str = "*.parquet",
    ):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError("Parquet files need a package: pip install pyarrow") from None
        self.shards = open_shards(root, pattern, cache_dir, cache_size)
        self.root, self.cache_dir = self.shards.root, cache_dir
        expected = {"format": FORMAT, "shards": self.shards.names, "stamps": self.shards.stamps}
        self._index = open_or_build(
            self.root,
            index_name(self.shards),
            cache_dir,
            build=lambda file: _write_index(file, self.shards, expected),
            is_current=lambda index: {key: index.meta.get(key) for key in expected} == expected,
        )
        names = self._index.meta["classes"]
        self.classes: list[str] = list(classes) if classes is not None else names
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise ValueError(f"{root} has {len(unknown)} classes that the training set lacks: {', '.join(unknown[:3])}")
        number = {name: label for label, name in enumerate(self.classes)}
        self._labels = np.array([number[name] for name in names])
        self._opened = threading.local()  # readers of files, which no two threads may share

    def __len__(self) -> int:
        return len(self._index.arrays[3])

    def _place(self, i: int) -> tuple[int, int, int]:
        """File, row group and row in the group of image ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        self._index.looked_up()
        files, groups, starts, _ = self._index.arrays
        k = int(np.searchsorted(starts, i, side="right")) - 1
        return int(files[k]), int(groups[k]), i - int(starts[k])

    def _rows(self) -> Iterator[tuple[str, int]]:
        """(file, number of rows) of all files."""
        files, _, starts, labels = self._index.arrays
        rows = np.diff(np.append(starts, len(labels)))
        return zip(self.shards.names, np.bincount(files, rows, len(self.shards.names)).astype(int).tolist())

    def relative(self, i: int) -> str:
        """File of image ``i`` and row in it."""
        file = self._place(i)[0]
        return f"{self.shards.names[file]}/{i - int(self._index.arrays[2][self._index.arrays[0] == file][0])}"

    def relatives(self) -> Iterator[bytes]:
        """All of these, in order."""
        return (os.fsencode(f"{name}/{row}") for name, rows in self._rows() for row in range(rows))

    def hashes(self) -> np.ndarray:
        """CRC-32 of these, uint32 (len,)."""
        return np.fromiter(map(hash_of, self.relatives()), dtype=np.uint32, count=len(self))

    def contents(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number of images by kind, and of files that are not read: as `FolderIndex.contents`."""
        return {f"rows of {len(self.shards.names):,} Parquet files": len(self)}, self.shards.beside

    def read(self, i: int) -> bytes:
        """Content of image ``i``. Raises as `Shards.read`, and BadImage for a row without one."""
        file, group, row = self._place(i)
        column = self._index.meta["image"]
        batches = self._file(file).iter_batches(ROWS, row_groups=[group], columns=[column], use_threads=False)
        for batch in batches:
            if row < batch.num_rows:
                value = batch.column(0)[row].as_py()
                break
            row -= batch.num_rows
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise BadImage("the row has no image")
        return data

    def name(self, i: int) -> str:
        file, group, row = self._place(i)
        return f"{self.shards.name(file)} row {row} of group {group}"

    def label(self, i: int) -> int:
        return int(self._labels[self._index.arrays[3][i]])

    def labels(self) -> np.ndarray:
        return self._labels[self._index.arrays[3]].astype(np.int32)

    def _file(self, k: int):
        files = self._opened.__dict__.setdefault("files", OrderedDict())
        if k not in files:
            if len(files) >= OPEN_FILES:
                files.popitem(last=False)
            files[k] = _open(self.shards, k, fill=True)
        files.move_to_end(k)
        return files[k]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    def __setstate__(self, state):
        self.__dict__.update(state, _opened=threading.local())


def split_of(root: str | Path, split: str, part: str) -> tuple[str, str]:
    """(folder or URL, pattern) of a split's files: a folder or files of its name, at the top or in ``data/``.

    The default name of ``part`` ("train" or "val") stands for the usual ones (validation, test). Hugging Face's data
    sets that are not Parquet have a copy that is, in a branch of the same repository, which is looked at last.

    Raises:
        ValueError: there are none; says where they were looked for.
    """
    if is_url(root) and str(root).startswith("http"):
        return f"{root}/{split}", "*.parquet"  # no listing there: see RemoteShards
    places = [str(root)]
    if str(root).startswith("hf://datasets/") and "@" not in str(root):
        places.append(f"{root}@~parquet/default")
    for place in places:
        listing = _list_below(place)
        for name in (split, *(USUAL[part] if split == part else ())):
            for folder, pattern in (
                (name, "*.parquet"),
                ("", f"{name}.parquet"),
                ("", f"{name}-*.parquet"),
                ("data", f"{name}.parquet"),
                ("data", f"{name}-*.parquet"),
            ):
                below = f"{folder}/{pattern}".lstrip("/")
                if any(fnmatch.fnmatch(path, below) and path.count("/") == below.count("/") for path in listing):
                    return f"{place}/{folder}".rstrip("/"), pattern
    raise ValueError(
        f"{root} has no Parquet files of a split {split}: looked for {split}/*.parquet, {split}-*.parquet and "
        f"data/{split}-*.parquet; name the split with --train_split and --val_split"
    )


def _list_below(root: str) -> list[str]:
    """Names of the files in a folder or URL and in its folders."""
    if not is_url(root):
        return [path.relative_to(root).as_posix() for depth in ("*", "*/*") for path in Path(root).glob(depth)]
    fs, path = file_system(root)
    fs.invalidate_cache()
    try:
        found = retried(lambda: fs.find(path, maxdepth=2), root)
    except FileNotFoundError:
        return []
    return [name.removeprefix(path).lstrip("/") for name in found]


def _open(shards: Shards, k: int, fill: bool):
    """pyarrow's view of file ``k``. Raises ValueError for one that is not Parquet."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        if isinstance(shards, LocalShards):
            return ParquetFile(shards.name(k), memory_map=True)
        return ParquetFile(pyarrow.PythonFile(shards.open(k, fill)), buffer_size=1 << 20)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{shards.name(k)} cannot be read as a Parquet file: {error}") from None


def _write_index(file: BinaryIO, shards: Shards, expected: dict) -> None:
    files, groups, starts, labels = (array("q") for _ in range(4))
    number: dict[str, int] = {}
    names, columns, total = None, None, 0
    report = Progress(shards.root, len(shards.names), "files")
    for k, (found, sizes, values) in enumerate(in_threads(partial(_scan, shards), len(shards.names), shards.readers)):
        if columns is not None and found != columns:
            raise ValueError(f"{shards.name(k)} has other columns than {shards.name(0)}: {found} and {columns}")
        columns, names = found, found.names
        for group, size in enumerate(sizes):
            files.append(k)
            groups.append(group)
            starts.append(total)
            total += size
        labels.extend(number.setdefault(value, len(number)) for value in values)
        report.add(len(values))
    report.close()
    if not total:
        raise ValueError(f"--data_path: no rows in the Parquet files of {shards.root}")
    if names is not None:
        wrong = [value for value in number if not value.isdigit() or int(value) >= len(names)]
        if wrong:
            raise ValueError(f"{shards.root} has a label {wrong[0]} that is not one of its {len(names)} classes")
        classes, rank = names, np.array([int(value) for value in number])
    else:
        classes = natural(number)
        place = {name: label for label, name in enumerate(classes)}
        rank = np.array([place[name] for name in number])
    labels = array("q", rank[np.array(labels)].tobytes())
    meta = {**expected, "classes": classes, "image": columns.image}
    IndexWriter(file).finish([files, groups, starts, labels], meta)


def _scan(shards: Shards, k: int) -> tuple[Columns, list[int], list[str]]:
    """The columns of file ``k``, the rows of each row group, and each row's label as text."""
    file = _open(shards, k, fill=False)
    columns = _columns(file.schema_arrow, shards.name(k))
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    values = file.read(columns=[columns.label], use_threads=False).column(0).to_pylist()
    values = [label_text(value) for value in values]
    if None in values:
        raise ValueError(f"{shards.name(k)}: row {values.index(None)} has no label in column {columns.label}")
    return columns, sizes, values


def _columns(schema, where: str) -> Columns:
    """Raises ValueError where it is not plain which columns hold images and labels; names those that are there."""
    from pyarrow import types

    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    of_type = {kind: [name for name, feature in stated.items() if isinstance(feature, dict) and
               feature.get("_type") == kind] for kind in ("Image", "ClassLabel")}  # fmt: skip

    def is_image(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and is_image(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field.type)]
    image = [name for name in (*of_type["Image"], *IMAGE_NAMES) if name in images] or images * (len(images) == 1)
    labels = [
        field.name
        for field in schema
        if types.is_integer(field.type) or types.is_string(field.type) or types.is_large_string(field.type)
    ]
    label = [name for name in (*of_type["ClassLabel"], *LABEL_NAMES) if name in labels]
    if not image or not label:
        missing, wanted = ("an image", "image") if not image else ("a label", "label")
        raise ValueError(
            f"{where}: it is not plain which column is {missing}; its columns are "
            f"{', '.join(f'{field.name} ({field.type})' for field in schema)[:300]}: call it {wanted}"
        )
    kind = schema.field(image[0]).type
    names = stated[label[0]].get("names") if label[0] in of_type["ClassLabel"] else None
    return Columns(f"{image[0]}.bytes" if types.is_struct(kind) else image[0], label[0], names)
