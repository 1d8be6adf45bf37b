"""Reading images that annotations state a size for, and finding files that are not there."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from inputs.decode import BadImage, decode

ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = 4  # its values above this one


def read_image(path: str | Path, size: tuple[int, int] | None, stated_by: str = "") -> np.ndarray:
    """uint8 (H, W, 3), RGB. With a stated size as stored, or turned as EXIF says if only then it has that size; without
    one upright, as programs show it.

    Args:
        size: (height, width) that the annotations are for; None: not stated.
        stated_by: what a message calls the file that states it.
    Raises:
        OSError, BadImage: no such file; it cannot be decoded or is of another size.
    """
    data = read_bytes(path)
    if size is None:
        return decode(data) if _orientation(data) == 1 else _upright(data)
    pixels = decode(data)
    if pixels.shape[:2] == tuple(size):
        return pixels
    if pixels.shape[:2] == tuple(size)[::-1] and _orientation(data) > SIDEWAYS:
        return _upright(data)
    have, want = (f"{width} x {height}" for height, width in (pixels.shape[:2], size))
    raise BadImage(f"the image is {have} pixels, but {stated_by} is for {want}")


def read_bytes(path: str | Path) -> bytes:
    """What a file holds. Raises OSError, or BadImage for a pipe or a device, which may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImage("this is no ordinary file")
    return Path(path).read_bytes()


def read_text(path: str | Path) -> str:
    """What a text file holds, with or without the mark that Windows puts before UTF-8. Raises ValueError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def upright_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the image as programs show it, from its header; (0, 0) if that cannot be read."""
    if not os.path.isfile(path):
        return 0, 0
    try:
        with Image.open(path) as image:
            size = image.height, image.width
            return size[::-1] if image.getexif().get(ORIENTATION, 1) > SIDEWAYS else size
    except Exception:  # whoever reads the image will say what is wrong with it
        return 0, 0


def _orientation(data: bytes) -> int:
    """What EXIF says, from 1 (as stored) to 8; from 5 on height and width change places."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = image.getexif().get(ORIENTATION, 1)
            return value if isinstance(value, int) and 1 <= value <= 8 else 1
    except Exception:  # EXIF blocks can be broken in as many ways as images; decoding says what matters
        return 1


def _upright(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # PIL's plugins let many types through on broken files
        raise BadImage(f"cannot decode {len(data)} bytes: {' '.join(str(error).split())}") from error


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def missing_files(paths: Iterable[str]) -> list[int]:
    """Places of the paths at which there is no file; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    found = []
    for place, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or "."))
            except OSError:
                listed[folder] = set()
        # A file system may spell a name in other bytes than the annotations do.
        if name not in listed[folder] and not os.path.exists(path):
            found.append(place)
    return found
