"""Checkpoints: plain tensors and types, written atomically, verified by checksum before they are used."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from config.files import open_file

from .schema import check_fields

# 1: the first. 2: with the input size of the weights, and what the run is (`identity`).
FORMAT_VERSION = 2
LAST, BEST = "checkpoint-last.pth", "checkpoint-best.pth"
KEYS = ("model", "model_ema", "optimizer", "scaler", "step", "epoch", "best", "meters", "config")
_MARK = b"sha256:"
_TRAILER = len(_MARK) + 64  # bytes of "sha256:" and its hexadecimal digits
_NUMBERED = re.compile(r"checkpoint-(\d+)\.pth")
_PLAIN = (str, int, float, bool, type(None))


class BadCheckpoint(ValueError):
    """A file that is no whole, unaltered checkpoint of this project."""


def save(path: Path, payload: dict[str, Any]) -> None:
    """Writes ``payload`` so that ``path`` always holds a whole checkpoint: the old one or the new one.

    The file is a torch zip archive whose zip comment is the SHA-256 of all bytes before the comment's length, so the
    checksum travels with the file and ``torch.load(weights_only=True)`` reads it as any other. It is computed from what
    was meant to be written, and the file is read back before it takes the old one's place.

    Raises:
        TypeError: the payload holds what such a load would refuse; names the place.
        OSError: it could not be written, or not as it was meant; what was at ``path`` is still there.
    """
    _check_plain(payload, "checkpoint")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            writer = _HashingWriter(file)
            torch.save({"format_version": FORMAT_VERSION, **payload}, writer)
            writer.finish()
            file.flush()
            os.fsync(file.fileno())
            if not _is_whole(file):
                raise OSError(errno.EIO, f"{temporary} reads back other than it was written")
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's writer turns a failed write into this
        temporary.unlink(missing_ok=True)
        cause = error.__context__ or error.__cause__
        raise cause if isinstance(cause, OSError) else OSError(errno.EIO, str(error).splitlines()[0]) from None
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


class _HashingWriter:
    """Passes a torch archive on to a file, and puts the checksum of all but its last two bytes behind it.

    Those are the length of the archive's comment; the checksum becomes that comment.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha, self.tail = file, hashlib.sha256(), b""

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self.file.write(data)
        if len(data) >= 2:
            self.sha.update(self.tail)
            self.sha.update(data[:-2])
            self.tail = bytes(data[-2:])
        else:
            joined = self.tail + bytes(data)
            self.sha.update(joined[:-2])
            self.tail = joined[-2:]
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def finish(self) -> None:
        self.file.seek(-2, os.SEEK_CUR)
        self.file.write(_TRAILER.to_bytes(2, "little") + _MARK + self.sha.hexdigest().encode())


def link(source: Path, target: Path) -> None:
    """Makes ``target`` another name of the checkpoint ``source``, atomically; copies where links are not supported."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            temporary.write_bytes(source.read_bytes())
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that :func:`save` wrote, of this format version or an earlier one.

    Raises:
        BadCheckpoint: missing, truncated, altered, or not ours; the message names the file.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            if not _trailer(file).startswith(_MARK):
                raise BadCheckpoint(f"{path} carries no checksum: it is truncated, or not a checkpoint of this project")
            if not _is_whole(file):
                raise BadCheckpoint(f"{path} does not match its checksum: it was damaged after it was written")
            check_archive(file)
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}") from None
    except BadCheckpoint as error:
        raise BadCheckpoint(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except pickle.UnpicklingError:
        raise BadCheckpoint(f"{path} holds more than tensors and plain types, so it was not loaded") from None
    except Exception as error:  # the checksum holds, so someone made it: the unpickler raises whatever it meets
        raise BadCheckpoint(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None
    if not isinstance(payload, dict):
        raise BadCheckpoint(f"{path} is not a checkpoint of this project")
    version = payload.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        said = " ".join(str(version).split())[:40]
        raise BadCheckpoint(f"{path} has format version {said}; this code reads versions 1 to {FORMAT_VERSION}")
    if missing := [key for key in KEYS if key not in payload]:
        raise BadCheckpoint(f"{path} lacks {', '.join(missing)}, which every checkpoint of this project has")
    try:
        check_fields(payload)
    except ValueError as error:
        raise BadCheckpoint(f"{path} is not a checkpoint of this project: {error}") from None
    return _upgrade(payload)


def check_archive(file: BinaryIO) -> None:
    """Raises BadCheckpoint for a zip archive whose members take more room than the file: torch writes none."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        size = os.fstat(file.fileno()).st_size
        if any(one.compress_type for one in members) or sum(one.file_size for one in members) > size:
            raise BadCheckpoint("it is compressed, which no checkpoint is: it would grow without bounds")


