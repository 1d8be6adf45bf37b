"""Images in tar archives, by number: archives of class folders, one archive per class, or WebDataset's shards.

timm's reader of tar files keeps a Python object per image in every process, and its WebDataset reader can only run
through a shard from its beginning; the curriculum's sampler asks for images by number, so shards are indexed here.
"""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from inputs.formats import ending, listed, readable
from inputs.index_file import IndexWriter, Progress, open_or_build
from inputs.members import LABEL_SIDES, Member, Scan, scan
from inputs.names import NameWriter, hash_of, natural, packed_name, packed_names
from inputs.shards import Shards, in_threads, index_name, open_shards

FORMAT = 2  # of what the index holds; others are built again


class TarIndex:
    """Images in the archives ``root/*.tar`` (or in the one archive ``root``), in the order of the archives' names.

    An image's class is what its side files state (``<key>.cls``, ``.txt``, or ``.json`` under ``label_key``:
    WebDataset's and img2dataset's shards), else the folder it lies in inside the archive, else the archive's name.
    Classes are sorted, numbers as numbers. Nothing is guessed: side files that state no label are refused.

    Args:
        root: a folder, one archive, or a URL as `RemoteShards` reads it.
        cache_dir, classes, flat: as `FolderIndex` has them. pattern: of the archives' names.
        label_key: of the label in .json side files.
        cache_size: bytes of archives at a URL that ``cache_dir`` may hold; None: none are kept.
        several: images may have several labels (lists in .json files); `label` then gives a tuple.

    Raises:
        ValueError: no archive, something that is not an archive, no images, images without or with several labels, or
            a class that is not in ``classes``.
        Unreachable: a URL that does not answer.
    """

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        classes: Sequence[str] | None = None,
        pattern: str = "*.tar",
        label_key: str = "label",
        flat: bool = False,
        several: bool = False,
        cache_size: int | None = None,
    ):
        self.shards = open_shards(root, pattern, cache_dir, cache_size)
        self.root, self.cache_dir = self.shards.root, cache_dir
        expected = {"format": FORMAT, "shards": self.shards.names, "stamps": self.shards.stamps}
        expected |= {"readable": sorted(readable()), "label_key": None if flat else label_key}
        self._index = open_or_build(
            self.root,
            index_name(self.shards) + "_flat" * flat,
            cache_dir,
            build=lambda file: _write_index(file, self.shards, expected),
            is_current=lambda index: {key: index.meta.get(key) for key in expected} == expected,
        )
        names = self._index.meta["classes"]
        self.classes: list[str] = list(classes) if classes is not None else names
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise ValueError(f"{root} has {len(unknown)} classes that the training set lacks: {', '.join(unknown[:3])}")
        number = {name: label for label, name in enumerate(self.classes)}
        self._labels = np.array([number[name] for name in names])
        self.several = several
        if self._index.meta["several"] and not several:
            raise ValueError(
                f"--data_path: images of {root} have several labels each: learn them with --task multilabel"
            )

    def __len__(self) -> int:
        return len(self._index.arrays[0])

    def _entry(self, i: int) -> list[int]:
        """Shard, offset and size of image ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        self._index.looked_up()
        return [int(values[i]) for values in self._index.arrays[:3]]

    def relative(self, i: int) -> str:
        """Archive and member of image ``i``."""
        return f"{self.shards.names[self._entry(i)[0]]}/{packed_name(self._index, self._index.arrays[5], i)}"

    def relatives(self) -> Iterator[bytes]:
        """All of these, in order."""
        begins = [os.fsencode(shard) + b"/" for shard in self.shards.names]
        names = packed_names(self._index, self._index.arrays[5])
        return (begins[shard] + name for shard, name in zip(self._index.arrays[0], names))

    def hashes(self) -> np.ndarray:
        """CRC-32 of these, uint32 (len,)."""
        return np.fromiter(map(hash_of, self.relatives()), dtype=np.uint32, count=len(self))

    def contents(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number of images by ending, and of members and files that are not read by kind."""
        return self._index.meta["endings"], {**self._index.meta["left_out"], **self.shards.beside}

    def read(self, i: int) -> bytes:
        """Content of image ``i``. Raises as `Shards.read`."""
        return self.shards.read(*self._entry(i))

    def name(self, i: int) -> str:
        shard, offset, _ = self._entry(i)
        return f"{self.shards.name(shard)} at byte {offset}"

    def label(self, i: int) -> int | tuple[int, ...]:
        self._entry(i)
        labels, starts = self._index.arrays[3:5]
        own = self._labels[labels[starts[i] : starts[i + 1]]].tolist()
        return tuple(sorted(own)) if self.several else own[0]

    def labels(self) -> np.ndarray:
        """int32 (len,); of images with several labels bool (len, classes)."""
        labels, starts = self._index.arrays[3:5]
        if not self.several:
            return self._labels[labels].astype(np.int32)
        table = np.zeros((len(self), len(self.classes)), dtype=bool)
        table[np.repeat(np.arange(len(self)), np.diff(starts)), self._labels[labels]] = True
        return table


