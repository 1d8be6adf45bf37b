"""An image folder by index: listed once, opened in moments, small in every process whatever its size."""

import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from config.files import open_file
from inputs.index_file import INDEX_NAME, IndexFile, IndexWriter, Progress, open_or_build

# File names per entry of the offset table: one lookup splits half a KB, and 13 million images need 3 MB of table.
BLOCK = 32
THREADS = 16  # for listing and checking folders: what a network file system needs to hide its latency


class Directory(NamedTuple):
    """One listed folder: path below the root, modification time (ns; -1: too young to trust), sorted image names."""

    path: str
    mtime: int
    names: list[str]


class FolderIndex:
    """Images under ``root``, one folder per class, in the order of torchvision's ImageFolder.

    Folders and files whose names start with a dot are left out. The first time, the tree is listed (with a progress
    line on standard error) and the index written to the user's cache folder.
    Later it is opened if no folder has changed since: file names are checked by their folder's modification time.

    Args:
        root: folder of class folders.
        cache_dir: where the index lies instead.
        classes: names of the classes, in label order; default: the folders, sorted.

    Raises:
        ValueError: no such folder, no class folders, class folders without images, or some not in ``classes``.
    """

    def __init__(self, root: str | Path, cache_dir: str | Path | None = None, classes: Sequence[str] | None = None):
        self.root = os.fspath(Path(root).absolute())
        if not os.path.isdir(self.root):
            raise ValueError(f"--data_path: there is no folder {self.root}")
        self._index = open_or_build(
            self.root,
            INDEX_NAME,
            cache_dir,
            build=lambda file: write_index(file, list_tree(self.root)),
            is_current=partial(_is_current, self.root),
        )
        folders = self._index.meta["classes"]
        self.classes: list[str] = list(classes) if classes is not None else folders
        label_of = {name: label for label, name in enumerate(self.classes)}
        unknown = [name for name in folders if name not in label_of]
        if unknown:
            raise ValueError(
                f"{self.root} has {len(unknown)} class folders that the training set lacks: {_first(unknown)}"
            )
        self._labels = np.array([label_of[name] for name in folders], dtype=np.int64)
        self._length = int(self._index.arrays[1][-1])

    def __len__(self) -> int:
        return self._length

    def path(self, i: int) -> str:
        """Full path of image ``i``. Raises IndexError outside 0 ... len - 1."""
        folder = self._index.meta["directories"][self._directory(i)]
        offsets = self._index.arrays[0]
        block = self._index.buffer[offsets[i // BLOCK] : offsets[i // BLOCK + 1]]
        self._index.looked_up()
        return os.path.join(self.root, folder, os.fsdecode(bytes(block).split(b"\0")[i % BLOCK]))

    name = path

    def read(self, i: int) -> bytes:
        """Content of image ``i``. Raises OSError if the file has gone, cannot be read or is none (a FIFO)."""
        with open_file(self.path(i)) as file:
            return file.read()

    def label(self, i: int) -> int:
        """Class number of image ``i``. Raises IndexError outside 0 ... len - 1."""
        return int(self._labels[self._index.arrays[2][self._directory(i)]])

    def labels(self) -> np.ndarray:
        """Class numbers of all images, int32 (len,)."""
        _, starts, class_of_directory = self._index.arrays[:3]
        return np.repeat(self._labels[class_of_directory].astype(np.int32), np.diff(starts))

    def _directory(self, i: int) -> int:
        if not 0 <= i < self._length:
            raise IndexError(f"image {i} of {self._length}")
        return int(np.searchsorted(self._index.arrays[1], i, side="right")) - 1


def list_tree(root: str) -> Iterator[tuple[str, list[Directory]]]:
    """Yields (class name, its folders), classes sorted, reporting progress on standard error.

    Raises:
        ValueError: no class folders, a class without images, or a folder that cannot be read.
    """
    classes = _class_folders(root)
    if not classes:
        raise ValueError(f"--data_path: {root} has no class folders; images belong in {root}/<class>/")
    trusted_before = time.time_ns() - 2_000_000_000
    report = Progress(root, len(classes), "classes")
    empty = []
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(classes, pool.map(lambda name: _list_class(root, name, trusted_before), classes)):
            count = sum(len(directory.names) for directory in found)
            if count == 0:
                empty.append(name)
            report.add(count)
            yield name, found
    report.close()
    if len(empty) == len(classes):
        raise ValueError(f"--data_path: no images in the class folders of {root}; known are {' '.join(IMG_EXTENSIONS)}")
    if empty:
        raise ValueError(f"{root} has {len(empty)} class folders without images: {_first(empty)}; remove or fill them")


def write_index(file: BinaryIO, listing: Iterable[tuple[str, list[Directory]]]) -> None:
    """Writes the index of (class name, folders) pairs, holding one class at a time in memory."""
    writer = IndexWriter(file)
    classes, directories = [], []
    offsets, starts, class_of_directory, mtimes = array("q"), array("q", [0]), array("q"), array("q")
    count = 0
    for label, (name, found) in enumerate(listing):
        classes.append(name)
        for directory in found:
            chunk = bytearray()
            for file_name in directory.names:
                if count % BLOCK == 0:
                    offsets.append(writer.position + len(chunk))
                chunk += os.fsencode(file_name) + b"\0"
                count += 1
            writer.add(chunk)
            directories.append(directory.path)
            starts.append(count)
            class_of_directory.append(label)
            mtimes.append(directory.mtime)
    offsets.append(writer.position)
    writer.finish([offsets, starts, class_of_directory, mtimes], {"classes": classes, "directories": directories})


def _is_current(root: str, index: IndexFile) -> bool:
    """Whether no folder below ``root`` has changed since the index was built."""
    if _class_folders(root) != index.meta["classes"]:
        return False
    expected = list(zip(index.meta["directories"], index.arrays[3].tolist()))
    chunks = [expected[k : k + 512] for k in range(0, len(expected), 512)]
    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(lambda chunk: all(_mtime(root, path) == mtime for path, mtime in chunk), chunks))


def _mtime(root: str, directory: str) -> int:
    try:
        return os.stat(os.path.join(root, directory)).st_mtime_ns
    except OSError:
        return -2


def _class_folders(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise ValueError(f"--data_path: cannot list {root}: {error.strerror}") from error


def _list_class(root: str, name: str, trusted_before: int) -> list[Directory]:
    found, waiting = [], [(name, ())]
    while waiting:
        path, parents = waiting.pop()
        try:
            status = os.stat(os.path.join(root, path))
            identity = (status.st_dev, status.st_ino)
            if identity in parents:
                continue  # a link that leads back up
            images = []
            with os.scandir(os.path.join(root, path)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append((os.path.join(path, entry.name), (*parents, identity)))
                    elif entry.name.lower().endswith(IMG_EXTENSIONS):
                        images.append(entry.name)
        except OSError as error:
            raise ValueError(f"--data_path: cannot list {os.path.join(root, path)}: {error.strerror}") from error
        # A folder changed moments ago may change again within the clock's grain, so its time proves nothing.
        mtime = status.st_mtime_ns if status.st_mtime_ns < trusted_before else -1
        found.append(Directory(path, mtime, sorted(images)))
    return sorted(found)


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
