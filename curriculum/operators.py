"""Low-frequency operators: how an image is reduced to the easier part of its content."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F

OPERATORS = ("fourier", "lanczos", "bicubic", "bilinear", "nearest")


def low_frequency_crop(x: torch.Tensor, size: int) -> torch.Tensor:
    """Keep the central size x size block of each image's spectrum (EfficientTrain, ICCV 2023, Eq. 1 and App. C).

    The result is the real part of the inverse DFT of the block, with amplitude (size / H)(size / W), so that the mean
    and the range of smooth content stay. DFT, block and inverse are linear and act on each axis alone, so the whole is
    a matrix product per axis (`_fourier_axis`). An odd size keeps the frequencies -(size - 1) / 2 ... (size - 1) / 2;
    an even one also keeps -size / 2 without its mirror, as the release does, and the imaginary part that this leaves
    is dropped. Output pixel (0, 0) lies on input pixel (0, 0), whereas resizing aligns the corners of the pixels.

    Args:
        x: float images (..., H, W), any device. Half precisions are computed in float32, also under autocast; TF32
            products, where the caller allows them on CUDA, are not used.
        size: side of the output, 1 <= size <= min(H, W). If size == H == W, x itself is returned.
    Returns:
        (..., size, size) in x's dtype; differentiable.
    Raises:
        ValueError: x is not a float tensor of at least two dimensions, or the size is outside its range.

    A wave of 3 cycles is below the limit of 4 that 8 pixels can hold, one of 5 is above it:

    >>> wave = lambda cycles, size: torch.cos(2 * torch.pi * cycles * torch.arange(size) / size).expand(size, size)
    >>> torch.allclose(low_frequency_crop(wave(3, 16), 8), wave(3, 8), atol=1e-6)
    True
    >>> low_frequency_crop(wave(5, 16), 8).abs().max() < 1e-6
    tensor(True)
    """
    _check_images(x)
    if not x.is_floating_point():
        raise ValueError(f"low_frequency_crop takes float images, got {x.dtype}: convert and normalise them first")
    height, width = x.shape[-2:]
    size = _check_size(size, height, width)
    if size == height == width:
        return x
    real = torch.promote_types(x.dtype, torch.float32)
    rows = _fourier_axis(height, size, real, x.device)
    columns = _fourier_axis(width, size, real, x.device)
    images = x.to(real).reshape(-1, height, width)
    # On a CPU a few images at a time stay in the cache.
    parts = images.split(8 * torch.get_num_threads()) if x.device.type == "cpu" else [images]
    with _full_precision(x.device.type):
        done = [_apply_axes(part, rows, columns) for part in parts]
    out = torch.cat(done) if len(done) > 1 else done[0]
    out = out.view(*x.shape[:-2], size, size)
    return out.to(x.dtype)


def downsample(x: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Reduce images to size x size by a named operator.

    `fourier` is `low_frequency_crop`; `lanczos` (a = 3) is EfficientTrain++'s efficient down-sampling, on uint8 PIL's
    to one level; `bicubic`, `bilinear` (all three antialiased) and `nearest` (no filter, pixel centres) are ablations.

    Args:
        x: images (..., C, H, W), float or uint8. uint8 results are rounded and clamped to 0 ... 255, which cuts off the
            overshoot of `fourier`: float images keep it.
        size: side of the output, 1 <= size <= min(H, W). If size == H == W, x itself is returned.
        mode: one of `OPERATORS`.
    Returns:
        (..., C, size, size) in x's dtype.
    Raises:
        ValueError: the mode is not known, x is neither float nor uint8, or the size is outside its range.

    >>> downsample(torch.zeros(3, 256, 320, dtype=torch.uint8), 96, "lanczos").shape
    torch.Size([3, 96, 96])
    """
    if mode not in OPERATORS:
        raise ValueError(f"down-sampling mode {mode!r} is not known; choose one of {', '.join(OPERATORS)}")
    _check_images(x)
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(f"downsample takes float or uint8 images, got {x.dtype}: convert them first")
    height, width = x.shape[-2:]
    size = _check_size(size, height, width)
    if size == height == width:
        return x
    real = torch.promote_types(x.dtype, torch.float32)
    uint8_on_cpu = x.dtype == torch.uint8 and x.device.type == "cpu"
    if mode == "fourier":
        out = low_frequency_crop(x.to(real), size)
    elif mode == "nearest":
        out = _interpolate(x, size, mode="nearest-exact")
    elif mode == "lanczos" and not (uint8_on_cpu and _torch_has_lanczos()):
        out = _lanczos(x, size)
    else:
        out = _interpolate(x if uint8_on_cpu else x.to(real), size, mode=mode, antialias=True)
    if x.dtype == torch.uint8 and out.is_floating_point():
        out = _to_levels(out)
    return out.to(x.dtype)


