"""Reading files that may come from anyone: nothing is waited for, and nothing without an end is read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

TEXT_LIMIT = 1 << 28  # bytes of a text file that are read: log.txt of the longest run has a hundredth


def open_file(path: str | Path) -> BinaryIO:
    """Opens a file for reading, unbuffered; never waits, as a FIFO or a terminal would make it, and reads no device.

    Raises:
        OSError: it is not there, must not be read, or is no regular file (links to one are).
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, "a directory, not a file" if code == errno.EISDIR else "not a regular file", str(path))
        return open(handle, "rb", buffering=0)
    except OSError:
        os.close(handle)
        raise


def read_bytes(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """A regular file's content.

    Raises:
        OSError: as :func:`open_file`, or it is larger than ``limit`` bytes.
    """
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than the {limit:,} that are read", os.fspath(path))
        return file.read()


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """A regular UTF-8 file's content. Raises OSError as :func:`read_bytes`, and for bytes that are not UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "not a text file (UTF-8)", os.fspath(path)) from None
