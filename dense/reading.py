"""Reading images that annotations state a size for, and finding files that are not there."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import files
from inputs.decode import BadImage, decode, decode_reduced, jpeg_size
from inputs.formats import ENDINGS, readable, sniff

ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = 4  # its values above this one
# For each of its values: quarter turns to the left, and whether the result is then mirrored.
UPRIGHT = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True)}
UPRIGHT[8] = (1, False)


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
    pixels = decode(data)
    return _upright(pixels, data) if _is_turned(data, pixels.shape[:2], size, stated_by) else pixels


def check_image(path: str | Path, size: tuple[int, int] | None, stated_by: str = "") -> None:
    """Raises as :func:`read_image`, in less time: of JPEGs all bytes are read, for an eighth of their size."""
    data = read_bytes(path)
    shape = jpeg_size(data)
    if shape:
        decode_reduced(data, 8)
    _is_turned(data, shape or decode(data).shape[:2], size, stated_by)


def _is_turned(data: bytes, shape: tuple[int, int], size: tuple[int, int] | None, stated_by: str) -> bool:
    """Whether an image, (height, width) ``shape`` as stored, is to be turned as EXIF says."""
    if size is None:
        return _orientation(data) != 1
    if shape == tuple(size):
        return False
    if shape == tuple(size)[::-1] and _orientation(data) > SIDEWAYS:
        return True
    have, want = (f"{width} x {height}" for height, width in (shape, size))
    raise BadImage(f"the image is {have} pixels, but {stated_by} is for {want}")


def read_bytes(path: str | Path) -> bytes:
    """What a file holds. Raises OSError, or BadImage for a pipe or a device, which may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImage("this is no ordinary file")
    return Path(path).read_bytes()


def read_text(path: Path) -> str:
    """What a list or a table holds. Raises ValueError if it is not there, or no regular UTF-8 file."""
    try:
        return files.read_text(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its ending or else by its content; what is hidden is none."""
    if path.name.startswith("."):
        return False
    return path.suffix.lower() in ENDINGS or (path.is_file() and sniff(str(path)) in readable())


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


def _upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Pixels turned and mirrored as EXIF says."""
    turns, mirrored = UPRIGHT[_orientation(data)]
    pixels = np.rot90(pixels, turns)
    return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


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
