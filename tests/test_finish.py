"""Device-side finishing against timm's erasing and mixing applied by hand, and torchvision's normalising."""

import random

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional as tvf

from curriculum.operators import low_frequency_crop
from inputs.finish import IMAGENET_MEAN, IMAGENET_STD, Finish, draw_erasing, noise_like

SEEDS = [3, 2**63 - 7]


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(8)


def timm_erased(x, seed, erasing):
    """``x`` erased where timm erases it after seeding, with noise of the erased images from a generator of its own."""
    random.seed(seed)
    kept = RandomErasing(erasing, mode="const", device="cpu")(torch.ones_like(x)) > 0
    erased = ~kept.flatten(1).all(1)
    noise = torch.randn(int(erased.sum()), *x.shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.where(kept, x, torch.zeros_like(x).masked_scatter(erased[:, None, None, None].expand_as(x), noise))


def by_hand(images, targets, size, fourier, erasing=0.25):
    """Both groups of four, one after the other, with timm's classes and fresh seeds."""
    outputs = []
    for k, seed in enumerate(SEEDS):
        x = tvf.normalize(images[4 * k : 4 * k + 4].float() / 255, IMAGENET_MEAN, IMAGENET_STD)
        x = timm_erased(x, seed, erasing)
        np.random.seed(seed % 2**32)
        if fourier:
            x = low_frequency_crop(x, size)
        outputs.append(Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)(x, targets[4 * k : 4 * k + 4]))
    return [torch.cat(parts) for parts in zip(*outputs)]


@pytest.mark.parametrize("fourier", [False, True])
def test_equals_timm_by_hand(batch, fourier):
    size = 24 if fourier else 32
    finish = Finish(10, operator="fourier" if fourier else "lanczos", base_size=32, erasing=0.9)
    images, targets = finish.train(*batch, size, SEEDS, 4)
    expected = by_hand(*batch, size, fourier, erasing=0.9)
    assert images.shape == (8, 3, size, size) and images.dtype == torch.float32
    torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(targets, expected[1])


def test_groups_do_not_depend_on_the_forward_pass(batch):
    images, targets = batch
    finish = Finish(10, base_size=32)
    together = finish.train(images, targets, 32, SEEDS, 4)
    alone = [finish.train(images[k : k + 4], targets[k : k + 4], 32, [SEEDS[k // 4]], 4) for k in (0, 4)]
    for whole, parts in zip(together, zip(*alone)):
        assert torch.equal(whole, torch.cat(parts))
    other = finish.train(images, targets, 32, SEEDS[::-1], 4)
    assert not torch.equal(together[0], other[0])


def test_global_generators_are_left_as_found(batch):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = Finish(10, base_size=32).train(*batch, 32, SEEDS, 4)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert torch.equal(first[0], Finish(10, base_size=32).train(*batch, 32, SEEDS, 4)[0])


def test_input_is_not_changed_and_uint8_stays(batch):
    copy = batch[0].clone()
    Finish(10, base_size=32).train(*batch, 32, SEEDS, 4)
    assert torch.equal(copy, batch[0])


def test_without_mixing_targets_stay_integers_and_groups_may_be_odd(batch):
    finish = Finish(10, base_size=32, mixup=0, cutmix=0, erasing=0)
    images, targets = finish.train(batch[0][:3], batch[1][:3], 32, [5], 3)
    assert torch.equal(targets, batch[1][:3]) and targets.dtype == torch.int64
    expected = tvf.normalize(batch[0][:3].float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (5, 3)])
@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_the_boxes_are_those_of_timm_for_the_same_seeds(height, width, probability):
    seeds = list(range(100, 140))
    erased = draw_erasing(probability, seeds, 8, (height, width))
    for number, (seed, group) in enumerate(zip(seeds, erased)):
        random.seed(seed)
        expected = RandomErasing(probability, mode="const", device="cpu")(torch.ones(8, 1, height, width))
        ours = torch.ones(8, 1, height, width)
        for place, (top, left, bottom, right) in group:
            ours[place - 8 * number, :, top:bottom, left:right] = 0
        assert torch.equal(ours, expected)
    assert any(erased)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.1, 0.1)])
@pytest.mark.parametrize("probability", [1.0, 0.6])
def test_mixing_is_that_of_timm_for_the_same_seeds(mixup, cutmix, probability):
    if cutmix and [int(part) for part in timm.__version__.split(".")[:3]] < [1, 0, 29]:
        pytest.skip("before 1.0.29 timm cuts boxes of an odd side a pixel short")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (240, 3, 12, 12), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, 10, (240,), generator=generator)
    seeds = list(range(2**40, 2**40 + 60))
    settings = {"mixup": mixup, "cutmix": cutmix, "mixup_prob": probability, "switch_prob": 0.3}
    finish = Finish(10, base_size=12, erasing=0, **settings)
    ours = finish.train(images, targets, 12, seeds, 4)
    theirs = Mixup(mixup, cutmix, prob=probability, switch_prob=0.3, label_smoothing=0.1, num_classes=10)
    expected = []
    for group, labels, seed in zip(finish.normalise(images).split(4), targets.split(4), seeds):
        np.random.seed(seed % 2**32)
        expected.append(theirs(group, labels))
    for mine, parts in zip(ours, zip(*expected)):
        torch.testing.assert_close(mine, torch.cat(parts), rtol=0, atol=2e-6)
    unmixed = [bool((soft.max(1).values > 0.9).all()) for soft in ours[1].split(4)]
    assert any(unmixed) and not all(unmixed)