def low_pass(x: torch.Tensor, radius: float) -> torch.Tensor:
    """Keep the disc of the shifted spectrum around zero frequency; the size is unchanged (ICCV 2023, Fig. 2).

    Args:
        x: float images (..., H, W).
        radius: of the disc, in DFT steps (cycles per image side): kept are the frequencies (k, l) with
            k^2 + l^2 <= radius^2. 0 keeps the mean alone; hypot(H, W) / 2 keeps everything.
    Returns:
        (..., H, W) in x's dtype; computed in float32 at least.
    Raises:
        ValueError: x is not a float tensor of at least two dimensions, or the radius is negative or not a number.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    >>> low_pass(x, 0)
    tensor([[3., 3.],
            [3., 3.]])
    """
    return _disc_filter(x, radius, keep_inside=True)


def high_pass(x: torch.Tensor, radius: float) -> torch.Tensor:
    """What `low_pass` removes: the frequencies with k^2 + l^2 > radius^2 (ICCV 2023, Table 1); low + high = x.

    >>> high_pass(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 0)
    tensor([[-2., -1.],
            [ 0.,  3.]])
    """
    return _disc_filter(x, radius, keep_inside=False)


class _FourierAxis(NamedTuple):
    """The crop along one axis: Re T in one part or two (see `_fourier_axis`), and Im T = sign nyquist'."""

    matrices: tuple[torch.Tensor, ...]
    nyquist: torch.Tensor
    sign: torch.Tensor


