"""Bytes of an image file -> RGB pixels, by the fastest decoder that gives PIL's."""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

JPEG_START = b"\xff\xd8\xff"


class BadImage(ValueError):
    """An image that cannot be used. Its text is one line, which names the file where it is known."""

    def __str__(self) -> str:
        # From a loader's worker the exception arrives as the text of a whole traceback, whose last line is the message.
        lines = super().__str__().strip().splitlines() or [""]
        return lines[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")


def decode(data: bytes) -> np.ndarray:
    """Decodes an image file's content as ``PIL.Image.open(...).convert("RGB")`` does, pixel for pixel.

    The orientation that EXIF states is not applied, as torchvision's ImageFolder does not. The first frame is taken.

    Returns:
        uint8 (H, W, 3), RGB, contiguous and writable.
    Raises:
        BadImage: the content is not an image, is broken or cut short, or is larger than PIL's limit for
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
                return image_pixels(image)
    except UnidentifiedImageError as error:
        raise BadImage(f"cannot decode {len(data)} bytes: not an image of a known format") from error
    except Exception as error:  # PIL's plugins let many types through on broken files: struct.error, KeyError, ...
        raise BadImage(f"cannot decode {len(data)} bytes: {' '.join(str(error).split())}") from error


def image_pixels(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), RGB, of a PIL image of any mode."""
    return np.array(image.convert("RGB"))


def decode_reduced(data: bytes, step: int) -> np.ndarray:
    """Decodes a JPEG for which `jpeg_size` is known at 1 / ``step`` of its size, reduced in the DCT domain.

    Returns:
        uint8 (ceil(H / step), ceil(W / step), 3), RGB. ``step`` is 1, 2, 4 or 8: libjpeg's other scales are slower than
        full size.
    Raises:
        BadImage: as `decode`.
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
