"""Bytes of an image file -> RGB pixels, by the fastest decoder that gives PIL's."""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

JPEG_START = b"\xff\xd8\xff"


def decode(data: bytes) -> np.ndarray:
    """Decodes an image file's content as ``PIL.Image.open(...).convert("RGB")`` does, pixel for pixel.

    The orientation that EXIF states is not applied, as torchvision's ImageFolder does not. The first frame is taken.

    Returns:
        uint8 (H, W, 3), RGB, contiguous and writable.
    Raises:
        ValueError: the content is not an image, is broken or cut short, or is larger than PIL's limit for
            decompression bombs (twice ``PIL.Image.MAX_IMAGE_PIXELS``: 179 million pixels).
    """
    if jpeg_size(data):
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # PIL reads some files that libjpeg warns about; where it does not, its message is the better one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return np.array(image.convert("RGB"))
    except Exception as error:  # PIL's plugins let many types through on broken files: struct.error, KeyError, ...
        raise ValueError(f"cannot decode {len(data)} bytes as an image: {error}") from error


def decode_reduced(data: bytes, step: int) -> np.ndarray:
    """Decodes a JPEG for which `jpeg_size` is known at 1 / ``step`` of its size, reduced in the DCT domain.

    Returns:
        uint8 (ceil(H / step), ceil(W / step), 3), RGB. ``step`` is 1, 2, 4 or 8: libjpeg's other scales are slower than
        full size.
    Raises:
        ValueError: as `decode`.
    """
    height, width = (-(-length // step) for length in jpeg_size(data))
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return np.ascontiguousarray(decode(data)[::step, ::step])


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that the fast decoder may read; None for any other content.

    CMYK is left to PIL, whose conversion differs by a level, and so are pictures above its limit of size, to refuse.
    """
    if data[:3] != JPEG_START:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colorspace != "CMYK" and height * width <= pixel_limit() else None


def pixel_limit() -> float:
    """Pixels above which an image counts as a decompression bomb."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float("inf")
