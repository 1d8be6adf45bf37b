"""TensorFlow Datasets by number, from ArrayRecord files, with their own random-access data source; no TensorFlow.

Its readers start threads of their own, and a process that has them must not fork. So a loader's workers read, and what
any other process wants to know it asks a helper process that is started afresh.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch.utils.data import get_worker_info

from inputs.index_file import INDEX_NAME, IndexWriter, Progress, open_or_build
from inputs.names import hash_of

AT_ONCE = 1000  # records whose labels are asked for


class TensorFlowData:
    """One split of a data set that was prepared with ``file_format="array_record"``.

    The first time, all records are read once for their labels, which an index then keeps.

    Args:
        name: as in ``tfds.builder``, perhaps with a configuration and version (``imagenet2012:5.1.0``).
        root: its data_dir. split: by its name; slices like ``train[:90%]`` too.
        classes: of the training set, for a validation set.

    Raises:
        ValueError: the packages are missing, the data set is not there or in another format, it has no such split, no
            image, no class label, or a class that is not in ``classes``.
    """

    def __init__(self, name: str, root: str | Path, split: str, classes: Sequence[str] | None = None):
        self._name, self._root, self._split = name, os.fspath(root), split
        builder = self._builder()
        features = builder.info.features
        self._image, self._label = (_one(features, kind, name) for kind in ("Image", "ClassLabel"))
        files = sorted({each.filename for each in builder.info.splits[split].file_instructions})
        self.root, self.cache_dir = os.fspath(builder.data_dir), None
        self.stamps = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, files)]
        expected = {"split": split, "files": [os.path.basename(file) for file in files], "stamps": self.stamps}
        self._index = open_or_build(
            self.root,
            f"{INDEX_NAME}_{re.sub(r'[^A-Za-z0-9._-]', '_', split)}",
            None,
            build=lambda file: self._write_index(file, expected),
            is_current=lambda index: {key: index.meta.get(key) for key in expected} == expected,
        )
        names = list(features[self._label].names)
        self.classes: list[str] = list(classes) if classes is not None else names
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise ValueError(f"tfds/{name}, split {split}, has classes that training lacks: {', '.join(unknown[:3])}")
        self._labels = np.array([self.classes.index(each) for each in names], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._index.arrays[0])

    def read(self, i: int) -> bytes:
        """Encoded bytes of image ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self._ask(_image, i)

    def name(self, i: int) -> str:
        return f"tfds/{self._name}: image {i} of {self._split}"

    def relative(self, i: int) -> str:
        """Split and number of image ``i``."""
        return f"{self._split}/{i}"

    def relatives(self) -> Iterator[bytes]:
        """All of these, in order."""
        return (self.relative(i).encode() for i in range(len(self)))

    def hashes(self) -> np.ndarray:
        """CRC-32 of these, uint32 (len,)."""
        return np.fromiter(map(hash_of, self.relatives()), dtype=np.uint32, count=len(self))

    def contents(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number of images by kind, and nothing that was skipped: as `FolderIndex.contents`."""
        return {f"records of split {self._split}": len(self)}, {}

    def label(self, i: int) -> int:
        return int(self._labels[self._index.arrays[0][i]])

    def labels(self) -> np.ndarray:
        return self._labels[self._index.arrays[0]]

    def _builder(self) -> Any:
        try:
            import array_record.python.array_record_data_source  # noqa: F401
            import tensorflow_datasets
        except ImportError:
            raise ValueError(
                f"--data_set tfds/{self._name} needs packages: pip install tensorflow-datasets array_record"
            ) from None
        try:
            builder = tensorflow_datasets.builder(self._name, data_dir=self._root)
            if self._split.partition("[")[0] not in builder.info.splits:
                there = ", ".join(builder.info.splits) or "none"
                raise ValueError(f"there is no split {self._split}: {there}; see --train_split and --val_split")
            builder.as_data_source(self._split)
            return builder
        except Exception as error:  # theirs are of many kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--data_set tfds/{self._name} cannot be read from --data_path {self._root}: {reason} (prepare it with "
                f"tfds.builder({self._name!r}, data_dir=..., file_format='array_record').download_and_prepare())"
            ) from None

    def _write_index(self, file: BinaryIO, expected: dict) -> None:
        total, labels = self._ask(_length), array("q")
        report = Progress(f"tfds/{self._name}", -(-total // AT_ONCE), "parts")
        for start in range(0, total, AT_ONCE):
            labels.extend(self._ask(_labels, start, min(start + AT_ONCE, total), self._label))
            report.add(AT_ONCE)
        report.close()
        IndexWriter(file).finish([labels], expected)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of this process if it is a loader's worker, else of one that never forks: see the module."""
        what = (self._name, self._root, self._split, self._image)
        if get_worker_info() is not None:
            return question(what, *arguments)
        return _reader(os.getpid()).submit(question, what, *arguments).result()


@cache
def _reader(_owner: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@cache
def _records(what: tuple[str, str, str, str]) -> Any:
    import tensorflow_datasets as tfds

    name, root, split, image = what
    builder = tfds.builder(name, data_dir=root)
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})


def _length(what: tuple) -> int:
    return len(_records(what))


def _image(what: tuple, i: int) -> bytes:
    return _records(what)[i][what[-1]]


def _labels(what: tuple, start: int, stop: int, label: str) -> list[int]:
    return [int(_records(what)[i][label]) for i in range(start, stop)]


def _one(features: Any, kind: str, name: str) -> str:
    """The feature of a kind; where there are several, the one called image or label."""
    found = [key for key, feature in features.items() if type(feature).__name__ == kind]
    usual = {"Image": "image", "ClassLabel": "label"}[kind]
    if usual in found or len(found) == 1:
        return usual if usual in found else found[0]
    raise ValueError(f"tfds/{name} has {len(found)} features of kind {kind}: {', '.join(found) or 'none'}")
