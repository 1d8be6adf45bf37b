"""RandAugment on the device against the host's operations: same choices, same pixels within the stated tolerance."""

import io
import random

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.utils.data import default_collate

from curriculum.augment import RandAugment, arguments
from curriculum.device_augment import DeviceAugment, DeviceRandAugment, encode
from inputs.device import DeviceTransform
from inputs.transforms import TrainTransform, as_batch
from inputs.warps import WARPS, apply_operations

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SIDE = 112


@pytest.fixture(scope="module")
def photos():
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [Image.fromarray(getattr(skimage.data, name)()).resize((SIDE, SIDE)) for name in names]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RandAugment().names)
def test_each_operation_equals_the_hosts(name, device, photos):
    augment = DeviceAugment("lanczos", RandAugment().fill)
    arrays = [np.array(photo) for photo in photos] * 4
    rng = random.Random(name)
    operations = [(name, arguments(name, rng.uniform(0, 10), rng)) for _ in arrays]
    choices = default_collate([torch.from_numpy(encode(False, [op], 2)) for op in operations])
    images = torch.cat([as_batch(array) for array in arrays]).to(device)
    result = augment(images, choices, SIDE).cpu().permute(0, 2, 3, 1).numpy().astype(int)
    for array, op, ours in zip(arrays, operations, result):
        expected = apply_operations(array, [op], RandAugment().fill)
        off = np.abs(ours - expected)
        if name in ("Rotate", "ShearX", "ShearY"):
            assert off.mean() < 0.7, op  # the edge: the host blends with the fill colour there, and OpenCV 4.9 rounds
        elif name in WARPS:
            assert off.mean() < 1, op  # the host has PIL's kernel here, a = -1, the device a = -0.75
        else:
            assert off.max() <= 1 and off.mean() < 0.05, op


@pytest.mark.parametrize("device", DEVICES)
def test_alone_it_draws_what_single_images_get(device, photos):
    """Against timm's operations on PIL images, drawn by a generator of the same seed."""
    batch = torch.cat([as_batch(np.array(photo)) for photo in photos * 4])
    ours = DeviceRandAugment()(batch.to(device), 9.0, random.Random(3)).cpu()
    rng, single = random.Random(3), RandAugment()
    expected = torch.cat([as_batch(np.array(single(photo, 9.0, rng))) for photo in photos * 4])
    off = (ours.int() - expected.int()).abs().float()
    assert off.mean() < 1 and off.mean((1, 2, 3)).median() < 0.25
    assert (batch.int() - expected.int()).abs().float().mean() > 10  # something was done
    other = DeviceRandAugment()(batch.to(device), 9.0, random.Random(4)).cpu()
    assert (other.int() - expected.int()).abs().float().mean() > 10  # a negative control: other draws


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_alone_it_refuses_what_is_no_batch_of_levels(images):
    with pytest.raises(ValueError, match="uint8 images"):
        DeviceRandAugment()(images, 9.0, random.Random(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "pipeline"), [("lanczos", "exact"), ("fourier", "exact"), ("lanczos", "fast")])
def test_whole_transform_equals_the_hosts(operator, pipeline, device, photos):
    host = TrainTransform(SIDE, operator, RandAugment(), color_jitter=0.2, pipeline=pipeline)
    share = DeviceTransform(host)
    contents = []
    for photo in photos * 16:
        file = io.BytesIO()
        photo.save(file, "JPEG")
        contents.append(file.getvalue())
    images, choices = default_collate([share(data, 64, 9.0, seed) for seed, data in enumerate(contents)])
    ours = DeviceAugment(operator, host.fill)(images.to(device), choices, 64).cpu()
    expected = torch.stack([host(data, 64, 9.0, seed) for seed, data in enumerate(contents)])
    assert ours.shape == expected.shape and ours.dtype == torch.uint8
    off = (ours.int() - expected.int()).abs().float()
    assert off.mean() < 0.25
    assert off.flatten(1).mean(1).max() < 2  # no image has got another's operations


def test_nothing_asked_nothing_changed(photos):
    host = TrainTransform(SIDE, "lanczos", None, flip=0.0)
    image, choices = DeviceTransform(host)(photos[0], SIDE, None, 1)
    assert choices.tolist() == [0.0]
    assert torch.equal(DeviceAugment("lanczos", host.fill)(image[None], choices[None], SIDE)[0], image)


def test_order_of_operations_is_kept(photos):
    augment = DeviceAugment("lanczos", (0, 0, 0))
    operations = [("Invert", ()), ("SolarizeAdd", (100,))]
    array = np.array(photos[0])
    for order in (operations, operations[::-1]):
        choices = torch.from_numpy(encode(True, order, 2))[None]
        ours = augment(as_batch(array), choices, SIDE)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(ours, apply_operations(array[:, ::-1].copy(), order, (0, 0, 0)))
