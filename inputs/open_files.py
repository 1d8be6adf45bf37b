"""Files held open for reading, by key: a bounded number of them, for threads and forked workers alike."""

import os
from threading import Lock

LIMIT = 64


class OpenFile:
    """An open file; `os.pread` needs no position, so that forked workers may share it. Closed with its last user."""

    def __init__(self, path: str | os.PathLike):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenFiles:
    """The files used last. One that a thread still reads stays open when others take its place."""

    def __init__(self):
        self._files: dict[str | int, OpenFile] = {}  # in the order of their last use
        self._lock, self._process = Lock(), os.getpid()

    def get(self, key: str | int, path: str | os.PathLike) -> OpenFile:
        """The file ``key``, opened at ``path`` unless it is. Raises OSError."""
        if self._process != os.getpid():  # forked, perhaps while a thread of the parent held the lock
            self._files, self._lock, self._process = dict(self._files), Lock(), os.getpid()
        with self._lock:
            file = self._files.pop(key, None)
            if file is None:
                file = OpenFile(path)
            self._files[key] = file
            if len(self._files) > LIMIT:
                del self._files[next(iter(self._files))]
        return file

    def drop(self, key: str | int) -> None:
        self._files.pop(key, None)

    def __reduce__(self):
        return OpenFiles, ()
