"""A bounded folder of whole shards, shared by all processes of a machine, for data that lie at a URL.

A file appears in it whole or not at all, is downloaded by one process at a time, and the least recently used one makes
room for another. One that is in use stays: a training pass asks for images in random order, so that every shard is
wanted all the time, and a cache that is too small would otherwise download a shard per image. What finds no room is
read from the URL by ranges.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from inputs.open_files import OpenFiles

WHOLE, PART, LOCK = ".shard", ".part", "cache.lock"
CHUNK = 8 << 20  # bytes that one request downloads
BUSY = 300.0  # seconds since its last use for which a shard is in use: some process may be in a pass over it
TOUCH = 30.0  # seconds after which a process says again that it uses a shard
FULL = 60.0  # seconds before a process asks again for room that there was none of


class ShardCache:
    """Whole shards under keys.

    Args:
        folder: local; made if it is not there. limit: bytes that its files may take.

    Raises:
        ValueError: the folder cannot be written or has no file locks.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder).absolute(), int(limit)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as error:
            raise ValueError(
                f"--cache_dir {folder} cannot be used: {error.strerror or error}; name a folder on a local disk"
            ) from None
        self._reset()

    def _reset(self) -> None:
        self._files = OpenFiles()
        self._touched: dict[str, float] = {}
        self._full_until = 0.0
        self._thread: threading.Thread | None = None

    def read(self, key: str, offset: int, size: int) -> bytes | None:
        """``size`` bytes of a shard; None if it is not here (any more)."""
        try:
            file = self._files.get(key, self._whole(key))
        except OSError:
            return None
        data = os.pread(file.descriptor, size, offset)
        if len(data) < size:  # evicted, by whichever process
            self._files.drop(key)
            return None
        now = time.monotonic()
        if now - self._touched.get(key, -TOUCH) >= TOUCH:
            self._touched[key] = now
            with suppress(OSError):
                os.utime(self._whole(key))
        return data

    def want(self, key: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        """Starts to download a shard in the background, unless this process is at another one or there is no room.

        Args:
            size: of the whole shard. fetch: (first byte, byte after the last) -> those bytes, from where it lies.
        """
        if time.monotonic() >= self._full_until and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self.fill, args=(key, size, fetch), daemon=True)
            self._thread.start()

    def fill(self, key: str, size: int, fetch: Callable[[int, int], bytes]) -> bool:
        """Downloads a shard, now; whether it is here then. A failure is left to whoever reads the shard by ranges."""
        part = self._part(key)
        descriptor = None
        try:
            descriptor = self._admit(key, size)
            if descriptor is None:
                return self._whole(key).exists()
            for start in range(0, size, CHUNK):
                os.pwrite(descriptor, fetch(start, min(start + CHUNK, size)), start)
            os.fsync(descriptor)  # before the rename: a machine that stops must not leave a file of zeros
            with self._alone():
                os.rename(part, self._whole(key))
            return True
        except Exception:  # of the disk (full), or of whichever file system it comes from
            self._full_until = time.monotonic() + FULL
            if descriptor is not None:
                with self._alone():
                    part.unlink(missing_ok=True)
            return False
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def wait(self) -> None:
        """Until this process's download, if there is one, has ended."""
        if self._thread is not None:
            self._thread.join()

    def held(self, keys: list[str]) -> list[bool]:
        """Which of these shards are here."""
        present = set(os.listdir(self.folder))
        return [key + WHOLE in present for key in keys]

    def _whole(self, key: str) -> Path:
        return self.folder / (key + WHOLE)

    def _part(self, key: str) -> Path:
        return self.folder / (key + PART)

    def _admit(self, key: str, size: int) -> int | None:
        """Makes and reserves room: a locked file of the shard's size; None if it is here, on its way or too much."""
        with self._alone():
            if self._whole(key).exists():
                return None
            used, idle = 0, []
            for entry in os.scandir(self.folder):
                path, status = Path(entry.path), entry.stat()
                if path.suffix == PART:
                    if _left_behind(path):
                        path.unlink()
                        continue
                    if path == self._part(key):
                        return None
                elif path.suffix == WHOLE:
                    if time.time() - status.st_mtime >= BUSY:
                        idle.append((status.st_mtime, path, status.st_size))
                else:
                    continue
                used += status.st_size
            if used - sum(bytes_ for _, _, bytes_ in idle) + size > self.limit:
                self._full_until = time.monotonic() + FULL
                return None
            for _, path, bytes_ in sorted(idle):
                if used + size <= self.limit:
                    break
                os.truncate(path, 0)  # frees the space though a process may have it open, and tells that process
                path.unlink()
                used -= bytes_
            descriptor = os.open(self._part(key), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, size)  # so that it counts
            return descriptor

    @contextmanager
    def _alone(self):
        """One process at a time looks at the folder to change it."""
        with open(self.folder / LOCK, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing does not do it if the process has forked meanwhile

    def __getstate__(self):
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()


def _left_behind(part: Path) -> bool:
    """Whether the process that downloaded to this file has died: its lock went with it."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
