"""Images in tar archives, by number: archives of class folders, one archive per class, or WebDataset's shards.

timm's reader of tar files keeps a Python object per image in every process, and its WebDataset reader can only run
through a shard from its beginning; the curriculum's sampler asks for images by number, so shards are indexed here.
"""

import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from config.files import open_file
from inputs.archive import LIMIT, open_archive
from inputs.decode import BadImage
from inputs.index_file import INDEX_NAME, IndexWriter, Progress, open_or_build

LABEL_SUFFIX = ".cls"
OPEN_FILES = 64


class TarIndex:
    """Images in the archives ``root/*.tar`` (or in the one archive ``root``), in the order of the archives' names.

    An image's class is what the member ``<same name>.cls`` says (WebDataset), else the folder it lies in inside the
    archive, else the archive's name. Classes are sorted; as numbers, if all are.

    Args:
        root, cache_dir, classes: as `FolderIndex` has them. pattern: of the archives' names.

    Raises:
        ValueError: no archive, something that is not an archive, no images, or a class that is not in ``classes``.
    """

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        classes: Sequence[str] | None = None,
        pattern: str = "*.tar",
    ):
        path = Path(root).absolute()
        self.root = os.fspath(path.parent if path.is_file() else path)
        found = [path] if path.is_file() else [p for p in path.glob(pattern) if p.is_file()]
        self.shards = sorted(p.name for p in found if not p.name.startswith("."))
        if not self.shards:
            raise ValueError(f"--data_path: there is no {pattern} in {path}")
        stamps = [_stamp(os.path.join(self.root, shard)) for shard in self.shards]
        expected = {"shards": self.shards, "stamps": stamps}
        self._index = open_or_build(
            self.root,
            f"{INDEX_NAME}_{path.name if path.is_file() else pattern.replace('*', '_')}",
            cache_dir,
            build=lambda file: _write_index(file, self.root, expected),
            is_current=lambda index: {key: index.meta.get(key) for key in expected} == expected,
        )
        names = self._index.meta["classes"]
        self.classes: list[str] = list(classes) if classes is not None else names
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise ValueError(f"{path} has {len(unknown)} classes that the training set lacks: {', '.join(unknown[:3])}")
        self._labels = np.array([self.classes.index(name) for name in names])
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index.arrays[0])

    def _entry(self, i: int) -> list[int]:
        """Shard, offset, size and own class number of image ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        self._index.looked_up()
        return [int(values[i]) for values in self._index.arrays]

    def read(self, i: int) -> bytes:
        """Content of image ``i``. Raises OSError, or BadImage if the archive ends before it."""
        shard, offset, size, _ = self._entry(i)
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) < size:
            raise BadImage(f"the archive is cut short: {len(data)} of {size} bytes")
        return data

    def name(self, i: int) -> str:
        shard, offset, _, _ = self._entry(i)
        return f"{os.path.join(self.root, self.shards[shard])} at byte {offset}"

    def label(self, i: int) -> int:
        return int(self._labels[self._entry(i)[3]])

    def labels(self) -> np.ndarray:
        return self._labels[self._index.arrays[3]].astype(np.int32)

    def _descriptor(self, shard: int) -> int:
        """An open file; `os.pread` needs no position, so forked workers may share it."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(os.path.join(self.root, self.shards[shard]), os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self):
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self):
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _write_index(file: BinaryIO, root: str, expected: dict) -> None:
    shards, offsets, sizes, labels = (array("q") for _ in range(4))
    number: dict[str, int] = {}
    report = Progress(root, len(expected["shards"]), "archives")
    for k, shard in enumerate(expected["shards"]):
        found = _scan(os.path.join(root, shard))
        for offset, size, name in found:
            shards.append(k)
            offsets.append(offset)
            sizes.append(size)
            labels.append(number.setdefault(name, len(number)))
        report.add(len(found))
    report.close()
    if not number:
        raise ValueError(f"--data_path: no images in the archives of {root}; known are {' '.join(IMG_EXTENSIONS)}")
    classes = sorted(number, key=int) if all(name.isdigit() for name in number) else sorted(number)
    rank = np.empty(len(classes), dtype=np.int64)
    rank[[number[name] for name in classes]] = np.arange(len(classes))
    labels = array("q", rank[np.array(labels)].tobytes())
    IndexWriter(file).finish([shards, offsets, sizes, labels], {**expected, "classes": classes})


def _scan(path: str) -> list[tuple[int, int, str]]:
    """(offset, size, class) of each image in an archive, as far as it can be read."""
    images, stated = [], {}
    try:
        with open_file(path) as file, open_archive(file) as archive:
            try:
                for member in archive:
                    stem, suffix = os.path.splitext(member.name)
                    if not member.isfile() or os.path.basename(stem).startswith("."):
                        continue
                    if suffix.lower() == LABEL_SUFFIX:
                        stated[stem] = archive.extractfile(member).read(LIMIT).decode().strip()
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
