"""Low-frequency operators against golden numbers, a direct DFT, numpy's FFT and PIL."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from curriculum import downsample, high_pass, low_frequency_crop, low_pass, operators

GOLDEN = json.loads((Path(__file__).parent / "golden" / "freq_crop.json").read_text())


def golden_input() -> torch.Tensor:
    i = torch.arange(16, dtype=torch.float64)[:, None]
    j = torch.arange(16, dtype=torch.float64)[None, :]
    return torch.sin(0.37 * i + 0.11 * j**2) + 0.5 * torch.cos(1.3 * j - 0.05 * i**2)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kept_frequencies(size: int) -> np.ndarray:
    return np.arange(-(size // 2), (size + 1) // 2)


def crop_by_dft(image: np.ndarray, size: int) -> np.ndarray:
    """The definition written out: every kept coefficient by its sum, every output pixel by its sum."""
    height, width = image.shape
    k = kept_frequencies(size)
    to_rows = np.exp(-2j * np.pi * np.outer(k, np.arange(height)) / height)
    to_columns = np.exp(-2j * np.pi * np.outer(k, np.arange(width)) / width)
    block = to_rows @ image @ to_columns.T * (size / height) * (size / width)
    back = np.exp(2j * np.pi * np.outer(np.arange(size), k) / size)
    return (back @ block @ back.T).real / size**2


@pytest.mark.parametrize("size", [8, 10, 12])
def test_crop_equals_the_release_at_even_sizes(size):
    expected = torch.tensor(GOLDEN["outputs"][str(size)], dtype=torch.float64)
    x = golden_input()
    assert (low_frequency_crop(x, size) - expected).abs().max() < 1e-9
    assert (low_frequency_crop(x.float(), size) - expected).abs().max() < 1e-6
    axis = operators._fourier_axis(16, size, torch.float64, x.device)
    no_axis = axis._replace(nyquist=torch.zeros_like(axis.nyquist))
    wrong = operators._apply_axes(x[None], no_axis, no_axis)[0]
    assert (wrong - expected).abs().max() > 1e-4


SQUARE = ["16x16:9", "16x16:11", "16x16:2", "15x15:8", "15x15:7", "9x9:1"]
RECTANGULAR = ["16x32:8", "31x18:9", "12x20:12", "20x12:12", "24x17:16", "17x24:17"]


@pytest.mark.parametrize("case", SQUARE + RECTANGULAR)
def test_crop_equals_the_direct_dft(case):
    height, width, size = map(int, re.split("[x:]", case))
    x = random_images(2, 3, height, width)
    out = low_frequency_crop(x, size)
    assert out.shape == (2, 3, size, size)
    for image, result in zip(x.reshape(-1, height, width), out.reshape(-1, size, size)):
        np.testing.assert_allclose(result.numpy(), crop_by_dft(image.numpy(), size), atol=1e-12)
    torch.testing.assert_close(out.mean((-2, -1)), x.mean((-2, -1)))  # the release halved it for 16 x 32


def test_odd_sizes_keep_a_symmetric_block_and_need_no_real_part():
    x, size = random_images(20, 20).numpy(), 9
    k = kept_frequencies(size)
    block = np.fft.fft2(x)[np.ix_(k % 20, k % 20)] * (size / 20) ** 2
    inverse = np.fft.ifft2(np.fft.ifftshift(block))
    assert np.abs(inverse.imag).max() < 1e-12
    np.testing.assert_allclose(low_frequency_crop(torch.from_numpy(x), size).numpy(), inverse.real, atol=1e-12)


@pytest.mark.parametrize("size", [24, 15])
def test_crop_sees_the_low_band_alone_and_keeps_it_whole(size):
    """Proposition 1 of the ICCV paper: lossless on the band, blind outside it; interpolation mixes the outside in."""
    length = 48
    x = random_images(length, length, seed=1)
    k = torch.fft.fftfreq(length, 1 / length)
    outside = torch.maximum(k.abs()[:, None], k.abs()[None, :]) > size / 2
    content = torch.fft.ifft2(torch.fft.fft2(random_images(length, length, seed=2)) * outside).real
    assert content.std() > 0.5
    torch.testing.assert_close(low_frequency_crop(x + content, size), low_frequency_crop(x, size), atol=1e-12, rtol=0)
    for mode in ("bicubic", "lanczos"):
        changed = downsample((x + content)[None], size, mode) - downsample(x[None], size, mode)
        assert changed.abs().max() > 1e-2

    inner = (size - 1) // 2  # everything below Nyquist comes back
    index = np.arange(-inner, inner + 1)
    before = torch.fft.fft2(x).numpy()[np.ix_(index % length, index % length)]
    after = torch.fft.fft2(low_frequency_crop(x, size)).numpy()[np.ix_(index % size, index % size)]
    np.testing.assert_allclose(after, before * (size / length) ** 2, atol=1e-10)


def test_crop_at_the_full_size_is_the_identity():
    x = random_images(1, 3, 14, 14)
    assert low_frequency_crop(x, 14) is x
    wide = random_images(14, 30)
    assert low_frequency_crop(wide, 14).shape == (14, 14)


def test_crop_is_linear_in_any_layout_and_passes_gradients():
    x = random_images(2, 3, 20, 20)
    out = low_frequency_crop(x, 12)
    torch.testing.assert_close(low_frequency_crop(x.to(memory_format=torch.channels_last), 12), out)
    torch.testing.assert_close(low_frequency_crop(x[0, 0], 12), out[0, 0])
    torch.testing.assert_close(low_frequency_crop(2 * x + x.flip(0), 12), 2 * out + out.flip(0))
    assert low_frequency_crop(x[:0], 12).shape == (0, 3, 12, 12)
    assert torch.autograd.gradcheck(lambda t: low_frequency_crop(t, 4), random_images(6, 7).requires_grad_())


def test_crop_keeps_float32_under_autocast_and_computes_half_precision_in_float32():
    x = random_images(2, 3, 32, 32).float()
    expected = low_frequency_crop(x, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.mT).dtype == torch.bfloat16  # autocast is on
        out = low_frequency_crop(x, 16)
        assert (x @ x.mT).dtype == torch.bfloat16  # and still on
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    half = low_frequency_crop(x.bfloat16(), 16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, low_frequency_crop(x.bfloat16().float(), 16).bfloat16())


def test_a_crop_in_inference_mode_leaves_later_gradients_alone():
    operators._fourier_axis.cache_clear()
    with torch.inference_mode():
        low_frequency_crop(torch.randn(18, 18), 6)
    x = torch.randn(18, 18, requires_grad=True)
    low_frequency_crop(x, 6).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("size", [17, 0, -4, 8.0, "8", None])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"size .* is not possible for images of 16x20: .* 1 to 16"):
        low_frequency_crop(torch.zeros(3, 16, 20), size)
    with pytest.raises(ValueError, match=r"is not possible for images of 16x20"):
        downsample(torch.zeros(3, 16, 20), size, "lanczos")


def test_what_is_no_batch_of_float_images_is_refused():
    with pytest.raises(ValueError, match=r"float images, got torch\.uint8: convert"):
        low_frequency_crop(torch.zeros(16, 16, dtype=torch.uint8), 8)
    for nothing in (torch.zeros(16), np.zeros((16, 16)), None):
        with pytest.raises(ValueError, match="expected images as a tensor"):
            low_frequency_crop(nothing, 8)
    with pytest.raises(ValueError, match="mode 'lancos' is not known; choose one of fourier, lanczos"):
        downsample(torch.zeros(3, 16, 16), 8, "lancos")
    with pytest.raises(ValueError, match=r"float or uint8 images, got torch\.int64"):
        downsample(torch.zeros(3, 16, 16, dtype=torch.int64), 8, "lanczos")


# --- downsample


def pil_images() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    noise = rng.integers(0, 2, (70, 90, 3), dtype=np.uint8) * 255  # overshoots at every pixel
    return {"smooth": blobs.resize((90, 70), Image.BICUBIC), "noise": Image.fromarray(noise)}


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


PIL_FILTERS = {"lanczos": Image.LANCZOS, "bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR, "nearest": Image.NEAREST}


@pytest.mark.parametrize("size", [32, 45, 70])
@pytest.mark.parametrize(("mode", "own_lanczos"), [(mode, False) for mode in PIL_FILTERS] + [("lanczos", True)])
def test_resizing_equals_pil_on_uint8(mode, own_lanczos, size, monkeypatch):
    if own_lanczos:
        monkeypatch.setattr(operators, "_torch_has_lanczos", lambda: False)
    for name, image in pil_images().items():
        expected = as_tensor(image.resize((size, size), PIL_FILTERS[mode])).int()
        out = downsample(as_tensor(image), size, mode)
        assert out.dtype == torch.uint8
        difference = (out.int() - expected).abs()
        assert difference.max() <= 1, f"{name}: {difference.max()} levels"
        assert difference.float().mean() < 0.05


@pytest.mark.parametrize("mode", PIL_FILTERS)
def test_resizing_floats_equals_pil_on_floats(mode):
    image = Image.fromarray(random_images(70, 90).float().numpy())
    expected = np.asarray(image.resize((32, 32), PIL_FILTERS[mode]))
    out = downsample(torch.from_numpy(np.array(image))[None], 32, mode)
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", operators.OPERATORS)
def test_every_mode_takes_every_shape_and_type(mode):
    x = (random_images(2, 4, 3, 20, 26).sigmoid() * 255).float()
    out = downsample(x, 12, mode)
    assert out.shape == (2, 4, 3, 12, 12)
    torch.testing.assert_close(downsample(x[1, 2], 12, mode), out[1, 2])
    torch.testing.assert_close(downsample(x.double(), 12, mode).float(), out)
    for half in (torch.bfloat16, torch.float16):
        assert downsample(x.to(half), 12, mode).dtype == half
    whole = x.round().to(torch.uint8)
    difference = downsample(whole, 12, mode).float() - downsample(whole.float(), 12, mode).clamp(0, 255)
    assert difference.abs().max() <= 2
    square = x[..., :20]
    assert downsample(square, 20, mode) is square


def test_fourier_mode_is_the_crop_and_cuts_uint8_at_its_limits():
    x = random_images(3, 16, 16)
    assert torch.equal(downsample(x, 8, "fourier"), low_frequency_crop(x, 8))
    stripes = (torch.arange(16) % 8 < 4).to(torch.uint8).mul(255).expand(1, 16, 16)
    exact = low_frequency_crop(stripes.double(), 8)
    assert exact.max() > 256
    assert exact.min() < -1
    torch.testing.assert_close(downsample(stripes, 8, "fourier"), exact.round().clamp(0, 255).to(torch.uint8))


# --- disc filters


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 15), (12, 21)])
@pytest.mark.parametrize("radius", [0, 3, 5.5, 8])
def test_disc_filters_equal_numpys_shifted_spectrum(height, width, radius):
    x = random_images(2, height, width)
    rows, columns = np.meshgrid(np.arange(height) - height // 2, np.arange(width) - width // 2, indexing="ij")
    disc = rows**2 + columns**2 <= radius**2
    spectrum = np.fft.fftshift(np.fft.fft2(x.numpy()), axes=(-2, -1))
    for function, mask in ((low_pass, disc), (high_pass, ~disc)):
        expected = np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1))).real
        np.testing.assert_allclose(function(x, radius).numpy(), expected, atol=1e-12)
    torch.testing.assert_close(low_pass(x, radius) + high_pass(x, radius), x)


def test_disc_filter_limits_and_refusals():
    x = random_images(3, 16, 16)
    torch.testing.assert_close(low_pass(x, 0), x.mean((-2, -1), keepdim=True).expand_as(x))
    torch.testing.assert_close(low_pass(x, 12), x)  # hypot(8, 8) = 11.3
    assert high_pass(x, 12).abs().max() < 1e-12
    assert low_pass(x.bfloat16(), 4).dtype == torch.bfloat16
    for radius in (-1, float("nan")):
        with pytest.raises(ValueError, match="radius of a disc filter must be 0 or more"):
            low_pass(x, radius)
    with pytest.raises(ValueError, match=r"float images, got torch\.uint8"):
        high_pass(x.to(torch.uint8), 4)