def _write_index(file: BinaryIO, source: Shards, expected: dict) -> None:
    shards, offsets, sizes, labels, starts = (array("q") for _ in range(5))
    number: dict[str, int] = {}
    writer = IndexWriter(file)
    names, tally = NameWriter(writer), _Tally(source.root, expected)
    report = Progress(source.root, len(source.names), "archives")
    look = partial(scan, source, label_key=expected["label_key"] or "", flat=expected["label_key"] is None)
    for k, found in enumerate(in_threads(look, len(source.names), source.readers)):
        shard = source.names[k]
        tally.add(shard, found)
        for member in found.members:
            shards.append(k)
            offsets.append(member.offset)
            sizes.append(member.size)
            starts.append(len(labels))
            labels.extend(number.setdefault(name, len(number)) for name in tally.labels(shard, member))
        names.add([member.name for member in found.members])
        report.add(len(found.members))
    report.close()
    names.close()
    starts.append(len(labels))
    tally.check(len(shards), len(number))
    classes = natural(number)
    rank = np.empty(len(classes), dtype=np.int64)
    rank[[number[name] for name in classes]] = np.arange(len(classes))
    labels = array("q", rank[np.array(labels)].tobytes())
    meta = {**expected, "classes": classes, "several": len(labels) > len(shards) or tally.unlabelled > 0}
    meta |= {"endings": tally.endings, "left_out": tally.left_out}
    writer.finish([shards, offsets, sizes, labels, starts, names.offsets], meta)


class _Tally:
    """Where the labels of all archives come from, which must be one place, and what was skipped."""

    def __init__(self, root: str, expected: dict) -> None:
        self.root, self.expected, self.flat = root, expected, expected["label_key"] is None
        self.endings, self.left_out, self.json_keys = Counter(), Counter(), set()
        self.stated, self.by_text, self.by_archive, self.unlabelled = 0, 0, 0, 0
        self.missing: list[str] = []
        self.count = 0

    def add(self, shard: str, found: Scan) -> None:
        self.endings.update(ending(member.name) for member in found.members)
        self.left_out.update(found.left_out)
        self.json_keys |= found.json_keys

    def labels(self, shard: str, member: Member) -> list[str]:
        """The classes of an image; one without a label is noted and gets none."""
        if self.flat:
            return [""]
        if member.stated is not None:
            self.stated += 1
            self.by_text += member.by_text
            self.unlabelled += member.stated == []
            return [member.stated] if isinstance(member.stated, str) else list(dict.fromkeys(member.stated))
        may_state = any(side.endswith(LABEL_SIDES) for side in member.sides)
        if member.folder and not may_state:
            return [member.folder]
        self.by_archive += not member.sides
        if member.sides:
            self.count += 1
            if len(self.missing) < 3:
                self.missing.append(f"{shard}: {member.name} with {' '.join(member.sides)}")
            return []
        return [shard.removesuffix(".tar")]

    def check(self, images: int, classes: int) -> None:
        """Raises ValueError unless every image has a label from the same kind of place."""
        if not images:
            there = f"; what lies there: {listed(self.left_out)}" if self.left_out else ""
            raise ValueError(f"--data_path: no images in the archives of {self.root}{there}")
        ways = "write the labels in a table (--labels FILE.csv)"
        if self.missing:
            keys = f"; keys in its .json files: {' '.join(sorted(self.json_keys)[:20])}" if self.json_keys else ""
            raise ValueError(
                f"--data_path {self.root}: the side files of {self.count} of {images} images state no label "
                f"({'; '.join(self.missing)}){keys}: name the key that does with --label_key (it is "
                f"{self.expected['label_key']}), or {ways}"
            )
        if 0 < self.stated < images:
            raise ValueError(
                f"--data_path {self.root}: {images - self.stated} of {images} images have no side file that states a "
                f"label, the others have; {ways}"
            )
        if self.by_text >= 8 and classes > self.by_text / 2:
            raise ValueError(
                f"--data_path {self.root}: the .txt files of {self.by_text} images hold {classes} different texts, "
                f"which are captions rather than labels; {ways}"
            )
        if self.by_archive and _numbered(self.expected["shards"]):
            raise ValueError(
                f"--data_path {self.root}: nothing states the labels of the images: the archives are numbered shards "
                f"({self.expected['shards'][0]}, ...), without class folders or side files; {ways}"
            )


def _numbered(shards: Sequence[str]) -> bool:
    """Whether archives are the numbered parts of one whole, as 000000.tar or train-001.tar are, not classes."""
    found = [re.fullmatch(r"(.*?)(\d{3,})\.tar", shard) for shard in shards]
    if not all(found) or len({(match[1], len(match[2])) for match in found}) > 1:
        return False
    numbers = [int(match[2]) for match in found]
    return numbers[0] < 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
