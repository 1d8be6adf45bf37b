"""An image folder as a compact memory-mapped index: built once, opened in moments, shared by all processes."""

import hashlib
import io
import json
import mmap
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

try:
    import fcntl
except ImportError:  # Windows: processes that build at once then each build, and the last one's file stays
    fcntl = None

INDEX_NAME = ".image_index"
MAGIC = b"imgidx01"
# File names per entry of the offset table: one lookup splits half a KB, and 13 million images need 3 MB of table.
BLOCK = 32
# Every so many lookups the pages that they touched are unmapped from this process (they stay in the system's cache):
# a random order would otherwise map the whole file into every worker, as `top` counts memory.
RELEASE_EVERY = 256
THREADS = 16  # for listing and checking folders: what a network file system needs to hide its latency


class Directory(NamedTuple):
    """One listed folder: path below the root, modification time (ns; -1: too young to trust), sorted image names."""

    path: str
    mtime: int
    names: list[str]


class FolderIndex:
    """Images under ``root``, one folder per class, in the order of torchvision's ImageFolder.

    Folders and files whose names start with a dot are left out. The first time, the tree is listed (with a progress
    line on standard error) and the index written to ``root``, or where that is read-only to the user's cache folder.
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
        places = [Path(cache_dir)] if cache_dir else [Path(self.root), _user_cache()]
        self._buffer, self._place = _open_or_build(self.root, places)
        self._attach()
        self.folders: list[str] = self._meta["classes"]
        self.classes = list(classes) if classes is not None else self.folders
        label_of = {name: label for label, name in enumerate(self.classes)}
        unknown = [name for name in self.folders if name not in label_of]
        if unknown:
            raise ValueError(
                f"{self.root} has {len(unknown)} class folders that the training set lacks: {_first(unknown)}"
            )
        self._labels = np.array([label_of[name] for name in self.folders], dtype=np.int64)

    def __len__(self) -> int:
        return self._length

    def path(self, i: int) -> str:
        """Full path of image ``i``. Raises IndexError outside 0 ... len - 1."""
        place = self._directory(i)
        start, stop = self._offsets[i // BLOCK], self._offsets[i // BLOCK + 1]
        name = bytes(self._buffer[start:stop]).split(b"\0")[i % BLOCK]
        self._lookups += 1
        if self._lookups % RELEASE_EVERY == 0 and isinstance(self._buffer, mmap.mmap):
            _release(self._buffer)
        return os.path.join(self.root, self._meta["directories"][place], os.fsdecode(name))

    name = path

    def read(self, i: int) -> bytes:
        """Content of image ``i``. Raises OSError if the file has gone or cannot be read."""
        with open(self.path(i), "rb", buffering=0) as file:
            return file.read()

    def label(self, i: int) -> int:
        """Class number of image ``i``. Raises IndexError outside 0 ... len - 1."""
        return int(self._labels[self._class_of_directory[self._directory(i)]])

    def counts(self) -> np.ndarray:
        """Images per class, int64 (number of classes,)."""
        sizes = np.diff(self._starts)
        return np.bincount(self._labels[self._class_of_directory], weights=sizes, minlength=len(self.classes)).astype(
            np.int64
        )

    def _directory(self, i: int) -> int:
        if not 0 <= i < self._length:
            raise IndexError(f"image {i} of {self._length}")
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _attach(self) -> None:
        self._meta, arrays = _sections(self._buffer)
        self._offsets, self._starts, self._class_of_directory = arrays[:3]
        self._length = int(self._starts[-1])
        self._lookups = 0

    def __getstate__(self):
        # A worker that is started afresh maps the file again; only an index that could not be written travels whole.
        state = {key: self.__dict__[key] for key in ("root", "folders", "classes", "_labels", "_place")}
        return state | {"_buffer": None if self._place else bytes(self._buffer)}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._place:
            self._buffer = _map(self._place)
        self._attach()


def list_tree(root: str) -> Iterator[tuple[str, list[Directory]]]:
    """Yields (class name, its folders), classes sorted, reporting progress on standard error.

    Raises:
        ValueError: no class folders, a class without images, or a folder that cannot be read.
    """
    classes = _class_folders(root)
    if not classes:
        raise ValueError(f"--data_path: {root} has no class folders; images belong in {root}/<class>/")
    trusted_before = time.time_ns() - 2_000_000_000
    report = _Progress(root, len(classes))
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
    """Writes the index of (class name, folders) pairs to a binary file, holding one class at a time in memory."""
    classes, directories = [], []
    offsets, starts, class_of_directory, mtimes = array("q"), array("q", [0]), array("q"), array("q")
    count, position = 0, len(MAGIC)
    file.write(MAGIC)
    for label, (name, found) in enumerate(listing):
        classes.append(name)
        for directory in found:
            chunk = bytearray()
            for file_name in directory.names:
                if count % BLOCK == 0:
                    offsets.append(position + len(chunk))
                chunk += os.fsencode(file_name) + b"\0"
                count += 1
            file.write(chunk)
            position += len(chunk)
            directories.append(directory.path)
            starts.append(count)
            class_of_directory.append(label)
            mtimes.append(directory.mtime)
    offsets.append(position)
    file.write(b"\0" * (-position % 8))
    for values in (offsets, starts, class_of_directory, mtimes):
        file.write(values.tobytes())
    meta = json.dumps(
        {
            "classes": classes,
            "directories": directories,
            "arrays": [len(offsets), len(starts), len(class_of_directory), len(mtimes)],
            "begin": position + -position % 8,
        }
    ).encode()
    file.write(meta + len(meta).to_bytes(8, "little") + MAGIC)


def _open_or_build(root: str, places: Sequence[Path]) -> tuple[mmap.mmap | bytes, str | None]:
    """The index's bytes and where they lie; None if no folder of ``places`` could be written."""
    names = [
        os.fspath(place / (INDEX_NAME if os.fspath(place) == root else _key(root) + INDEX_NAME)) for place in places
    ]
    existing = _newest_valid(root, names)
    if existing:
        return _map(existing), existing
    with _one_builder(root):
        existing = _newest_valid(root, names)  # another process may have built it while this one waited
        if existing:
            return _map(existing), existing
        for name in names:
            temporary = None
            try:
                os.makedirs(os.path.dirname(name), exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=os.path.dirname(name), prefix=INDEX_NAME, delete=False) as file:
                    temporary = file.name
                    write_index(file, list_tree(root))
                os.chmod(temporary, 0o644)
                os.replace(temporary, name)
                return _map(name), name
            except OSError:
                continue  # read-only or full: try the next place
            finally:
                if temporary and os.path.exists(temporary):
                    os.unlink(temporary)
        memory = io.BytesIO()
        write_index(memory, list_tree(root))
        return memory.getvalue(), None


