"""Decoding and transforms against PIL, torchvision and timm at the same random parameters."""

import io
import random

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from curriculum.augment import RandAugment
from inputs.decode import decode
from inputs.transforms import EvalTransform, TrainTransform, collate, crop_box

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
LIMIT = 0.25  # mean absolute difference, of 255


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos():
    """JPEG content of photographs at sizes like ImageNet's."""
    contents = []
    for k, name in enumerate(NAMES):
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        image.thumbnail((500, 500) if k % 2 else (375, 420))
        contents.append(encode(image, quality=92, subsampling=2 * (k % 2)))
    return contents


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(content, transform, size, magnitude, seed):
    """The papers' order, operation by operation, on PIL images, at the parameters that `transform` draws."""
    rng = random.Random(seed)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    top, left, height, width = crop_box(image.height, image.width, transform.scale, transform.ratio, rng)
    base = (transform.base_size, transform.base_size)
    image = tvf.resized_crop(image, top, left, height, width, base, tv.InterpolationMode.BICUBIC)
    if rng.random() < transform.flip:
        image = tvf.hflip(image)
    operations = transform.draw_operations(magnitude, rng)
    image = (transform.randaugment or RandAugment()).apply(image, operations)
    kinds = {"lanczos": Image.LANCZOS, "bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}
    if transform.operator in kinds and size != transform.base_size:
        image = image.resize((size, size), kinds[transform.operator])
    return np.asarray(image)


def pixels(tensor):
    return tensor.permute(1, 2, 0).numpy()


def difference(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).mean()


# ---------------------------------------------------------------------------------------------------------- decoding


def test_every_mode_equals_pil(photos):
    photo = Image.open(io.BytesIO(photos[0])).convert("RGB").crop((0, 0, 131, 97))
    alpha = photo.copy()
    alpha.putalpha(photo.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {
        **{f"jpeg {s} {p}": encode(photo, subsampling=s, progressive=p) for s in (0, 1, 2) for p in (False, True)},
        "jpeg 4:1:1": encode(photo, subsampling="4:1:1"),
        "jpeg grey": encode(photo.convert("L")),
        "jpeg CMYK": encode(photo.convert("CMYK")),
        "jpeg RGB": encode(photo, keep_rgb=True),
        "jpeg rotated": encode(photo, exif=exif.tobytes()),
        "jpeg broken EXIF": encode(photo, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\xff"),
        "jpeg and rest": encode(photo) + b"trailing bytes",
        "jpeg one pixel": encode(photo.crop((0, 0, 1, 1))),
        "png": encode(photo, "PNG"),
        "png grey": encode(photo.convert("L"), "PNG"),
        "png grey alpha": encode(alpha.convert("LA"), "PNG"),
        "png one bit": encode(photo.convert("1"), "PNG"),
        "png palette": encode(photo.quantize(), "PNG"),
        "png palette transparent": encode(photo.quantize(), "PNG", transparency=3),
        "png alpha": encode(alpha, "PNG"),
        "gif": encode(photo, "GIF"),
        "webp": encode(photo, "WEBP"),
        "tiff": encode(photo, "TIFF"),
        "tiff CMYK": encode(photo.convert("CMYK"), "TIFF"),
        "bmp": encode(photo, "BMP"),
        "ppm": encode(photo, "PPM"),
    }
    for name, content in contents.items():
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        result = decode(content)
        assert result.dtype == np.uint8 and result.flags.c_contiguous and result.flags.writeable, name
        assert np.array_equal(result, expected), name


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:20],
        lambda data: b"not an image at all" * 50,
        lambda data: b"\xff\xd8\xff" + bytes(500),
        lambda data: encode(Image.open(io.BytesIO(data)), "PNG")[:9000],
    ],
)
def test_broken_content_is_refused(spoil, photos):
    with pytest.raises(ValueError, match="cannot decode"):
        decode(spoil(photos[0]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bomb_is_refused(kind, monkeypatch):
    content = encode(Image.new("RGB", (300, 300)), kind)
    assert decode(content).shape == (300, 300, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40000)  # twice this is the limit
    with pytest.raises(ValueError, match="decompression bomb"):
        decode(content)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("size", [96, 160, 224])
@pytest.mark.parametrize("operator", ["lanczos", "fourier", "bicubic", "bilinear"])
def test_training_pixels_equal_the_reference_order(photos, size, operator):
    transform = TrainTransform(224, operator, RandAugment())
    differences = []
    for k, content in enumerate(photos * 3):
        result = transform(content, size, 9.0, seed=1000 + k)
        side = 224 if operator == "fourier" else size
        assert result.dtype == torch.uint8 and result.shape == (3, side, side)
        differences.append(difference(pixels(result), reference(content, transform, size, 9.0, 1000 + k)))
    assert np.mean(differences) <= LIMIT, differences


def test_without_randaugment_pixels_are_within_rounding(photos):
    transform = TrainTransform(224, "lanczos", None)
    for k, content in enumerate(photos):
        expected = reference(content, transform, 96, None, k)
        assert np.abs(pixels(transform(content, 96, None, k)).astype(int) - expected).max() <= 3
        assert difference(pixels(transform(content, 96, None, k)), expected) < 0.05


def test_magnitude_none_switches_randaugment_off(photos):
    on, off = TrainTransform(64, "lanczos", RandAugment(prob=1.0)), TrainTransform(64, "lanczos", None)
    assert torch.equal(on(photos[0], 48, None, 3), off(photos[0], 48, 5.0, 3))
    assert not torch.equal(on(photos[0], 48, 5.0, 3), off(photos[0], 48, 5.0, 3))


def test_colour_jitter_equals_torchvision(photos):
    transform = TrainTransform(64, "lanczos", None, color_jitter=0.4)
    functions = {
        "Brightness": tvf.adjust_brightness,
        "Contrast": tvf.adjust_contrast,
        "Color": tvf.adjust_saturation,
    }
    plain = TrainTransform(64, "lanczos", None)
    orders = set()
    for seed in range(12):
        rng = random.Random(seed)
        crop_box(*decode(photos[0]).shape[:2], transform.scale, transform.ratio, rng)
        rng.random()
        operations = transform.draw_operations(None, rng)
        image = Image.fromarray(pixels(plain(photos[0], 64, None, seed)))
        for name, (factor,) in operations:
            assert 0.6 <= factor <= 1.4
            image = functions[name](image, factor)
        orders.add(tuple(name for name, _ in operations))
        assert difference(pixels(transform(photos[0], 64, None, seed)), np.asarray(image)) <= LIMIT
    assert len(orders) > 1


def test_same_seed_same_pixels_and_no_global_generator(photos):
    transform = TrainTransform(128, "lanczos", RandAugment(), color_jitter=0.2)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = [transform(content, 96, 9.0, seed) for seed, content in enumerate(photos)]
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1]) and torch.equal(torch.get_rng_state(), states[2])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    again = [transform(content, 96, 9.0, seed) for seed, content in enumerate(photos)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], transform(photos[0], 96, 9.0, 77))


