"""Shards at a URL (s3://, gs://, https://, hf://, ...) through fsspec: read by range, retried, kept in a local cache.

Credentials come from where each file system looks for them (environment, ~/.aws, HF_TOKEN, ...), never from a URL.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import itertools
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from config.urls import check_url, is_url, redact
from inputs.decode import BadImage
from inputs.formats import hidden, unread
from utils import Unreachable

Result = TypeVar("Result")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
LISTING = "shards.txt"  # of a URL that cannot be listed
DELAYS = tuple(min(0.2 * 2**k, 20.0) for k in range(10))  # seconds before each further try: over a minute in all
HEADERS = 8 << 10  # bytes read at a time where only headers are wanted: a member's, and small members after it
TAGS = ("ETag", "etag", "blob_id", "generation", "Last-Modified", "LastModified", "mtime", "created")
WRONG = (400, 401, 403, 405, 410, 416)  # answers of a server that another try does not change
_rng = random.Random()


def retried(action: Callable[[], Result], where: str) -> Result:
    """``action()``, tried again with growing delays while the connection fails.

    Raises:
        FileNotFoundError: it is not there. Unreachable: it is refused, or has failed as often as DELAYS; names it.
    """
    for delay in (*DELAYS, None):
        try:
            return action()
        except (Unreachable, BadImage):
            raise
        except Exception as raised:  # every file system has kinds of its own
            error = _behind(raised)
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(2, "not found", redact(where)) from None
            reason = redact(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
            if _is_final(error):
                raise Unreachable(
                    f"{redact(where)} cannot be read ({reason}): check the address and the credentials"
                ) from None
            if delay is None:
                raise Unreachable(
                    f"{redact(where)} cannot be read after {len(DELAYS) + 1} tries ({reason}): check the connection, "
                    "then launch the same command again"
                ) from None
        time.sleep(delay * _rng.uniform(0.5, 1.5))
    raise AssertionError


def _behind(error: Exception) -> Exception:
    """The failure of a connection, which fsspec over http also calls a file that is not found."""
    cause = error.__cause__
    failed = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and failed and getattr(cause, "status", 0) != 404 else error


def _is_final(error: Exception) -> bool:
    """Whether another try would fare no better."""
    answers = [getattr(error, "status", None), getattr(error, "code", None)]
    answers.append(getattr(getattr(error, "response", None), "status_code", None))
    refused = type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
    wrong = isinstance(error, PermissionError | NotImplementedError | TypeError | AttributeError)
    return refused or wrong or any(answer in WRONG for answer in answers)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        ValueError: the protocol is unknown or needs a package; says which.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        how = f"pip install {package}" if package else " ".join(str(error).split())
        raise ValueError(f"--data_path {url}: {protocol}:// needs a package: {how}") from None
    except ValueError as error:
        raise ValueError(f"--data_path {url}: {redact(' '.join(str(error).split()))}") from None


class RemoteShards:
    """Files at a URL, in the order of their names; as `Shards` describes them.

    Args:
        url: a folder, one file, or a pattern of numbers in braces (``.../train-{000..146}.tar``). A folder is listed
            where the file system can (s3, gs, hf, ...); over http(s) its file ``shards.txt`` has a name per line.
        pattern: of the names in a folder.
        cache_dir, cache_size: where whole files are kept, and bytes of them; None: nowhere.

    Raises:
        ValueError: a URL with credentials, without files, or of an unknown kind. Unreachable: it does not answer.
    """

    readers = 32

    def __init__(self, url: str, pattern: str, cache_dir: str | Path | None = None, cache_size: int | None = None):
        check_url(url, "data_path")
        self.root, self.which = url.rstrip("/"), pattern
        last = self.root.rpartition("/")[2]
        file_system(self.root)
        self.beside: dict[str, int] = {}
        if "{" in last or fnmatch.fnmatch(last, pattern):
            self.root, self.which = self.root.rpartition("/")[0], last
            self.names = expand(last)
            self.stamps = self._look_at(self.names)
        elif self.root.startswith(("http://", "https://")):
            self.names = self._stated()
            self.stamps = self._look_at(self.names)
        else:
            self.names, self.stamps = self._listed(pattern)
        if not self.names:
            raise ValueError(f"--data_path: there is no {pattern} at {self.root}")
        self.cache = None
        if cache_dir is not None and cache_size:
            from inputs.cache import ShardCache  # which needs file locks, as not every system has them

            self.cache = ShardCache(Path(cache_dir) / "shards", cache_size)
        self.keys = [
            hashlib.sha256(f"{self.name(k)}\0{stamp}".encode()).hexdigest()[:32] for k, stamp in enumerate(self.stamps)
        ]

    def read(self, k: int, offset: int, size: int, fill: bool = True) -> bytes:
        """Bytes of file ``k``, from the cache if it is there. Raises as `fetch`.

        Args:
            fill: whether a file that the cache lacks is wanted there: its download then starts in the background.
        """
        if self.cache is not None:
            data = self.cache.read(self.keys[k], offset, size)
            if data is not None:
                return data
        if self.cache is not None and fill:
            self.cache.want(self.keys[k], self.stamps[k][0], lambda start, stop: self.fetch(k, start, stop))
        return self.fetch(k, offset, offset + size)

    def fetch(self, k: int, start: int, stop: int) -> bytes:
        """Bytes of file ``k`` from its URL. Raises as `retried`, and BadImage if the file ends before ``stop``."""
        total = self.stamps[k][0]
        if stop > total:
            raise BadImage(f"the file is cut short: {max(0, total - start)} of {stop - start} bytes")

        def get() -> bytes:
            fs, path = file_system(self.name(k))
            if fs.async_impl:
                data = fs.cat_file(path, start=start, end=stop)
            else:  # such ones read through an open file, and by default far ahead
                with fs.open(path, "rb", cache_type="none") as file:
                    file.seek(start)
                    data = file.read(stop - start)
            if len(data) == stop - start:
                return data
            if len(data) == total:
                raise Unreachable(
                    f"{self.name(k)}: its server does not serve parts of files (byte ranges); use one that does"
                )
            raise EOFError(f"{len(data)} of {stop - start} bytes came")

        return retried(get, self.name(k))

    def open(self, k: int, fill: bool = False) -> BinaryIO:
        return RangeFile(lambda start, stop: self.read(k, start, stop - start, fill), self.stamps[k][0])

    def name(self, k: int) -> str:
        return f"{self.root}/{self.names[k]}"

    def _stated(self) -> list[str]:
        """The names in ``shards.txt``."""
        where = f"{self.root}/{LISTING}"
        fs, path = file_system(where)
        try:
            lines = retried(lambda: fs.cat_file(path), where).decode().splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            raise ValueError(
                f"--data_path: a folder cannot be listed over http, and there is no {where}: put one there with the "
                "files' names, one a line, or name the files by numbers in braces: .../train-{000..146}.tar"
            ) from None
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        for name in names:
            check_url(f"{self.root}/{name}", "data_path")
            if is_url(name) or name.startswith("/"):
                raise ValueError(f"{where}: {redact(name)} is not a name below {self.root}")
        return sorted(names)

    def _listed(self, pattern: str) -> tuple[list[str], list[list]]:
        fs, path = file_system(self.root)
        fs.invalidate_cache()
        try:
            entries = retried(lambda: fs.ls(path, detail=True), self.root)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"--data_path: there is nothing at {self.root}: name the folders with --train_split and --val_split "
                "('.' for shards in --data_path itself), or hold training images out with --val_share 10%"
            ) from None
        found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}
        self.beside = unread(found, pattern)
        names = sorted(name for name in found if fnmatch.fnmatch(name, pattern) and not hidden(name))
        return names, [_stamp(found[name], f"{self.root}/{name}") for name in names]

    def _look_at(self, names: list[str]) -> list[list]:
        def look(name: str) -> list:
            where = f"{self.root}/{name}"
            fs, path = file_system(where)
            try:
                return _stamp(retried(lambda: fs.info(path), where), where)
            except FileNotFoundError:
                raise ValueError(f"--data_path: {where} is not there") from None

        with ThreadPoolExecutor(self.readers) as pool:
            return list(pool.map(look, names))


class RangeFile(io.RawIOBase):
    """A file to seek in whose content comes by ranges; small reads come out of one of HEADERS bytes."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int):
        self._fetch, self._size = fetch, size
        self._position, self._first, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._position + size, self._size)
        start, self._position = self._position, max(stop, self._position)
        if start >= stop:
            return b""
        if not self._first <= start <= stop <= self._first + len(self._block):
            self._first = start
            self._block = self._fetch(start, min(max(stop, start + HEADERS), self._size))
        return self._block[start - self._first : stop - self._first]

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def expand(pattern: str) -> list[str]:
    """``a-{08..11}.tar`` -> a-08.tar, a-09.tar, a-10.tar, a-11.tar; several braces: all combinations.

    Raises:
        ValueError: braces with anything else in them.
    """
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    if any("{" in piece or "}" in piece for piece in pieces[::3]):
        raise ValueError(f"--data_path: {pattern} is not understood; braces hold two numbers, as in {{000..146}}")
    numbers = [
        [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3])
    ]
    return [
        pieces[0] + "".join(number + piece for number, piece in zip(chosen, pieces[3::3]))
        for chosen in itertools.product(*numbers)
    ]


def _stamp(info: dict, where: str) -> list:
    if info.get("size") is None:
        raise Unreachable(f"{where}: its server does not tell its size, so that no part of it can be asked for")
    return [int(info["size"]), next((str(info[tag]) for tag in TAGS if info.get(tag)), "")]
