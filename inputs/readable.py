"""Which validation images can be used: found before the first step, all at once, and remembered beside the index."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from config.urls import is_url
from inputs.bad_files import budget, load
from inputs.decode import BadImage, decode_reduced, jpeg_size, open_image
from inputs.index_file import INDEX_NAME, IndexWriter, Progress, open_or_build
from inputs.shards import in_threads
from inputs.transforms import to_pixels
from inputs.views import Joined, Source, View, fingerprint

Found = TypeVar("Found")

THREADS = 16
CHUNK = 64  # images of one task
STAMPED = 200_000  # files that are asked for their time at every start
LARGE = 2**26  # pixels above which only the header is read: 16 threads decode such images at once


def drop_unreadable(source: Source, max_bad: float) -> Source:
    """The images that can be used; its attribute ``dropped``, if it has one, holds a message for each that cannot.

    JPEGs are decoded at an eighth of their size, which reads all of the file; other images whole. At a URL that is as
    much as one evaluation reads, and the cache fills by it. The result is kept beside the index for as long as the
    images and the times of their files are the same; what was bad is looked at anew
    each time.

    Raises:
        ValueError: more images are bad than ``max_bad`` allows (`inputs.bad_files.budget`); names them.
    """
    base = _base(source)
    if base is None:
        return source
    known = {"format": 1, **fingerprint(source), "stamp": _stamp(source, base)}
    index = open_or_build(
        base.root,
        f"{INDEX_NAME}_checked",
        base.cache_dir,
        build=lambda file: IndexWriter(file).finish(
            [array("q", look_at_all(len(source), base.root, partial(_unusable, source)))], known
        ),
        is_current=lambda index: index.meta == known,
    )
    messages = {number: message for number in index.arrays[0].tolist() if (message := _fault(source, number))}
    if not messages:
        return source
    allowed = budget(max_bad, len(source))
    if len(messages) > allowed or len(messages) == len(source):
        shown = "; ".join(list(messages.values())[:20]) + ("; ..." if len(messages) > 20 else "")
        raise BadImage(
            f"{len(messages)} of {len(source)} validation images cannot be used, --max_bad {max_bad:g} allows "
            f"{allowed}: {shown}. Write good files under these names, or raise --max_bad"
        )
    keep = np.ones(len(source), dtype=bool)
    keep[list(messages)] = False
    kept = View(source, keep)
    kept.dropped = list(messages.values())
    return kept


def _base(source: Source) -> Source | None:
    """The indexed source that views look at; None for one that lies in memory or in a package's cache."""
    while isinstance(source, View | Joined):
        source = source.source if isinstance(source, View) else source.sources[0]
    return source if hasattr(source, "root") else None


def _stamp(source: Source, base: Source) -> str:
    """Changes when a file is written anew, for as many files as can be asked quickly."""
    if hasattr(base, "shards"):
        return str(base.shards.stamps)
    if hasattr(base, "stamps"):
        return str(base.stamps)
    if not hasattr(base, "path") or len(source) > STAMPED:
        return ""
    with ThreadPoolExecutor(THREADS) as pool:
        chunks = pool.map(lambda first: _stats(source, first), range(0, len(source), CHUNK))
        return hashlib.sha256("".join(chunks).encode()).hexdigest()[:16]


def _stats(source: Source, first: int) -> str:
    lines = []
    for number in range(first, min(first + CHUNK, len(source))):
        try:
            status = os.stat(source.name(number))
            lines.append(f"{status.st_size} {status.st_mtime_ns}\n")
        except OSError:
            lines.append("gone\n")
    return "".join(lines)


def look_at_all(count: int, root: str, look: Callable[[range], list[Found]]) -> Iterator[Found]:
    """What ``look`` finds among ``count`` validation images, a few at a time in threads, with a progress line."""
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    report = Progress(root, len(chunks), "parts", doing="checking the validation images of")
    threads = THREADS if is_url(root) else min(THREADS, 2 * (os.cpu_count() or 1))  # a connection makes them wait
    for chunk, found in zip(chunks, in_threads(lambda k: look(chunks[k]), len(chunks), threads)):
        report.add(len(chunk))
        yield from found
    report.close()


def _unusable(source: Source, places: range) -> list[int]:
    return [place for place in places if _fault(source, place)]


def _fault(source: Source, number: int) -> str | None:
    try:
        load(source, number, _try)
    except BadImage as error:
        return str(error)
    return None


def _try(data) -> None:
    """Raises BadImage if an image cannot be used."""
    if isinstance(data, bytes):
        if jpeg_size(data):
            decode_reduced(data, 8)
            return
        try:
            with open_image(data) as image:
                large = image.width * image.height > LARGE
        except Exception:
            large = False  # decoding says what is wrong
        if large:
            return
    to_pixels(data)