def _newest_valid(root: str, names: Sequence[str]) -> str | None:
    return next((name for name in names if os.path.isfile(name) and _is_current(root, name)), None)


def _is_current(root: str, name: str) -> bool:
    """Whether the index is whole and no folder below ``root`` has changed since it was built."""
    try:
        meta, arrays = _sections(_map(name))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if _class_folders(root) != meta["classes"]:
        return False
    expected = list(zip(meta["directories"], arrays[3].tolist()))
    chunks = [expected[k : k + 512] for k in range(0, len(expected), 512)]
    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(lambda chunk: all(_mtime(root, path) == mtime for path, mtime in chunk), chunks))


def _mtime(root: str, directory: str) -> int:
    try:
        return os.stat(os.path.join(root, directory)).st_mtime_ns
    except OSError:
        return -2


def _map(name: str) -> mmap.mmap:
    with open(name, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _release(buffer: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        buffer.madvise(mmap.MADV_DONTNEED)


def _sections(buffer: mmap.mmap | bytes) -> tuple[dict, list[np.ndarray]]:
    """Header and arrays (offsets, starts, class of each folder, times). Raises ValueError if the file is not whole."""
    if len(buffer) < 24 or buffer[:8] != MAGIC or buffer[-8:] != MAGIC:
        raise ValueError("not a whole index")
    length = int.from_bytes(buffer[-16:-8], "little")
    begin_of_meta = len(buffer) - 16 - length
    if begin_of_meta < 8:
        raise ValueError("not a whole index")
    meta = json.loads(bytes(buffer[begin_of_meta : begin_of_meta + length]))
    arrays, position = [], meta["begin"]
    for count in meta["arrays"]:
        arrays.append(np.frombuffer(buffer, dtype=np.int64, count=count, offset=position))
        position += 8 * count
    if position != begin_of_meta:
        raise ValueError("not a whole index")
    return meta, arrays


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


@contextmanager
def _one_builder(root: str) -> Iterator[None]:
    """Lets one process of this machine build the index of ``root`` at a time, where locks work."""
    lock = None
    if fcntl:
        try:
            lock = open(os.path.join(tempfile.gettempdir(), _key(root) + INDEX_NAME + ".lock"), "w")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # another user's lock file, or a file system without locks: building twice does no harm
    try:
        yield
    finally:
        if lock:
            lock.close()


class _Progress:
    """A line on standard error while listing takes longer than a second or so."""

    def __init__(self, root: str, total: int):
        self.root, self.total, self.done, self.images = root, total, 0, 0
        self.next = time.monotonic() + 1
        self.interval, self.end = (0.5, "\r") if sys.stderr.isatty() else (15.0, "\n")
        self.shown = False

    def add(self, images: int) -> None:
        self.done += 1
        self.images += images
        if time.monotonic() >= self.next:
            self._show(self.end)
            self.next = time.monotonic() + self.interval

    def close(self) -> None:
        if self.shown:
            self._show("\n")

    def _show(self, end: str) -> None:
        self.shown = True
        line = f"indexing {self.root}: {self.done} of {self.total} classes, {self.images} images"
        print(line, end=end, file=sys.stderr, flush=True)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efficienttrain"


def _key(root: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
