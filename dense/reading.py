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


def read_image(path: str | Path, size: tuple[int, int] | None, stated_by: str) -> np.ndarray:
    """uint8 (H, W, 3), RGB, as stored; turned as EXIF says if only then it has the size that the annotations are for.

    Args:
        size: stated (height, width); None: not stated.
        stated_by: what a message calls the file that states it.
    Raises:
        OSError, BadImage: no such file; it cannot be decoded or is of another size.
    """
    data = Path(path).read_bytes()
    pixels = decode(data)
    if size is None or pixels.shape[:2] == tuple(size):
        return pixels
    if pixels.shape[:2] == tuple(size)[::-1]:
        try:
            with Image.open(io.BytesIO(data)) as image:
                turned = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:  # EXIF blocks can be broken in as many ways as images
            raise BadImage(f"cannot turn the image as its EXIF says: {' '.join(str(error).split())}") from error
        if turned.shape[:2] == tuple(size):
            return turned
    have, want = (f"{width} x {height}" for height, width in (pixels.shape[:2], size))
    raise BadImage(f"the image is {have} pixels, but {stated_by} is for {want}")


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
