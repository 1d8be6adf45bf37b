"""scripts/photos_data.py, but for the packages: what is cut from photographs, and from where."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import photos_data


@pytest.fixture
def photographs(monkeypatch):
    """Two of noise, so that nothing is flat; each of the 4 x 4 cells has a grey level of its own."""
    rng, found = np.random.default_rng(0), {}
    levels = np.kron(np.arange(16).reshape(4, 4) * 12 + 30, np.ones((100, 100)))[..., None]
    for name in ("00_one", "01_two"):
        noise = rng.integers(-28, 28, (400, 400, 1))
        found[name] = Image.fromarray(np.repeat(levels + noise, 3, 2).astype(np.uint8))
    monkeypatch.setattr(photos_data, "fetch", lambda work: None)
    monkeypatch.setattr(photos_data, "photographs", lambda work: found)


def build(out, seed=0):
    assert photos_data.build(out, out, seed, size=32, train=40, val=24) == 2
    return {str(path.relative_to(out)): np.asarray(Image.open(path)) for path in sorted(out.rglob("*.jpg"))}


def test_the_same_seed_gives_the_same_images(photographs, tmp_path):
    first, again, other = build(tmp_path / "a"), build(tmp_path / "b"), build(tmp_path / "c", seed=1)
    assert len(first) == 2 * (40 + 24) and {image.shape for image in first.values()} == {(32, 32, 3)}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)


def test_training_and_validation_share_no_pixel(photographs, tmp_path, monkeypatch):
    """By the level of the cell that an image is from, colours left alone."""
    monkeypatch.setattr(photos_data, "recolour", lambda pixels, rng: pixels)
    cells = {"train": set(), "val": set()}
    for name, image in build(tmp_path).items():
        if "00_one" in name:
            cells[name.split("/")[0]].add(round((image.mean() - 29.5) / 12))
    assert len(cells["train"]) > 7 and len(cells["val"]) > 4 and not cells["train"] & cells["val"]


def test_a_photograph_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Bridge_by_Sander"):
        photos_data.photographs(tmp_path)


def test_a_full_turn_of_the_hue_changes_nothing():
    class Fixed:
        def uniform(self, low, high):
            return {-180: 0.0, 0.2: 1.0, 0.7: 1.0, -20: 0.0}[low]

    pixels = np.random.default_rng(0).uniform(0, 255, (4, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(photos_data.recolour(pixels, Fixed()), pixels, atol=1e-2)
