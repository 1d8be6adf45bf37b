"""Shards by number, wherever they lie: what the readers of archives and Parquet files need of a folder or a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from config.files import open_file
from config.urls import is_url
from inputs.decode import BadImage
from inputs.formats import hidden, unread
from inputs.index_file import INDEX_NAME
from inputs.open_files import OpenFiles
from inputs.remote import RemoteShards

Result = TypeVar("Result")


class Shards(Protocol):
    """Files of one folder in the order of their names."""

    root: str
    which: str  # of the folder's files: a pattern or one name
    names: list[str]
    stamps: list[list]  # of each file: its size in bytes, and what changes when its content does
    beside: dict[str, int]  # files in the folder that are not read, by kind
    readers: int  # threads that pay when all files are looked at

    def read(self, k: int, offset: int, size: int) -> bytes:
        """``size`` bytes of file ``k``. Raises OSError, BadImage if the file ends before, Unreachable."""

    def open(self, k: int, fill: bool = False) -> BinaryIO:
        """File ``k`` to seek in. ``fill``: it will be read from again, so that a cache is to hold it."""

    def name(self, k: int) -> str:
        """What a message calls file ``k``."""


class LocalShards:
    """The files ``root/pattern`` (or the one file ``root``), but for hidden ones.

    Raises:
        ValueError: there is none.
    """

    readers = 1

    def __init__(self, root: str | Path, pattern: str):
        path = Path(root).absolute()
        self.root, self.which = (path.parent, path.name) if path.is_file() else (path, pattern)
        self.root = os.fspath(self.root)
        found = [path] if path.is_file() else [p for p in path.glob(pattern) if p.is_file()]
        self.names = sorted(p.name for p in found if not hidden(p.name))
        self.beside = {} if path.is_file() else unread((p.name for p in path.iterdir() if p.is_file()), pattern)
        if not self.names:
            raise ValueError(f"--data_path: there is no {pattern} in {path}")
        status = [os.stat(self.name(k)) for k in range(len(self.names))]
        self.stamps = [[each.st_size, each.st_mtime_ns] for each in status]
        self._files = OpenFiles()

    def read(self, k: int, offset: int, size: int) -> bytes:
        file = self._files.get(k, self.name(k))
        data = os.pread(file.descriptor, size, offset)
        if len(data) < size:
            raise BadImage(f"the file is cut short: {len(data)} of {size} bytes")
        return data

    def open(self, k: int, fill: bool = False) -> BinaryIO:
        return open_file(self.name(k))

    def name(self, k: int) -> str:
        return os.path.join(self.root, self.names[k])


def open_shards(
    root: str | Path, pattern: str, cache_dir: str | Path | None = None, cache_size: int | None = None
) -> Shards:
    """The files of a folder, or of a URL.

    Args:
        root: of a URL see `RemoteShards`. pattern: of the files' names, e.g. ``*.tar``.
        cache_dir, cache_size: of a URL: where whole files are kept, and how many bytes of them; None: nowhere.

    Raises:
        ValueError: there are none. Unreachable: a URL that does not answer.
    """
    return RemoteShards(str(root), pattern, cache_dir, cache_size) if is_url(root) else LocalShards(root, pattern)


def in_threads(look: Callable[[int], Result], count: int, threads: int) -> Iterator[Result]:
    """``look(0)``, ``look(1)``, ... in this order, several at a time; the first error ends them all."""
    if threads == 1:
        yield from map(look, range(count))
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(look, range(count))
    finally:
        pool.shutdown(cancel_futures=True)


def index_name(shards: Shards) -> str:
    """Name of the index of some files among others of their folder."""
    return f"{INDEX_NAME}_{re.sub(r'[^A-Za-z0-9._-]', '_', shards.which)}"


def remote_parts(source) -> list[RemoteShards]:
    """The shards at URLs that a source reads from, through views and unions."""
    parts = list(getattr(source, "sources", [])) + [part for part in [getattr(source, "source", None)] if part]
    shards = getattr(source, "shards", None)
    own = [shards] if isinstance(shards, RemoteShards) else []
    return own + [found for part in parts for found in remote_parts(part)]
