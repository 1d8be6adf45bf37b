"""Index files: compact, memory-mapped, written once and atomically, shared by all processes that read a data set."""

import hashlib
import io
import json
import mmap
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: processes that build at once then each build, and the last one's file stays
    fcntl = None

INDEX_NAME = ".image_index"
MAGIC = b"imgidx01"
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
        self.meta, self.arrays = _sections(buffer)
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
        self.file = file
        self.position = file.write(MAGIC)

    def add(self, data: bytes) -> None:
        self.position += self.file.write(data)

    def finish(self, arrays: Sequence[array], meta: dict) -> None:
        """``arrays`` have type code "q"; ``meta`` must be JSON's."""
        begin = self.position + -self.position % 8
        self.add(b"\0" * (begin - self.position))
        for values in arrays:
            self.add(values.tobytes())
        header = json.dumps({"meta": meta, "begin": begin, "lengths": [len(values) for values in arrays]}).encode()
        self.add(header + len(header).to_bytes(8, "little") + MAGIC)


def open_or_build(
    root: str,
    name: str,
    cache_dir: str | Path | None,
    build: Callable[[BinaryIO], None],
    is_current: Callable[[IndexFile], bool],
) -> IndexFile:
    """Opens the index of ``root`` if there is one and it is current, else builds it.

    It lies in ``cache_dir`` if that is given, else in ``root``, or where that is read-only in the user's cache folder.
    One process of a machine builds while others wait; a file appears whole or not at all.

    Args:
        root: folder of the data, or URL. name: what tells several indexes of it apart; starts with a dot.
        build: writes the index to the file it is given. is_current: whether an index still describes the data.
    """
    remote = "://" in root
    place = root if remote else os.path.realpath(root)
    outside = f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}{name}"
    if cache_dir:
        candidates = [os.path.join(cache_dir, outside)]
    else:
        candidates = ([] if remote else [os.path.join(root, name)]) + [_user_cache(outside)]
    found = _first_current(candidates, is_current)
    if found:
        return found
    with _one_builder(outside):
        # Another process may have built it while this one waited.
        return _first_current(candidates, is_current) or _build(candidates, build)


def _build(candidates: Sequence[str], build: Callable[[BinaryIO], None]) -> IndexFile:
    for path in candidates:
        temporary = None
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=INDEX_NAME, delete=False) as file:
                temporary = file.name
                build(file)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            return _open(path)
        except OSError:
            continue  # read-only or full: try the next place
        finally:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)
    memory = io.BytesIO()
    build(memory)
    return IndexFile(memory.getvalue(), None)


def _first_current(candidates: Sequence[str], is_current: Callable[[IndexFile], bool]) -> IndexFile | None:
    for path in candidates:
        try:
            index = _open(path)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none here, or not a whole one
        if is_current(index):
            return index
    return None


def _open(path: str) -> IndexFile:
    with open(path, "rb") as file:
        return IndexFile(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)


def _sections(buffer: mmap.mmap | bytes) -> tuple[dict, list[np.ndarray]]:
    """Meta and arrays. Raises ValueError if the index is not whole."""
    if len(buffer) < 24 or buffer[:8] != MAGIC or buffer[-8:] != MAGIC:
        raise ValueError("not a whole index")
    end = len(buffer) - 16 - int.from_bytes(buffer[-16:-8], "little")
    if end < 8:
        raise ValueError("not a whole index")
    header = json.loads(bytes(buffer[end:-16]))
    arrays, position = [], header["begin"]
    for length in header["lengths"]:
        arrays.append(np.frombuffer(buffer, dtype=np.int64, count=length, offset=position))
        position += 8 * length
    if position != end:
        raise ValueError("not a whole index")
    return header["meta"], arrays


def _user_cache(name: str) -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "efficienttrain", name)


@contextmanager
def _one_builder(key: str) -> Iterator[None]:
    """Lets one process of this machine build the index ``key`` at a time, where locks work."""
    lock = None
    if fcntl:
        try:
            lock = open(os.path.join(tempfile.gettempdir(), key + ".lock"), "w")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # another user's lock file, or a file system without locks: building twice does no harm
    try:
        yield
    finally:
        if lock:
            lock.close()


class Progress:
    """A line on standard error while indexing (or what ``doing`` says) takes longer than a second or so."""

    def __init__(self, root: str, total: int, unit: str, doing: str = "indexing"):
        self.root, self.total, self.unit, self.doing = root, total, unit, doing
        self.done = self.images = 0
        self.next = time.monotonic() + 1
        self.interval, self.end = (0.5, "\r") if sys.stderr.isatty() else (15.0, "\n")
        self.shown = False

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
        self.shown = True
        line = f"{self.doing} {self.root}: {self.done} of {self.total} {self.unit}, {self.images} images"
        print(line, end=end, file=sys.stderr, flush=True)
