"""RandAugment against timm's own: same pixels at the same operation and level, same distribution over many draws."""

import random
from collections import Counter

import numpy as np
import pytest
import skimage.data
from PIL import Image
from timm.data import auto_augment as timm_augment

from curriculum.augment import RandAugment, arguments

FILL = (124, 116, 104)
HPARAMS = {"translate_pct": 0.45, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "magnitude_std": 0.5}
NAMES = timm_augment.rand_augment_choices("inc1", increasing=True)


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(skimage.data.astronaut()).resize((96, 80))


class FixedSign(random.Random):
    """A generator whose every random() is the given number: the sign branch under test."""

    def __init__(self, value):
        super().__init__(0)
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 0.37, 3.0, 5.5, 9.0, 9.99])
def test_every_operation_equals_timm(name, level, photo, monkeypatch):
    for sign in (0.1, 0.9):  # timm negates above 0.5, we below it: compare like with like
        args = arguments(name, level, FixedSign(sign))
        monkeypatch.setattr(timm_augment.random, "random", lambda sign=sign: 1 - sign)
        theirs = timm_augment.LEVEL_TO_ARG[name](level, HPARAMS) if timm_augment.LEVEL_TO_ARG[name] else ()
        monkeypatch.undo()
        assert args == tuple(theirs)
        ours = RandAugment(fill=FILL).apply(photo, [(name, args)])
        expected = timm_augment.NAME_TO_OP[name](photo, *theirs, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_posterize_to_zero_bits_is_black(photo):
    args = arguments("PosterizeIncreasing", 10.0, random.Random(0))
    assert args == (0,)
    assert not np.asarray(RandAugment().apply(photo, [("PosterizeIncreasing", args)])).any()


def recorded_timm_draws(magnitude, count, monkeypatch):
    """Draws of timm's own transform: a list of (name, arguments) per image."""
    transform = timm_augment.rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", dict(HPARAMS))
    draws, current = [], []
    for op in transform.ops:
        monkeypatch.setattr(op, "aug_fn", lambda image, *args, name=op.name, **_: current.append((name, args)) or image)
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        current.clear()
        transform(None)
        draws.append(list(current))
    return draws


@pytest.mark.parametrize("magnitude", [0, 5, 9])
def test_distribution_equals_timm(magnitude, monkeypatch):
    count = 20000
    state = random.getstate()
    augment = RandAugment()
    rng = random.Random(1)
    ours = [augment.draw(float(magnitude), rng) for _ in range(count)]
    theirs = recorded_timm_draws(magnitude, count, monkeypatch)
    random.setstate(state)
    for length in range(3):
        shares = [sum(len(draw) == length for draw in draws) / count for draws in (ours, theirs)]
        assert abs(shares[0] - shares[1]) < 0.02  # binomial spread is 0.005
    flat = [[op for draw in draws for op in draw] for draws in (ours, theirs)]
    counts = [Counter(name for name, _ in ops) for ops in flat]
    for name in NAMES:
        assert abs(counts[0][name] / len(flat[0]) - counts[1][name] / len(flat[1])) < 0.012  # spread .0025
        values = [np.array([args for other, args in ops if other == name], dtype=float) for ops in flat]
        if values[0].size:
            # Two-sample Kolmogorov-Smirnov distance; 2.3 sqrt(2 / n) is passed by chance once in 40,000.
            grid = np.concatenate([v.ravel() for v in values])
            cdf = [np.searchsorted(np.sort(v.ravel()), grid, side="right") / v.size for v in values]
            assert np.abs(cdf[0] - cdf[1]).max() < 2.3 * np.sqrt(2 / min(v.size for v in values)), name


def test_draws_depend_on_the_generator_alone():
    augment = RandAugment()
    random.seed(5)
    before = random.getstate()
    first = [augment.draw(7.3, random.Random(k)) for k in range(50)]
    random.seed(6)
    np.random.seed(6)
    second = [augment.draw(7.3, random.Random(k)) for k in range(50)]
    assert first == second
    random.seed(5)
    assert random.getstate() == before
    assert first != [augment.draw(7.3, random.Random(k + 1)) for k in range(50)]


def test_call_applies_what_is_drawn_by_timms_functions(photo):
    augment = RandAugment(prob=1.0, fill=FILL)
    changed = 0
    for seed in range(5):
        expected = photo
        for name, args in augment.draw(5.0, random.Random(seed)):
            function = timm_augment.NAME_TO_OP[name]
            expected = function(expected, *args, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(augment(photo, 5.0, random.Random(seed))), np.asarray(expected))
        changed += not np.array_equal(np.asarray(expected), np.asarray(photo))
    assert changed >= 3


@pytest.mark.parametrize("magnitude", [-0.1, 10.5, float("nan")])
def test_magnitude_outside_the_range_is_refused(magnitude):
    with pytest.raises(ValueError, match="magnitude"):
        RandAugment().draw(magnitude, random.Random(0))


@pytest.mark.parametrize("setting", [{"num_ops": -1}, {"prob": 1.5}, {"magnitude_std": -1}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        RandAugment(**setting)