def test_content_and_pil_image_give_the_same(photos):
    transform = TrainTransform(64, "lanczos", RandAugment())
    image = Image.open(io.BytesIO(photos[1]))
    assert torch.equal(transform(photos[1], 48, 9.0, 5), transform(image, 48, 9.0, 5))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_torchs_in_another_memory_format(photos, workers):
    transform = TrainTransform(64, "lanczos", RandAugment())
    samples = [(transform(content, 48, 9.0, k), k, torch.full((3,), float(k))) for k, content in enumerate(photos)]
    loader = torch.utils.data.DataLoader(samples, batch_size=4, num_workers=workers, collate_fn=collate)
    batch, expected = next(iter(loader)), torch.utils.data.default_collate(samples)
    assert len(batch) == len(expected) and all(torch.equal(a, b) for a, b in zip(batch, expected))
    assert batch[0].is_contiguous(memory_format=torch.channels_last)


def test_crop_box_has_torchvisions_distribution():
    for height, width in ((375, 500), (200, 900), (64, 64)):
        rng = random.Random(0)
        torch.manual_seed(0)
        image = torch.empty(1, height, width)
        ours = np.array([crop_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(4000)])
        theirs = np.array([tv.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
        assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
        for column in range(4):  # Kolmogorov-Smirnov, two samples; 2.3 is passed by chance once in 40,000
            grid = np.arange(max(height, width) + 1)
            cdf = [np.searchsorted(np.sort(v[:, column]), grid, side="right") / 4000 for v in (ours, theirs)]
            assert np.abs(cdf[0] - cdf[1]).max() < 2.3 * np.sqrt(2 / 4000)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 2)])
def test_tiny_and_thin_images(size):
    content = encode(Image.new("RGB", size, (10, 200, 30)), "PNG")
    for operator in ("lanczos", "fourier"):
        transform = TrainTransform(64, operator, RandAugment())
        for seed in range(20):
            assert transform(content, 32, 9.0, seed).shape[-1] == (64 if operator == "fourier" else 32)
        assert EvalTransform(64, 32, operator)(content).shape[-1] == (64 if operator == "fourier" else 32)


# --------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("base", [64, 224])
def test_evaluation_equals_timms_transform(photos, base):
    theirs = create_transform(base, interpolation="bicubic", crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1))
    ours = EvalTransform(base, base, "lanczos")
    for content in photos:
        expected = theirs(Image.open(io.BytesIO(content)).convert("RGB")) * 255
        assert (ours(content).float() - expected).abs().max() <= 2
        assert (ours(content).float() - expected).abs().mean() < 0.05


def test_evaluation_reduces_by_the_training_operator(photos):
    full = EvalTransform(224, 224, "lanczos")(photos[0])
    expected = Image.fromarray(pixels(full)).resize((96, 96), Image.LANCZOS)
    assert difference(pixels(EvalTransform(224, 96, "lanczos")(photos[0])), np.asarray(expected)) < 0.1
    assert torch.equal(EvalTransform(224, 96, "fourier")(photos[0]), full)


def test_evaluation_squashes_from_384(photos):
    expected = Image.open(io.BytesIO(photos[1])).convert("RGB").resize((384, 384), Image.BICUBIC)
    result = EvalTransform(384, 384, "lanczos")(photos[1])
    assert difference(pixels(result), np.asarray(expected)) < 0.05


# ---------------------------------------------------------------------------------------------------------- bad input


def test_sizes_outside_the_range_are_refused(photos):
    with pytest.raises(ValueError, match="base size, 64"):
        TrainTransform(64, "lanczos", None)(photos[0], 96, None, 0)
    with pytest.raises(ValueError, match="base size, 64"):
        EvalTransform(64, 96, "lanczos")