@lru_cache(maxsize=64)
def _fourier_axis(length: int, size: int, dtype: torch.dtype, device: torch.device) -> _FourierAxis:
    """Matrices of the crop from `length` to `size` pixels along one axis, computed in float64.

    T[x, u] = 1/length sum_k exp(2 pi i k (x/size - u/length)) over the kept frequencies k. Those but -size/2 come in
    pairs, whose imaginary parts cancel: Im T[x, u] = (-1)^x q[u] with q[u] = sin(pi size u / length) / length, and
    none for odd sizes.
    If both numbers are even, half a turn of u or x multiplies the terms of even k by 1 and those of odd k by -1. So
    each parity needs a matrix of half the rows and columns only, applied to the sum (even k) or the difference (odd k)
    of the image's halves: half the multiplications.
    """
    parts = 2 if length % 2 == 0 and size % 2 == 0 else 1
    with torch.inference_mode(False), torch.no_grad():  # else a crop under inference_mode would poison later training
        u = torch.arange(length, dtype=torch.float64, device="cpu") / length
        x = torch.arange(size, dtype=torch.float64, device="cpu") / size
        k = torch.arange(-(size // 2), (size + 1) // 2, dtype=torch.float64, device="cpu")
        terms = torch.cos(2 * math.pi * (x[: size // parts, None, None] - u[: length // parts, None]) * k) / length
        matrices = tuple(terms[..., k % parts == part].sum(dim=-1).to(dtype).to(device) for part in range(parts))
        nyquist = torch.sin(math.pi * size * u) / length * (size % 2 == 0)
        sign = 1 - 2 * (torch.arange(size, device="cpu") % 2)
        return _FourierAxis(matrices, nyquist.to(dtype).to(device), sign.to(dtype).to(device))


def _apply_axes(images: torch.Tensor, rows: _FourierAxis, columns: _FourierAxis) -> torch.Tensor:
    """Re(T_h X T_w') = Re T_h X Re T_w' - Im T_h X Im T_w' for images X (N, H, W)."""
    folded = _fold(images, len(rows.matrices), dim=-2)
    out = _unfold([matrix @ part for matrix, part in zip(rows.matrices, folded)], dim=-2)
    halves = _fold(out, len(columns.matrices), dim=-1)
    out = _unfold([part @ matrix.T for matrix, part in zip(columns.matrices, halves)], dim=-1)
    size = out.shape[-1]
    if size % 2 == 0:
        part = folded[size // 2 % len(folded)]  # the parity of the frequency -size / 2
        strength = part @ columns.nyquist @ rows.nyquist[: part.shape[-2]]
        out = torch.addcmul(out, strength[:, None, None], torch.outer(rows.sign, columns.sign), value=-1)
    return out


def _fold(x: torch.Tensor, parts: int, dim: int) -> list[torch.Tensor]:
    """What the even and the odd frequencies see of x: sum and difference of its halves; x itself in one part."""
    if parts == 1:
        return [x]
    first, second = x.chunk(2, dim)
    return [first + second, first - second]


def _unfold(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """From the even and the odd frequencies' contribution to the first half of the pixels, all pixels."""
    if len(parts) == 1:
        return parts[0]
    even, odd = parts
    return torch.cat((even + odd, even - odd), dim)


@lru_cache(maxsize=64)
def _lanczos_matrix(length: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(size, length) weights of the Lanczos-3 filter stretched by length / size, pixel centres, rows summing to one."""
    with torch.inference_mode(False), torch.no_grad():
        pixel = torch.arange(length, dtype=torch.float64, device="cpu") + 0.5
        target = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * (length / size)
        distance = (pixel[None, :] - target[:, None]) / (length / size)
        weight = torch.where(distance.abs() < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0.0)
        return (weight / weight.sum(dim=1, keepdim=True)).to(dtype).to(device)


def _lanczos(x: torch.Tensor, size: int) -> torch.Tensor:
    """Lanczos as two matrix products, in float: any device, precision and torch version."""
    real = torch.promote_types(x.dtype, torch.float32)
    rows = _lanczos_matrix(x.shape[-2], size, real, x.device)
    columns = _lanczos_matrix(x.shape[-1], size, real, x.device)
    with _full_precision(x.device.type):
        out = x.to(real) @ columns.T
        if x.dtype == torch.uint8:  # PIL holds 8 bits between the passes; without that it differs by tens of levels
            out = _to_levels(out)
        return rows @ out


@lru_cache(maxsize=1)
def _torch_has_lanczos() -> bool:
    """Whether this torch resizes uint8 by Lanczos on the CPU (2.14 does), three times as fast there as `_lanczos`."""
    try:
        F.interpolate(torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device="cpu"), (1, 1), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError, RuntimeError):
        return False
    return True


def _interpolate(x: torch.Tensor, size: int, **kwargs) -> torch.Tensor:
    """`F.interpolate` for any number of leading dimensions."""
    images = x.reshape(-1, *x.shape[-3:]) if x.dim() > 3 else x.reshape(1, -1, *x.shape[-2:])
    out = F.interpolate(images, (size, size), **kwargs)
    return out.reshape(*x.shape[:-2], size, size)


def _disc_filter(x: torch.Tensor, radius: float, keep_inside: bool) -> torch.Tensor:
    _check_images(x)
    if not x.is_floating_point():
        raise ValueError(f"the disc filters take float images, got {x.dtype}: convert them first")
    if not radius >= 0:
        raise ValueError(f"the radius of a disc filter must be 0 or more, got {radius}")
    height, width = x.shape[-2:]
    real = torch.promote_types(x.dtype, torch.float32)
    rows = torch.fft.fftfreq(height, 1 / height, dtype=real, device=x.device)
    columns = torch.fft.rfftfreq(width, 1 / width, dtype=real, device=x.device)
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= radius**2
    spectrum = torch.fft.rfft2(x.to(real)) * (inside if keep_inside else ~inside)
    return torch.fft.irfft2(spectrum, s=(height, width)).to(x.dtype)


def _to_levels(x: torch.Tensor) -> torch.Tensor:
    return x.round().clamp(0, 255)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """No autocast, and no TF32 products on CUDA, whatever the caller allows for its model."""
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        if device_type != "cuda":
            yield
            return
        try:  # torch refuses a mixture of its two ways to say it: the one that the caller used is used here too
            allowed, write, ieee = torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, "highest"
        except RuntimeError:
            products = torch.backends.cuda.matmul
            allowed, write, ieee = products.fp32_precision, partial(setattr, products, "fp32_precision"), "ieee"
        write(ieee)
        try:
            yield
        finally:
            write(allowed)


def _check_images(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"expected images as a tensor (..., H, W), got {got}")


def _check_size(size: int, height: int, width: int) -> int:
    if not isinstance(size, Integral) or not 1 <= size <= min(height, width):
        raise ValueError(
            f"size {size!r} is not possible for images of {height}x{width}: "
            f"choose a whole number from 1 to {min(height, width)} (these operators only reduce)"
        )
    return int(size)
