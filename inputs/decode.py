"""Bytes of an image file -> RGB pixels, by the fastest decoder that gives PIL's."""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from inputs.formats import HEAD, image_format, readable

# Of TIFF: bits per sample, and the least and greatest value as integers or in the samples' own type.
_BITS, _LEAST, _GREATEST = 258, (340, 280), (341, 281)
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
    Transparency is dropped: pixels keep the colour that is stored. More than 8 bits are reduced by `image_pixels`.

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
            with open_image(data) as image:
                return image_pixels(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"cannot decode {len(data)} bytes: not an image of a known format") from error
    except Exception as error:  # PIL's plugins let many types through on broken files: struct.error, KeyError, ...
        raise BadImage(f"cannot decode {len(data)} bytes: {' '.join(str(error).split())}") from error


def open_image(data: bytes) -> Image.Image:
    """PIL's lazy image, with the formats that packages beside Pillow read."""
    if image_format(data[:HEAD]) in ("JXL", "HEIF"):
        readable()  # registers them
    return Image.open(io.BytesIO(data))


def image_pixels(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), RGB, of a PIL image of any mode.

    Of 16-bit grey the 8 high bits are taken. Other integers and floats are scaled linearly from the range that the
    file declares (TIFF's MinSampleValue and MaxSampleValue, 12 bits per sample) to 0 ... 255; where it declares none,
    from 0 ... 1 for floats that lie in it, else from the least and greatest value of the image.

    Raises:
        BadImage: values that are not finite.
    """
    if image.mode != "F" and image.mode[0] != "I":
        return np.array(image.convert("RGB"))
    values = np.asarray(image)
    if values.dtype.byteorder not in "=|":
        values = values.astype(values.dtype.newbyteorder("="))
    low, high = _declared_range(image)
    if (low, high) == (0, 65535):
        grey = np.clip(values, 0, 65535) >> 8
    else:
        values = values.astype(np.float64)
        if not np.isfinite(values).all():
            raise BadImage("pixels that are not finite (NaN or infinity)")
        if low is None:
            low, high = float(values.min()), float(values.max())
            if image.mode == "F" and low >= 0 and high <= 1:
                low, high = 0.0, 1.0
        grey = np.clip((values - low) * (255 / max(high - low, 1e-300)), 0, 255).round()
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _declared_range(image: Image.Image) -> tuple[float, float] | tuple[None, None]:
    """(least, greatest) value of an image of mode I, I;16 or F as its file declares it."""
    tags = getattr(image, "tag_v2", {})
    least, greatest = (
        next((_number(tags[tag]) for tag in names if tag in tags), None) for names in (_LEAST, _GREATEST)
    )
    if greatest is not None and greatest > (least or 0):
        return float(least or 0), float(greatest)
    if image.mode.startswith("I;16"):
        bits = _number(tags.get(_BITS, 16)) or 16
        return 0, 2 ** min(int(bits), 16) - 1
    # Pillow scales PNM's values to 16 bits, and has PNG's in mode I in some versions.
    return (0, 65535) if image.mode == "I" and image.format in ("PNG", "PPM") else (None, None)


def _number(value: object) -> float | None:
    value = value[0] if isinstance(value, tuple) and value else value
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


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
