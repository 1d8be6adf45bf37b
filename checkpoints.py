"""Checkpoints: plain tensors and types, written atomically, verified by checksum before they are used."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1
LAST, BEST = "checkpoint-last.pth", "checkpoint-best.pth"
_MARK = b"sha256:"
_TRAILER = len(_MARK) + 64  # bytes of "sha256:" and its hexadecimal digits


KEYS = ("model", "model_ema", "optimizer", "scaler", "step", "epoch", "best", "meters", "config")
_PLAIN = (torch.Tensor, str, int, float, bool, type(None))


class BadCheckpoint(ValueError):
    """A file that is no whole, unaltered checkpoint of this project."""


def save(path: Path, payload: dict[str, Any]) -> None:
    """Writes ``payload`` so that ``path`` always holds a whole checkpoint: the old one or the new one.

    The file is a torch zip archive whose zip comment is the SHA-256 of all bytes before the comment's length, so the
    checksum travels with the file and ``torch.load(weights_only=True)`` reads it as any other.

    Raises:
        TypeError: the payload holds what such a load would refuse; names the place.
        OSError: it could not be written; what was at ``path`` is still there.
    """
    _check_plain(payload, "checkpoint")
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w+b") as file:
        torch.save({"format_version": FORMAT_VERSION, **payload}, file)
        size = file.tell() - 2  # the last two bytes of a zip archive are its comment's length
        digest = _digest(file, size)
        file.seek(size)
        file.write(_TRAILER.to_bytes(2, "little") + _MARK + digest)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def link(source: Path, target: Path) -> None:
    """Makes ``target`` another name of the checkpoint ``source``, atomically; copies where links are not supported."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        temporary.write_bytes(source.read_bytes())
    os.replace(temporary, target)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that :func:`save` wrote.

    Raises:
        BadCheckpoint: missing, truncated, altered, or not ours; the message names the file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size - _TRAILER - 2
            file.seek(max(size, 0))
            trailer = file.read()
            if not trailer[2:].startswith(_MARK):
                raise BadCheckpoint(f"{path} carries no checksum: it is truncated, or not a checkpoint of this project")
            if _digest(file, size) != trailer[2 + len(_MARK) :]:
                raise BadCheckpoint(f"{path} does not match its checksum: it was damaged after it was written")
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}") from None
    except BadCheckpoint:
        raise
    except pickle.UnpicklingError:
        raise BadCheckpoint(f"{path} holds more than tensors and plain types, so it was not loaded") from None
    except Exception as error:  # the checksum holds, so someone made it: the unpickler raises whatever it meets
        raise BadCheckpoint(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None
    if not isinstance(payload, dict):
        raise BadCheckpoint(f"{path} is not a checkpoint of this project")
    version = payload.get("format_version")
    if version != FORMAT_VERSION:
        raise BadCheckpoint(f"{path} has format version {version}; this code reads version {FORMAT_VERSION}")
    if missing := [key for key in KEYS if key not in payload]:
        raise BadCheckpoint(f"{path} lacks {', '.join(missing)}, which every checkpoint of this project has")
    return payload


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The good checkpoint with the most steps in ``folder``, by content; says what it skipped."""
    found = None
    for path in sorted(folder.glob("checkpoint-*.pth")):
        if path.name == BEST:
            continue
        try:
            payload = load(path)
        except BadCheckpoint as error:
            print(f"warning: skipped a checkpoint: {error}", flush=True)
            continue
        if found is None or payload["step"] > found[1]["step"]:
            found = path, payload
    return found


def prune(folder: Path, keep: int) -> None:
    """Removes all but the ``keep`` newest checkpoint-<step>.pth."""
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    for _, path in sorted(numbered)[: max(len(numbered) - keep, 0)]:
        path.unlink(missing_ok=True)


_NUMBERED = re.compile(r"checkpoint-(\d+)\.pth")


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


def _digest(file, size: int) -> bytes:
    """SHA-256, in hexadecimal, of the first ``size`` bytes."""
    file.seek(0)
    sha = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 22))):
        sha.update(block)
        size -= len(block)
    return sha.hexdigest().encode()


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut; folders cannot be opened on every system."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
