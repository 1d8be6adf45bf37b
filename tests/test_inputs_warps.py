"""The array operations against PIL's, one by one, and what the fast pipeline keeps and loses."""

import io
import random

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from curriculum.augment import RandAugment, arguments
from inputs import transforms
from inputs.decode import BadImage, decode, decode_reduced, jpeg_size
from inputs.transforms import TrainTransform
from inputs.warps import COLOURS, WARPS, apply_operations

FILL = (124, 116, 104)
# Largest mean absolute difference to PIL (levels of 255) at these small sizes, where the edge weighs more than at 224.
BOUNDS = {"Rotate": 1.4, "ShearX": 0.9, "ShearY": 0.9}
EQUAL = {
    "AutoContrast",
    "Equalize",
    "Invert",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "BrightnessIncreasing",
}


@pytest.fixture(scope="module")
def images():
    photos = [np.array(Image.fromarray(getattr(skimage.data, n)()).resize((128, 96))) for n in ("astronaut", "chelsea")]
    noise = np.random.default_rng(0).integers(0, 256, (33, 65, 3), dtype=np.uint8)
    one_level = np.full((20, 30, 3), 7, dtype=np.uint8)
    return [*photos, noise, one_level, noise[:1, :1].copy(), noise[:2, :5].copy()]


@pytest.mark.parametrize("name", RandAugment().names)
def test_operation_equals_pils(name, images):
    augment, rng = RandAugment(fill=FILL), random.Random(name)
    for k in range(12):
        args = arguments(name, (0.0, 10.0)[k] if k < 2 else rng.uniform(0, 10), rng)
        for image in images:
            before = image.copy()
            ours = apply_operations(image, [(name, args)], FILL).astype(int)
            assert np.array_equal(image, before) and ours.shape == image.shape
            off = np.abs(ours - np.asarray(augment.apply(Image.fromarray(image), [(name, args)])))
            if name in EQUAL:
                assert off.max() == 0, args
            elif name not in BOUNDS:
                assert off.max() <= 1 and off.mean() < 0.2, args
            elif image.shape == (96, 128, 3):
                assert off.mean() < BOUNDS[name], args


def test_every_operation_of_timm_is_there():
    assert set(RandAugment().names) <= set(COLOURS) | set(WARPS)


def test_operations_are_applied_in_order(images):
    ops = [("SolarizeAdd", (100,)), ("Invert", ()), ("TranslateXRel", (0.25,))]
    expected = np.asarray(RandAugment(fill=FILL).apply(Image.fromarray(images[0]), ops))
    assert np.array_equal(apply_operations(images[0], ops, FILL), expected)
    assert not np.array_equal(apply_operations(images[0], ops[1::-1] + ops[2:], FILL), expected)


# ------------------------------------------------------------------------------------------------------ fast pipeline


def jpeg(name, size, **options):
    file = io.BytesIO()
    Image.fromarray(getattr(skimage.data, name)()).resize(size).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def difference(a, b):
    return (a.int() - b.int()).abs().float().mean().item()


def test_fast_keeps_the_random_choices_and_most_of_the_pixels():
    contents = [jpeg("astronaut", (500, 480)), jpeg("chelsea", (451, 300)), jpeg("coffee", (600, 400))]
    exact, fast = (TrainTransform(224, "lanczos", RandAugment(), pipeline=name) for name in ("exact", "fast"))
    for size, bound in ((64, 5), (96, 5), (160, 3), (224, 0.01)):
        pairs = [(exact(c, size, 9.0, s), fast(c, size, 9.0, s)) for c in contents for s in range(8)]
        assert np.mean([difference(a, b) for a, b in pairs]) < bound
        # Were the crop, the flip or an operation another, the images would have little in common.
        if size > 64:
            assert max(difference(a, b) for a, b in pairs) < 20
    other = [(exact(c, 96, 9.0, s), fast(c, 96, 9.0, s + 1)) for c in contents for s in range(8)]
    assert np.mean([difference(a, b) for a, b in other]) > 30


def test_fast_reads_small_and_stays_repeatable(monkeypatch):
    steps = []
    original = transforms.decode_reduced
    monkeypatch.setattr(transforms, "decode_reduced", lambda data, step: steps.append(step) or original(data, step))
    content = jpeg("astronaut", (1600, 1200))
    fast = TrainTransform(224, "lanczos", RandAugment(), pipeline="fast")
    first = [fast(content, 96, 9.0, seed) for seed in range(30)]
    assert set(steps) >= {2, 4} and set(steps) <= {1, 2, 4, 8}
    assert all(torch.equal(a, fast(content, 96, 9.0, seed)) for seed, a in enumerate(first))


def test_fast_under_fourier_stays_at_the_base_size():
    fast = TrainTransform(224, "fourier", RandAugment(), pipeline="fast")
    exact = TrainTransform(224, "fourier", RandAugment())
    content = jpeg("astronaut", (400, 400))
    assert torch.equal(fast(content, 96, 9.0, 1), exact(content, 96, 9.0, 1))  # too small to be decoded reduced


@pytest.mark.parametrize("step", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(333, 217), (16, 16), (7, 3), (1, 1)])
def test_reduced_decoding(size, step):
    for options in ({}, {"subsampling": 0}, {"progressive": True}):
        content = jpeg("coffee", size, **options)
        reduced = decode_reduced(content, step)
        assert reduced.shape == (-(-size[1] // step), -(-size[0] // step), 3) and reduced.dtype == np.uint8
        if min(size) > 100:
            # Pixel k covers step k ... step (k + 1) of the full picture, also the last one, which may reach beyond it.
            rest = [(0, -length % step) for length in (size[1], size[0])]
            whole = np.pad(decode(content).astype(float), (*rest, (0, 0)), mode="edge")
            expected = whole.reshape(reduced.shape[0], step, reduced.shape[1], step, 3).mean((1, 3))
            assert np.abs(reduced.astype(int) - expected).mean() < 3


def test_fast_falls_back_for_what_is_no_plain_jpeg():
    fast = TrainTransform(64, "lanczos", None, pipeline="fast")
    image = Image.fromarray(skimage.data.astronaut())
    for kind, mode in (("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L")):
        file = io.BytesIO()
        image.convert(mode).save(file, kind)
        assert (jpeg_size(file.getvalue()) is None) == (kind != "JPEG" or mode == "CMYK")
        assert fast(file.getvalue(), 48, None, 3).shape == (3, 48, 48)
    assert fast(image, 48, None, 3).shape == (3, 48, 48)
    with pytest.raises(BadImage):
        fast(jpeg("coffee", (300, 200))[:3000], 48, None, 3)
