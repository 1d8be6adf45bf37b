"""Reading the headers of a tar archive that may come from anyone, with bounded work and memory."""

from __future__ import annotations

import tarfile
from typing import BinaryIO

LIMIT = 1 << 20  # bytes of a header's extension (a long name, pax records) or of a side file


class Archive(tarfile.TarFile):
    """An uncompressed archive; what breaks the rules of the format is a `tarfile.HeaderError`."""

    def next(self) -> tarfile.TarInfo | None:
        before, first = self.offset, self.firstmember  # which was read when the archive was opened
        try:
            member = super().next()
        except (RecursionError, OverflowError, ValueError, KeyError) as error:  # chains of extensions, odd numbers
            raise tarfile.HeaderError(f"a damaged header at byte {before}: {type(error).__name__}") from None
        if member not in (None, first) and (member.size < 0 or self.offset <= before):
            raise tarfile.HeaderError(f"the member at byte {before} has the size {member.size}")
        return member


def open_archive(file: BinaryIO) -> Archive:
    """The archive in an open file. Raises tarfile.TarError if it is none."""
    try:
        return Archive(fileobj=_Bounded(file), mode="r")
    except (RecursionError, OverflowError, ValueError, KeyError) as error:
        raise tarfile.ReadError(f"a damaged header: {type(error).__name__}") from None


class _Bounded:
    """A file of which nobody reads more than LIMIT bytes at once: headers say how much is to be read for them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.name, self.mode = getattr(file, "name", ""), "rb"

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LIMIT:
            raise tarfile.HeaderError(f"a header asks for {size} bytes")
        return self._file.read(size)