def verify_own(path: str | Path) -> None:
    """Raises BadCheckpoint for a file with our checksum that does not match it. Other people's weights carry none."""
    if not os.path.isfile(path):
        return  # a name on a hub, or for others to say
    with open_file(path) as file:
        if _trailer(file).startswith(_MARK) and not _is_whole(file):
            raise BadCheckpoint(f"{path} does not match its checksum: it was damaged after it was written")


def _upgrade(payload: dict[str, Any]) -> dict[str, Any]:
    """Brings an earlier format to the present one; what it did not record is None.

    Earlier identities have another fingerprint of the images, `images` today's of most of them.
    """
    payload = {"input_size": None, "identity": None, **payload}
    images = payload.pop("images", None)
    for part, name in (("data", "train"), ("validation", "val")):
        data = (payload["identity"] or {}).get(part, {})
        known = images.get(name) if isinstance(images, dict) else None
        if data.pop("fingerprint", None) and isinstance(known, dict) and known.get("images") == data.get("images"):
            data["digest"] = known.get("digest")
    return payload


def newest(folder: Path, counts: Callable[[dict[str, Any]], bool] | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The good checkpoint that is furthest on in ``folder``, by content; says what it skipped.

    Args:
        counts: whether a payload is of interest; None: all are, and it is an error if all files are damaged.

    Raises:
        BadCheckpoint: there are checkpoints, but none is good.
    """
    found, skipped, seen = None, [], set()
    for path in sorted(folder.glob("checkpoint-*.pth")):
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue  # another name of the same file
            payload = load(path)
            seen.add((status.st_dev, status.st_ino))
        except (BadCheckpoint, OSError) as error:
            print(f"warning: skipped a checkpoint: {error}", flush=True)
            skipped.append(path.name)
            continue
        if (counts is None or counts(payload)) and (found is None or _place(payload) > _place(found[1])):
            found = path, payload
    if found is None and skipped and counts is None:
        raise BadCheckpoint(
            f"--output_dir {folder}: none of its checkpoints can be used ({', '.join(skipped)}); "
            "to start again, remove them or name another folder"
        )
    return found


def _place(payload: dict[str, Any]) -> tuple[int, int, int]:
    """How far on: a changed plan (``--allow_change``) counts its steps anew."""
    return len(payload.get("changes") or ()), payload["step"], payload["epoch"]


def set_aside(folder: Path, change: int) -> None:
    """Renames checkpoint-<step>.pth of before a change of the plan: its steps are counted anew, and would meet them.

    They stay until someone removes them, and count as checkpoints like the others.
    """
    for path in folder.glob("checkpoint-*.pth"):
        if match := _NUMBERED.fullmatch(path.name):
            path.rename(folder / f"checkpoint-{match[1]}-before-change-{change}.pth")


def prune(folder: Path, keep: int, trusted: Path | None = None) -> None:
    """Removes all but the ``keep`` newest checkpoint-<step>.pth, if a good one stays, and what killed writes left.

    Args:
        trusted: one of those that stay, known to be good. Without it, or where it would not stay, those that stay are
            read to find one.
    """
    for path in folder.glob("checkpoint-*.pth.*.tmp"):
        path.unlink(missing_ok=True)
    numbered = sorted((int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name)))
    paths = [path for _, path in numbered]
    surplus, kept = paths[: max(len(paths) - keep, 0)], paths[max(len(paths) - keep, 0) :]
    if not surplus:
        return
    if trusted not in kept and not any(_is_good(path) for path in kept):
        print(f"warning: none of the newest {keep} checkpoints in {folder} is good; older ones are kept", flush=True)
        return
    for path in surplus:
        path.unlink(missing_ok=True)


def _is_good(path: Path) -> bool:
    try:
        with open_file(path) as file:
            return _is_whole(file)
    except OSError:
        return False


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _check_plain(item, f"{where}[{place}]")
    elif type(value) not in _PLAIN and not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}; checkpoints hold tensors and plain types only")


def _trailer(file: BinaryIO) -> bytes:
    """The comment at the file's end, where ours stands."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - _TRAILER, 0))
    return file.read()


def _is_whole(file: BinaryIO) -> bool:
    """Whether a file carries a checksum and matches it."""
    trailer = _trailer(file)
    size = os.fstat(file.fileno()).st_size - _TRAILER - 2
    if size < 0 or not trailer.startswith(_MARK):
        return False
    file.seek(0)
    sha = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 22))):
        sha.update(block)
        size -= len(block)
    return trailer[len(_MARK) :] == sha.hexdigest().encode()


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut; folders cannot be opened on every system."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