def test_the_noise_is_standard_normal_and_each_groups_own():
    counts, seeds = [40, 0, 20], [1, 2, 3]
    noise = noise_like(torch.empty(1, 3, 32, 32), counts, seeds)
    assert noise.shape == (60, 3, 32, 32)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**4).mean() - 3) < 0.1
    assert torch.equal(noise[40:], noise_like(torch.empty(1, 3, 32, 32), [20], [3]))
    pairs = torch.corrcoef(noise.flatten(1)).fill_diagonal_(0)
    assert pairs.abs().max() < 0.1  # no image has another's noise


def test_erased_share_and_area():
    images = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
    finish = Finish(10, base_size=32, mixup=0, cutmix=0, mean=(0.5,) * 3, std=(1,) * 3)
    out, _ = finish.train(images, torch.zeros(400).long(), 32, list(range(100)), 4)
    changed = (out - out.median()).abs().amax(dim=1) > 1e-3
    share = changed.flatten(1).float().mean(dim=1)
    erased = share > 0
    assert 0.17 < erased.float().mean() < 0.33  # p = .25, spread .022
    assert share[erased].min() > 0.01 and share[erased].max() < 0.36


def test_evaluation_normalises_and_crops(batch):
    expected = tvf.normalize(batch[0].float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    plain = Finish(10, base_size=32).evaluate(batch[0], 32)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    cropped = Finish(10, operator="fourier", base_size=32).evaluate(batch[0], 20)
    torch.testing.assert_close(cropped, low_frequency_crop(expected, 20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", ["lanczos", "fourier"])
def test_memory_format_is_the_models_whatever_the_batch_has(batch, operator):
    size = 24 if operator == "fourier" else 32
    expected = Finish(10, base_size=32, operator=operator).train(*batch, size, SEEDS, 4)[0]
    assert expected.is_contiguous()
    for channels_last in (False, True):
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        finish = Finish(10, base_size=32, operator=operator, channels_last=channels_last)
        for given in (torch.channels_last, torch.contiguous_format):
            images = batch[0].contiguous(memory_format=given)
            out, _ = finish.train(images, batch[1], size, SEEDS, 4)
            assert out.is_contiguous(memory_format=wanted)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
            assert finish.evaluate(images, size).is_contiguous(memory_format=wanted)


def test_bad_input_is_named(batch):
    images, targets = batch
    finish = Finish(10, base_size=32)
    with pytest.raises(ValueError, match=r"--micro_batch.*even"):
        finish.train(images[:3], targets[:3], 32, [1], 3)
    with pytest.raises(ValueError, match="groups"):
        finish.train(images, targets, 32, [1], 4)
    with pytest.raises(ValueError, match="24x24"):
        finish.train(images, targets, 24, SEEDS, 4)


def test_low_pass_comes_after_erasing_and_before_mixing(batch):
    size = 24
    expected = []
    for k, seed in enumerate(SEEDS):
        x = tvf.normalize(batch[0][4 * k : 4 * k + 4].float() / 255, IMAGENET_MEAN, IMAGENET_STD)
        x = timm_erased(x, seed, 0.9)
        np.random.seed(seed % 2**32)
        spectrum = np.fft.fft2(low_frequency_crop(x, size).double().numpy())
        k1, k2 = np.meshgrid(np.fft.fftfreq(size, 1 / size), np.fft.fftfreq(size, 1 / size), indexing="ij")
        x = torch.from_numpy(np.fft.ifft2(spectrum * (k1**2 + k2**2 <= 25)).real).float()
        expected.append(Mixup(0.8, 1.0, num_classes=10)(x, batch[1][4 * k : 4 * k + 4])[0])
    finish = Finish(10, operator="fourier", base_size=32, erasing=0.9, channels_last=True)
    images, _ = finish.train(*batch, size, SEEDS, 4, radius=5)
    torch.testing.assert_close(images, torch.cat(expected), rtol=0, atol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)
    evaluated = finish.evaluate(batch[0], size, radius=5)
    x = tvf.normalize(batch[0].float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    spectrum = np.fft.fft2(low_frequency_crop(x, size).double().numpy())
    disc = torch.from_numpy(np.fft.ifft2(spectrum * (k1**2 + k2**2 <= 25)).real).float()
    torch.testing.assert_close(evaluated, disc, rtol=0, atol=1e-5)
    assert (evaluated - finish.evaluate(batch[0], size)).abs().max() > 0.1
    assert (evaluated - finish.evaluate(batch[0], size, radius=6)).abs().max() > 0.01


def test_less_mixing(batch):
    finish = Finish(10, base_size=32, mixup=0.8, cutmix=1.0, erasing=0)
    images, targets = finish.train(*batch, 32, SEEDS, 4, mixing=0)
    assert torch.equal(targets, batch[1]) and torch.equal(images, finish.evaluate(batch[0], 32))
    less = finish.train(*batch, 32, SEEDS, 4, mixing=0.25)
    alone = Finish(10, base_size=32, mixup=0.2, cutmix=0.25, erasing=0).train(*batch, 32, SEEDS, 4)
    assert torch.equal(less[0], alone[0]) and torch.equal(less[1], alone[1])
    assert not torch.equal(less[0], finish.train(*batch, 32, SEEDS, 4)[0])


def test_evaluation_at_another_size_than_the_base(batch):
    """--eval_size: the images come at that size, whatever the operator."""
    finish = Finish(10, operator="fourier", base_size=64)
    assert finish.evaluate(batch[0], 32).shape[-1] == 32
    with pytest.raises(ValueError, match="32x32: input size 24"):
        finish.evaluate(batch[0], 24)
