"""RandAugment's operations on arrays: lookup tables, and OpenCV for what mixes pixels. Several times as fast as PIL's.

Each is PIL's operation with the same arguments. Lookup tables and posterising are equal to it; colour and sharpness are
within a level (PIL rounds twice); translations within a level (PIL's kernel, cubic with a = -1, is used); rotation and
shear differ by 0.3 to 0.6 levels on average (OpenCV's cubic has a = -0.75).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np

from curriculum.augment import Operation

# PIL truncates where OpenCV rounds to nearest: half a level less makes the second the first. A hair above, so that
# values that are whole already stay.
TRUNCATE = -0.498
LEVELS = np.arange(256)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # PIL's filter of this name


def apply_operations(pixels: np.ndarray, operations: Sequence[Operation], fill: Sequence[int]) -> np.ndarray:
    """Returns uint8 (H, W, 3) ``pixels`` after ``operations`` (`RandAugment.draw`); ``pixels`` stay as they are.

    ``fill`` is the RGB colour, 0-255, of what comes in from outside the image.
    """
    if operations:
        _use_one_thread()
    for name, args in operations:
        if name in WARPS:
            pixels = WARPS[name](pixels, *args, fill)
        else:
            pixels = COLOURS[name](pixels, *args)
    return pixels


@lru_cache(maxsize=1)
def _use_one_thread() -> None:
    # Loader workers share the cores: threads of OpenCV's own, per worker, would only get in each other's way.
    cv2.setNumThreads(0)


# ---------------------------------------------------------------------------------------- lookup tables, per channel


def autocontrast(pixels: np.ndarray) -> np.ndarray:
    rows = pixels.reshape(len(pixels), -1)  # reducing along rows first is what vectorises
    low = rows.min(axis=0).reshape(-1, 3).min(axis=0).astype(np.float64)
    high = rows.max(axis=0).reshape(-1, 3).max(axis=0).astype(np.float64)
    span = high - low
    scale = np.where(span > 0, 255 / np.maximum(span, 1), 1.0)
    offset = np.where(span > 0, -low * scale, 0.0)
    return _look_up(pixels, LEVELS[:, None] * scale + offset)


def equalize(pixels: np.ndarray) -> np.ndarray:
    # OpenCV 4 gives (256, 1), OpenCV 5 (256,).
    counts = np.stack([cv2.calcHist([pixels], [c], None, [256], [0, 256]).ravel() for c in range(3)], axis=1)
    counts = counts.astype(np.int64)
    last = np.array([column[np.flatnonzero(column)[-1]] for column in counts.T])
    step = (counts.sum(axis=0) - last) // 255
    below = np.cumsum(counts, axis=0) - counts
    table = np.where(step > 0, (step // 2 + below) // np.maximum(step, 1), LEVELS[:, None])
    return _look_up(pixels, table)


def invert(pixels: np.ndarray) -> np.ndarray:
    return cv2.bitwise_not(pixels)


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
    return pixels if bits >= 8 else pixels & np.uint8(256 - 2 ** (8 - max(bits, 0)))


def solarize(pixels: np.ndarray, threshold: int) -> np.ndarray:
    return _look_up(pixels, np.where(np.less(LEVELS, threshold), LEVELS, 255 - LEVELS))


def solarize_add(pixels: np.ndarray, add: int) -> np.ndarray:
    return _look_up(pixels, np.where(LEVELS < 128, LEVELS + add, LEVELS))


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _look_up(pixels, LEVELS * np.float32(factor))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _look_up(pixels, grey + np.float32(factor) * (LEVELS - grey))


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``table`` has 256 values, or (256, 3) for one table per channel; they are clipped and truncated."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table[None] if table.ndim == 2 else table)


# --------------------------------------------------------------------------------------------- neighbours and channels


def colour(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, factor, grey, 1 - factor, TRUNCATE)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    result = cv2.addWeighted(pixels, factor, cv2.filter2D(pixels, cv2.CV_8U, SMOOTH), 1 - factor, TRUNCATE)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        result[edge] = pixels[edge]  # PIL filters no pixel at the border
    return result


# ------------------------------------------------------------------------------------------------------------ geometry


def rotate(pixels: np.ndarray, degrees: float, fill: Sequence[int]) -> np.ndarray:
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), -math.sin(angle)
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    return _affine(pixels, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), fill)


def shear_x(pixels: np.ndarray, factor: float, fill: Sequence[int]) -> np.ndarray:
    return _affine(pixels, (1, factor, 0, 0, 1, 0), fill)


def shear_y(pixels: np.ndarray, factor: float, fill: Sequence[int]) -> np.ndarray:
    return _affine(pixels, (1, 0, 0, factor, 1, 0), fill)


def translate_x(pixels: np.ndarray, fraction: float, fill: Sequence[int]) -> np.ndarray:
    return _shift(pixels, fraction * pixels.shape[1], 1, fill)


def translate_y(pixels: np.ndarray, fraction: float, fill: Sequence[int]) -> np.ndarray:
    return _shift(pixels, fraction * pixels.shape[0], 0, fill)


def _affine(pixels: np.ndarray, coefficients: Sequence[float], fill: Sequence[int]) -> np.ndarray:
    """Pixel (x, y) comes from (a x + b y + c, d x + e y + f), as PIL's transform(AFFINE), bicubic.

    In float32, which is faster than OpenCV's fixed-point path as well as unbiased.
    """
    height, width = pixels.shape[:2]
    matrix = np.array(coefficients, dtype=np.float64).reshape(2, 3)
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # PIL counts from pixel corners, OpenCV from their centres
    warped = cv2.warpAffine(
        pixels.astype(np.float32),
        matrix,
        (width, height),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderValue=[value - TRUNCATE for value in fill],
    )
    return cv2.add(warped, (TRUNCATE, TRUNCATE, TRUNCATE, 0.0), dtype=cv2.CV_8U)


def _shift(pixels: np.ndarray, shift: float, axis: int, fill: Sequence[int]) -> np.ndarray:
    """Pixel x comes from x + shift along ``axis``; one four-tap filter, since the fraction is the same everywhere."""
    length = pixels.shape[axis]
    whole = math.floor(shift)
    fraction = shift - whole
    near, far = np.array([fraction, 1 - fraction]), np.array([1 + fraction, 2 - fraction])
    inner, outer = (near - 2) * near * near + 1, ((5 - far) * far - 8) * far + 4
    kernel = np.array([outer[0], inner[0], inner[1], outer[1]])
    # One more line in front: the first source may lie up to half a pixel outside, between lines -1 and 0.
    lines = cv2.copyMakeBorder(pixels, 1 - axis, 0, axis, 0, cv2.BORDER_REPLICATE)
    between = cv2.filter2D(
        lines,
        cv2.CV_8U,
        kernel[None] if axis else kernel[:, None],
        anchor=(1, 0) if axis else (0, 1),
        delta=TRUNCATE,
        borderType=cv2.BORDER_REPLICATE,
    )
    # Pixels whose source lies inside the image: 0 <= x + 0.5 + shift < length.
    inside = slice(max(0, math.ceil(-shift - 0.5)), max(0, min(length, math.ceil(length - 0.5 - shift))))
    source = slice(inside.start + whole + 1, inside.stop + whole + 1)
    out = np.empty_like(pixels)
    out[:] = fill
    if axis:
        out[:, inside] = between[:, source]
    else:
        out[inside] = between[source]
    return out


COLOURS: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
    "PosterizeIncreasing": posterize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "ColorIncreasing": colour,
    "ContrastIncreasing": contrast,
    "BrightnessIncreasing": brightness,
    "SharpnessIncreasing": sharpness,
    "Color": colour,
    "Contrast": contrast,
    "Brightness": brightness,
}
WARPS: dict[str, Callable[..., np.ndarray]] = {
    "Rotate": rotate,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateXRel": translate_x,
    "TranslateYRel": translate_y,
}
