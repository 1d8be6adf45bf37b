"""Index files: compact, memory-mapped, written once and atomically, shared by all processes that read a data set.

They lie in a folder of the user's own, because whoever can write an index decides which image has which label.
"""

import errno
import hashlib
import io
import json
import mmap
import os
import stat
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils import duration_text

try:
    import fcntl
except ImportError:  # Windows: processes that build at once then each build, and the last one's file stays
    fcntl = None

INDEX_NAME = ".image_index"
MAGIC = b"imgidx02"
FOOT = 20  # bytes at the end: CRC-32 of all before them, the header's length, the magic number
PATIENCE = 600.0  # seconds to wait for another process that builds the same index, before building one too
# Every so many lookups the pages that they touched are unmapped from this process (they stay in the system's cache):
# a random order would otherwise map the whole file into every worker, as `top` counts memory.
RELEASE_EVERY = 32


class IndexFile:
    """The content of an index: ``buffer`` (the whole file), ``arrays`` (int64) and ``meta`` (plain values).

    ``place`` is the file's path, or None for an index that no folder would take. A worker that is started afresh maps
    the file again; only an index without a file travels whole.
    """

    def __init__(self, buffer: mmap.mmap | bytes, place: str | None):
        self.buffer, self.place = buffer, place
        self.meta, self.arrays = _sections(buffer)  # verifies it, at some GB/s: 13 million images take 0.3 s
        self._lookups = 0

    def looked_up(self) -> None:
        """To be called once per lookup: bounds the memory that lookups map into this process."""
        self._lookups += 1
        if self._lookups % RELEASE_EVERY == 0 and self.place and hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self):
        return (_open, (self.place,)) if self.place else (IndexFile, (bytes(self.buffer), None))


class IndexWriter:
    """Writes an index to a binary file: first `add` bytes, then `finish` with arrays and plain values."""

    def __init__(self, file: BinaryIO):
        self.file, self.position, self.sum = file, 0, 0
        self.add(MAGIC)

    def add(self, data: bytes) -> None:
        self.position += self.file.write(data)
        self.sum = zlib.crc32(data, self.sum)

    def finish(self, arrays: Sequence[array], meta: dict) -> None:
        """``arrays`` have type code "q"; ``meta`` must be JSON's."""
        begin = self.position + -self.position % 8
        self.add(b"\0" * (begin - self.position))
        for values in arrays:
            self.add(values.tobytes())
        header = json.dumps({"meta": meta, "begin": begin, "lengths": [len(values) for values in arrays]}).encode()
        self.add(header)
        self.add(self.sum.to_bytes(4, "little") + len(header).to_bytes(8, "little") + MAGIC)


def open_or_build(
    root: str,
    name: str,
    cache_dir: str | Path | None,
    build: Callable[[BinaryIO], None],
    is_current: Callable[[IndexFile], bool],
) -> IndexFile:
    """Opens the index of ``root`` if there is one and it is current, else builds it.

    It lies in ``cache_dir`` if that is given, else in the user's cache folder (``$XDG_CACHE_HOME/efficienttrain``). A
    file that is damaged, a link, or another user's is built anew. One process of a machine builds while others wait; a
    file appears whole or not at all.

    Args:
        root: folder of the data, or URL. name: what tells several indexes of it apart; starts with a dot.
        build: writes the index to the file it is given. is_current: whether an index still describes the data.
    """
    place = root if "://" in root else os.path.realpath(root)
    outside = f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}{name}"
    folder = os.fspath(cache_dir) if cache_dir else _own_folder()
    path = folder and os.path.join(folder, outside)
    found = path and _open_current(path, is_current)
    if found:
        return found
    with _one_builder(path):
        # Another process may have built it while this one waited.
        return (path and _open_current(path, is_current)) or _build(path, build)


def _build(path: str | None, build: Callable[[BinaryIO], None]) -> IndexFile:
    """``path``: where to keep it; None, or where there is no room: it is kept in memory."""
    temporary = None
    try:
        if path:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=INDEX_NAME, delete=False) as file:
                temporary = file.name
                build(file)
            os.replace(temporary, path)
            return _open(path)
    except OSError:
        pass  # read-only or full
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    memory = io.BytesIO()
    build(memory)
    return IndexFile(memory.getvalue(), None)


def _open_current(path: str, is_current: Callable[[IndexFile], bool]) -> IndexFile | None:
    try:
        index = _open(path)
        return index if is_current(index) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return None  # none here, not a whole one, or not one of ours


