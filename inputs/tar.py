"""Images in tar archives, by number: archives of class folders, one archive per class, or WebDataset's shards.

timm's reader of tar files keeps a Python object per image in every process, and its WebDataset reader can only run
through a shard from its beginning; the curriculum's sampler asks for images by number, so shards are indexed here.
"""

import os
import tarfile
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from inputs.index_file import IndexWriter, Progress, open_or_build
from inputs.shards import Shards, in_threads, index_name, open_shards

LABEL_SUFFIX = ".cls"


class TarIndex:
    """Images in the archives ``root/*.tar`` (or in the one archive ``root``), in the order of the archives' names.

    An image's class is what the member ``<same name>.cls`` says (WebDataset), else the folder it lies in inside the
    archive, else the archive's name. Classes are sorted; as numbers, if all are.

    Args:
        root: a folder, one archive, or a URL as `RemoteShards` reads it.
        cache_dir, classes: as `FolderIndex` has them. pattern: of the archives' names.
        cache_size: bytes of archives at a URL that ``cache_dir`` may hold; None: none are kept.

    Raises:
        ValueError: no archive, something that is not an archive, no images, or a class that is not in ``classes``.
    """

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        classes: Sequence[str] | None = None,
        pattern: str = "*.tar",
        cache_size: int | None = None,
    ):
        self.shards = open_shards(root, pattern, cache_dir, cache_size)
        expected = {"shards": self.shards.names, "stamps": self.shards.stamps}
        self._index = open_or_build(
            self.shards.root,
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
        self._labels = np.array([self.classes.index(name) for name in names])

    def __len__(self) -> int:
        return len(self._index.arrays[0])

    def _entry(self, i: int) -> list[int]:
        """Shard, offset, size and own class number of image ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        self._index.looked_up()
        return [int(values[i]) for values in self._index.arrays]

    def read(self, i: int) -> bytes:
        """Content of image ``i``. Raises as `Shards.read`."""
        shard, offset, size, _ = self._entry(i)
        return self.shards.read(shard, offset, size)

    def name(self, i: int) -> str:
        shard, offset, _, _ = self._entry(i)
        return f"{self.shards.name(shard)} at byte {offset}"

    def label(self, i: int) -> int:
        return int(self._labels[self._entry(i)[3]])

    def labels(self) -> np.ndarray:
        return self._labels[self._index.arrays[3]].astype(np.int32)


def _write_index(file: BinaryIO, source: Shards, expected: dict) -> None:
    shards, offsets, sizes, labels = (array("q") for _ in range(4))
    number: dict[str, int] = {}
    report = Progress(source.root, len(source.names), "archives")
    for k, found in enumerate(in_threads(partial(_scan, source), len(source.names), source.readers)):
        for offset, size, name in found:
            shards.append(k)
            offsets.append(offset)
            sizes.append(size)
            labels.append(number.setdefault(name, len(number)))
        report.add(len(found))
    report.close()
    if not number:
        raise ValueError(
            f"--data_path: no images in the archives of {source.root}; known are {' '.join(IMG_EXTENSIONS)}"
        )
    classes = sorted(number, key=int) if all(name.isdigit() for name in number) else sorted(number)
    rank = np.empty(len(classes), dtype=np.int64)
    rank[[number[name] for name in classes]] = np.arange(len(classes))
    labels = array("q", rank[np.array(labels)].tobytes())
    IndexWriter(file).finish([shards, offsets, sizes, labels], {**expected, "classes": classes})


def _scan(source: Shards, k: int) -> list[tuple[int, int, str]]:
    """(offset, size, class) of each image in archive ``k``, as far as it can be read."""
    images, stated = [], {}
    path = source.name(k)
    try:
        with source.open(k) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            try:
                for member in archive:
                    stem, suffix = os.path.splitext(member.name)
                    if not member.isfile() or os.path.basename(stem).startswith("."):
                        continue
                    if suffix.lower() == LABEL_SUFFIX:
                        stated[stem] = archive.extractfile(member).read().decode().strip()
                    elif suffix.lower() in IMG_EXTENSIONS:
                        images.append((member.offset_data, member.size, stem))
                    archive.members = []  # else it keeps an object per member
            except tarfile.ReadError:
                pass  # cut short: what lies beyond is missing, and the last image is found bad when it is read
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data_path: {path} cannot be read as a tar archive: {error}") from error
    own = os.path.basename(path).removesuffix(".tar")
    return [
        (offset, size, stated.get(stem) or os.path.basename(os.path.dirname(stem)) or own)
        for offset, size, stem in images
    ]
