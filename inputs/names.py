"""Names of many images: their order, their packed form in an index, and a hash that belongs to each name alone."""

import os
import re
from array import array
from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np

from inputs.index_file import IndexFile, IndexWriter

# Names per entry of the offset table: one lookup splits half a KB, and 13 million images need 3 MB of table.
BLOCK = 32
_DIGITS = re.compile(r"([0-9]+)")


def natural(names: Iterable[str]) -> list[str]:
    """Names sorted with the numbers in them as numbers: 2 before 10, class_2 before class_10, 00 ... 11 as 0 ... 11.

    So a copy of a data set whose class numbers are padded with zeros has the classes of one whose are not.
    """
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> tuple:
    parts = _DIGITS.split(name)
    # Every second part is a number; by its length and then its digits it compares as one, however long it is.
    numbers = [part.lstrip("0") for part in parts[1::2]]
    key: list = [(part,) for part in parts]
    key[1::2] = [(len(number), number) for number in numbers]
    return key, name


def order_of(classes: Sequence[str]) -> str:
    """What a message calls the order of these class names."""
    by_number, by_letter = (list(classes) == order for order in (natural(classes), sorted(classes)))
    if by_number:
        return "alphabetical order" if by_letter else "the order of the numbers in their names"
    return "alphabetical order, 10 before 2" if by_letter else "the order of the checkpoint, --class_map or data set"


class NameWriter:
    """Packs names into an index that is being written, some at a time; ``offsets`` then is the table to keep."""

    def __init__(self, writer: IndexWriter):
        self._writer = writer
        self.offsets = array("q")
        self.count = 0

    def add(self, names: Sequence[str]) -> None:
        chunk = bytearray()
        first = 0
        while first < len(names):
            if self.count % BLOCK == 0:
                self.offsets.append(self._writer.position + len(chunk))
            block = names[first : first + BLOCK - self.count % BLOCK]
            chunk += os.fsencode("\0".join(block)) + b"\0"
            first += len(block)
            self.count += len(block)
        self._writer.add(chunk)

    def close(self) -> None:
        self.offsets.append(self._writer.position)


def packed_name(index: IndexFile, offsets: np.ndarray, i: int) -> str:
    """Name ``i`` of those that a NameWriter packed."""
    block = index.buffer[offsets[i // BLOCK] : offsets[i // BLOCK + 1]]
    index.looked_up()
    return os.fsdecode(bytes(block).split(b"\0")[i % BLOCK])


def packed_names(index: IndexFile, offsets: np.ndarray) -> Iterable[bytes]:
    """All of them in order, as bytes; a few thousand blocks at a time are in memory."""
    for first in range(0, len(offsets) - 1, 4096):
        last = min(first + 4096, len(offsets) - 1)
        yield from bytes(index.buffer[offsets[first] : offsets[last]]).split(b"\0")[:-1]


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads uint64 values evenly over their range, one to one (splitmix64's finalizer)."""
    values = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def hash_of(path: bytes, start: int = 0) -> int:
    """CRC-32 of a relative path; ``start``: that of its beginning. `mix` makes an even distribution of it."""
    return crc32(path, start)


def name_hashes(names: Iterable[str]) -> np.ndarray:
    """`hash_of` of each name, uint32 (len,)."""
    return np.fromiter((crc32(os.fsencode(name)) for name in names), dtype=np.uint32)
