"""Mutated image files through the loader for a minute: every one an image or a named error, no crash, no leak."""

import io
import os
import random
import time

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from curriculum.augment import RandAugment
from inputs.bad_files import load
from inputs.decode import BadImage
from inputs.transforms import EvalTransform, TrainTransform

SECONDS = 60


def originals():
    photo = Image.fromarray(skimage.data.astronaut()).resize((160, 120))
    contents = []
    for kind, mode, options in (
        ("JPEG", "RGB", {"subsampling": 2}),
        ("JPEG", "RGB", {"subsampling": 0, "progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("BMP", "RGB", {}),
        ("PPM", "RGB", {}),
    ):
        file = io.BytesIO()
        (photo.convert("L") if mode == "I;16" else photo).convert(mode).save(file, kind, **options)
        contents.append(file.getvalue())
    return contents


def mutate(data, rng):
    """Flips bits, cuts, repeats, deletes, or overwrites header fields with extreme values."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 600))
        length = rng.choice((1, 2, 4, 16, 200))
        action = rng.randrange(6)
        if action == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[place : place + length] = rng.randbytes(length)
        elif action == 2:
            data[place : place + length] = rng.choice((b"\xff", b"\0", b"\x7f")) * length
        elif action == 3:
            del data[place : place + length]
        elif action == 4:
            data[place:place] = data[place : place + length]
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


class Mutants(Dataset):
    """Image ``i`` is the ``i``-th mutant; the item says whether it could be used."""

    def __init__(self):
        self.contents = originals()
        self.train = {name: TrainTransform(64, "lanczos", RandAugment(), pipeline=name) for name in ("exact", "fast")}
        self.evaluate = EvalTransform(64, 48, "lanczos")

    def __len__(self):
        return 10**9

    def read(self, i):
        rng = random.Random(i)
        return mutate(rng.choice(self.contents), rng)

    def name(self, i):
        return f"mutant {i}"

    def __getitem__(self, i):
        used = []
        for transform in (
            lambda data: self.train["exact"](data, 48, 9.0, i),
            lambda data: self.train["fast"](data, 48, 9.0, i),
            self.evaluate,
        ):
            try:
                image = load(self, i, transform)
                assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
                used.append(True)
            except BadImage as error:
                assert str(error).startswith(f"mutant {i}: ") and "\n" not in str(error)
                used.append(False)
        assert used[0] == used[2], f"mutant {i} is good for training or evaluation alone"
        return torch.tensor([*used, resident()])


def resident():
    """MB of this process's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from Linux's /proc")
def test_mutated_files(record_property):
    loader = DataLoader(Mutants(), batch_size=64, num_workers=2)  # a crash of a worker is an error of the loader
    start, rows = time.monotonic(), []
    for batch in loader:
        rows.append(batch.numpy())
        if time.monotonic() - start > SECONDS:
            break
    rows = np.stack(rows)
    share = rows[..., 0].mean()
    print(f"{rows[..., 0].size} mutants, {share:.0%} still images, {rows[-1, :, 3].max():.0f} MB per worker")
    assert 0.1 < share < 0.9
    warm, last = rows[len(rows) // 3 : 2 * len(rows) // 3, :, 3], rows[-len(rows) // 3 :, :, 3]
    assert np.median(last) < np.median(warm) + 30, "memory grows"
