"""An image folder by index: listed once, opened in moments, small in every process whatever its size."""

import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from config.files import open_file
from inputs.formats import ENDINGS, ending, hidden, listed, readable, sniff, why_left_out
from inputs.index_file import INDEX_NAME, IndexFile, IndexWriter, Progress, open_or_build
from inputs.names import NameWriter, hash_of, natural, packed_name, packed_names
from inputs.splits import choose

THREADS = 16  # for listing and checking folders: what a network file system needs to hide its latency
FORMAT = 2  # of what the index holds; others are built again


class Directory(NamedTuple):
    """One listed folder: path below the root, modification time (ns; -1: too young to trust), sorted image names."""

    path: str
    mtime: int
    names: list[str]
    endings: dict[str, int] = {}  # noqa: RUF012 - of the images: number by ending
    left_out: dict[str, int] = {}  # noqa: RUF012 - files that are not read: number by kind


class FolderIndex:
    """Images under ``root``, one folder per class, in the order of torchvision's ImageFolder.

    A class has all images below its folder. Files are images by their ending or else by their content; those that are
    not are counted by ending. Names that start with a dot are hidden. The first time, the tree is listed (with a
    progress line on standard error) and the index written to the user's cache folder. Later it is opened if no folder
    has changed since: file names are checked by their folder's modification time.

    Args:
        root: folder of class folders.
        cache_dir: where the index lies instead.
        classes: names of the classes, in label order; default: the folders, numbers sorted as numbers.
        flat: all images below ``root`` are of one class, "": for labels that are written elsewhere.

    Raises:
        ValueError: no such folder, no class folders, class folders without images or with nothing but folders, or
            classes that are not in ``classes``.
    """

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        classes: Sequence[str] | None = None,
        flat: bool = False,
    ):
        self.root = os.fspath(Path(root).absolute())
        if not os.path.isdir(self.root):
            raise ValueError(f"--data_path: there is no folder {self.root}")
        self._flat = flat
        self._index = open_or_build(
            self.root,
            INDEX_NAME + "_flat" * flat,
            cache_dir,
            build=lambda file: write_index(file, list_flat(self.root) if flat else list_tree(self.root)),
            is_current=partial(_is_current, self.root, flat),
        )
        folders = self._index.meta["classes"]
        self.classes: list[str] = list(classes) if classes is not None else natural(folders)
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
        return os.path.join(self.root, self.relative(i))

    name = path

    def relative(self, i: int) -> str:
        """Path of image ``i`` below the root."""
        folder = self._index.meta["directories"][self._directory(i)]
        return os.path.join(folder, packed_name(self._index, self._index.arrays[0], i))

    def relatives(self) -> Iterator[bytes]:
        """All of these paths, in order."""
        names = packed_names(self._index, self._index.arrays[0])
        for folder, count in zip(self._index.meta["directories"], np.diff(self._index.arrays[1]).tolist()):
            begin = os.fsencode(os.path.join(folder, ""))
            yield from (begin + next(names) for _ in range(count))

    def hashes(self) -> np.ndarray:
        """CRC-32 of these paths, uint32 (len,)."""
        result, names = np.empty(len(self), dtype=np.uint32), packed_names(self._index, self._index.arrays[0])
        starts = self._index.arrays[1].tolist()
        for folder, first, last in zip(self._index.meta["directories"], starts, starts[1:]):
            begin = hash_of(os.fsencode(os.path.join(folder, "")))
            result[first:last] = [hash_of(next(names), begin) for _ in range(last - first)]
        return result

    def contents(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number of images by ending, and of files that are not read by kind."""
        left_out = Counter(self._index.meta["left_out"])
        if not self._flat:
            left_out.update(_beside(self.root))
        return self._index.meta["endings"], left_out

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
        ValueError: no class folders, a class without images or with nothing but folders, or a folder that cannot be
            read.
    """
    classes = _class_folders(root)
    if not classes:
        raise ValueError(
            f"--data_path: {root} has no class folders; images belong in {root}/<class>/, or --labels names the table "
            "of their labels"
        )
    trusted_before = time.time_ns() - 2_000_000_000
    report = Progress(root, len(classes), "classes")
    empty, nested, left_out = [], [], Counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(classes, pool.map(lambda name: _list_folder(root, name, trusted_before), classes)):
            count = sum(len(directory.names) for directory in found)
            if count == 0:
                empty.append(name)
            elif not found[0].names:
                nested.append((name, found))
            for directory in found:
                left_out.update(directory.left_out)
            report.add(count)
            yield name, found
    report.close()
    if len(empty) == len(classes):
        raise ValueError(f"--data_path: no images in the class folders of {root}{_instead(left_out)}")
    if empty:
        raise ValueError(f"{root} has {len(empty)} class folders without images: {_first(empty)}; remove or fill them")
    if nested:
        name, found = nested[0]
        split = choose([name for name, _ in nested], "train", "train")
        inner = sorted({os.path.relpath(d.path, name).split(os.sep)[0] for d in found if d.names})
        raise ValueError(
            f"--data_path: {len(nested)} class folders of {root} hold no images, only folders: "
            f"{_first([name for name, _ in nested])} ({name} holds {_first(inner)}). If those are the classes, name "
            f"the folder they lie in (--train_split {split or name}); else move the images up into the class folders, "
            "or write their labels in a table (--labels FILE.csv)"
        )


def list_flat(root: str) -> Iterator[tuple[str, list[Directory]]]:
    """As `list_tree`, of one class without a name: all images below ``root``."""
    report = Progress(root, 1, "folders")
    found = _list_folder(root, "", time.time_ns() - 2_000_000_000)
    count = sum(len(directory.names) for directory in found)
    report.add(count)
    report.close()
    if not count:
        raise ValueError(
            f"--data_path: no images below {root}{_instead(sum((Counter(d.left_out) for d in found), Counter()))}"
        )
    yield "", found


def write_index(file: BinaryIO, listing: Iterable[tuple[str, list[Directory]]]) -> None:
    """Writes the index of (class name, folders) pairs, holding one class at a time in memory."""
    writer = IndexWriter(file)
    names = NameWriter(writer)
    classes, directories, endings, left_out = [], [], Counter(), Counter()
    starts, class_of_directory, mtimes = array("q", [0]), array("q"), array("q")
    for label, (name, found) in enumerate(listing):
        classes.append(name)
        for directory in found:
            names.add(directory.names)
            endings.update(directory.endings)
            left_out.update(directory.left_out)
            directories.append(directory.path)
            starts.append(names.count)
            class_of_directory.append(label)
            mtimes.append(directory.mtime)
    names.close()
    meta = {"format": FORMAT, "classes": classes, "directories": directories}
    meta |= {"endings": endings, "left_out": left_out, "readable": sorted(readable())}
    writer.finish([names.offsets, starts, class_of_directory, mtimes], meta)


def _is_current(root: str, flat: bool, index: IndexFile) -> bool:
    """Whether no folder below ``root`` has changed since the index was built, nor what can be read."""
    if index.meta.get("format") != FORMAT or index.meta["readable"] != sorted(readable()):
        return False
    if not flat and _class_folders(root) != index.meta["classes"]:
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
            return sorted(entry.name for entry in entries if not hidden(entry.name) and entry.is_dir())
    except OSError as error:
        raise ValueError(f"--data_path: cannot list {root}: {error.strerror}") from error


def _beside(root: str) -> Counter:
    """Files beside the class folders, by kind."""
    with os.scandir(root) as entries:
        files = [entry for entry in entries if not hidden(entry.name) and not entry.is_dir()]
    return Counter(f"{ending(entry.name)} beside the class folders" for entry in files)


def _list_folder(root: str, name: str, trusted_before: int) -> list[Directory]:
    """The folder ``root/name`` and all below it, sorted by path."""
    found, waiting = [], [(name, ())]
    while waiting:
        path, parents = waiting.pop()
        try:
            status = os.stat(os.path.join(root, path))
            identity = (status.st_dev, status.st_ino)
            if identity in parents:
                continue  # a link that leads back up
            images, endings, left_out = [], Counter(), Counter()
            with os.scandir(os.path.join(root, path)) as entries:
                for entry in entries:
                    name = entry.name
                    kind = name[name.rfind(".") :].lower()
                    if kind in ENDINGS and name[0] != "." and entry.is_file():  # nearly all: nothing more is asked
                        images.append(name)
                        endings[kind] += 1
                    elif hidden(name):
                        continue
                    elif entry.is_dir():
                        waiting.append((os.path.join(path, name), (*parents, identity)))
                    elif (reason := _why_not(entry)) is None:
                        images.append(name)
                        endings[ending(name)] += 1
                    else:
                        left_out[reason] += 1
        except OSError as error:
            raise ValueError(f"--data_path: cannot list {os.path.join(root, path)}: {error.strerror}") from error
        # A folder changed moments ago may change again within the clock's grain, so its time proves nothing.
        mtime = status.st_mtime_ns if status.st_mtime_ns < trusted_before else -1
        images.sort()
        found.append(Directory(path, mtime, images, endings, left_out))
    return sorted(found, key=lambda directory: directory.path)


def _why_not(entry: os.DirEntry) -> str | None:
    """None for an image, else what the summary calls it."""
    if not entry.is_file():
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "special file"
    format = sniff(entry.path)
    return None if format in readable() else why_left_out(ending(entry.name), format)


def _instead(left_out: Counter) -> str:
    return "; what lies there: " + listed(left_out) if left_out else ", which are empty"


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