def _open(path: str) -> IndexFile:
    with open(_own_file(path, os.O_RDONLY), "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    index = IndexFile(buffer, path)
    if hasattr(mmap, "MADV_DONTNEED"):  # what verifying it has mapped
        buffer.madvise(mmap.MADV_DONTNEED)
    return index


def _own_file(path: str, how: int) -> int:
    """Opens a file of this user's own and returns its descriptor; follows no link and waits for nothing.

    Raises:
        OSError: it is a link, no regular file, or another user's.
    """
    safe = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, how | safe, 0o600)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        os.close(descriptor)
        raise OSError(errno.EPERM, "not a regular file of this user's", path)
    return descriptor


def _sections(buffer: mmap.mmap | bytes) -> tuple[dict, list[np.ndarray]]:
    """Meta and arrays. Raises ValueError if the index is not whole and unaltered."""
    if len(buffer) < 8 + FOOT or buffer[:8] != MAGIC or buffer[-8:] != MAGIC:
        raise ValueError("not a whole index")
    end = len(buffer) - FOOT - int.from_bytes(buffer[-16:-8], "little")
    if end < 8 or zlib.crc32(memoryview(buffer)[:-FOOT]) != int.from_bytes(buffer[-FOOT:-16], "little"):
        raise ValueError("not a whole index")
    header = json.loads(bytes(buffer[end:-FOOT]))
    arrays, position = [], header["begin"]
    for length in header["lengths"]:
        if type(length) is not int or not 0 <= length <= len(buffer) // 8 or not 0 <= position <= end:
            raise ValueError("not a whole index")
        arrays.append(np.frombuffer(buffer, dtype=np.int64, count=length, offset=position))
        position += 8 * length
    if position != end:
        raise ValueError("not a whole index")
    return header["meta"], arrays


def _own_folder() -> str | None:
    """The user's cache folder, made if need be, closed to others; None where there is none of the user's own."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "efficienttrain")
    try:
        os.makedirs(base, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
            raise OSError(errno.EPERM, "it is not a folder of this user's own")
        if status.st_mode & 0o077:
            os.chmod(folder, 0o700)
        return folder
    except OSError as error:
        print(f"warning: no index is kept in {folder} ({error.strerror}); set XDG_CACHE_HOME", file=sys.stderr)
        return None


@contextmanager
def _one_builder(path: str | None) -> Iterator[None]:
    """Lets one process of this machine build the index ``path`` at a time, where locks work; waits ten minutes at most.

    Building twice does no harm: the last file stays.
    """
    lock = None
    if fcntl and path:
        with suppress(OSError):  # no folder yet, something that is not ours, or a file system without locks
            os.makedirs(os.path.dirname(path), exist_ok=True)
            lock = _own_file(path + ".lock", os.O_RDWR | os.O_CREAT)
            _wait_for(lock, path)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _wait_for(lock: int, path: str) -> None:
    started = time.monotonic()
    said = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - started
        if waited > PATIENCE:
            print(f"{path}.lock is still held after {waited:.0f} s: building the index here too", file=sys.stderr)
            return None
        if waited > 2 and not said:
            said = True
            print(f"waiting for another process that builds {path} (holds {path}.lock)", file=sys.stderr, flush=True)
        time.sleep(0.05)


class Progress:
    """A line on standard error while indexing (or what ``doing`` says) takes longer than a second or so."""

    def __init__(self, root: str, total: int, unit: str, doing: str = "indexing"):
        self.root, self.total, self.unit, self.doing = root, total, unit, doing
        self.done = self.images = 0
        self.begun = time.monotonic()
        self.next = self.begun + 1
        self.interval, self.end = (0.5, "\r") if sys.stderr.isatty() else (15.0, "\n")
        self.shown = 0  # characters of the last line

    def add(self, images: int) -> None:
        """One more of ``total`` is done, with so many images."""
        self.done += 1
        self.images += images
        if time.monotonic() >= self.next:
            self._show(self.end)
            self.next = time.monotonic() + self.interval

    def close(self) -> None:
        if self.shown:
            self._show("\n")

    def _show(self, end: str) -> None:
        line = f"{self.doing} {self.root}: {self.done} of {self.total} {self.unit}, {self.images} images"
        if 0 < self.done < self.total:
            line += f", {duration_text((time.monotonic() - self.begun) * (self.total / self.done - 1))} left"
        print(line.ljust(self.shown), end=end, file=sys.stderr, flush=True)  # over a longer one
        self.shown = len(line)
