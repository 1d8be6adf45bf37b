"""What several tests share: a tiny real image folder, and running main.py inside the test process."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# A run of a second or two: 48 images, batches of 8 in groups of 4, sizes 32, 48 and 64.
TINY = {
    "model": "test_convnext",
    "input_size": 64,
    "batch_size": 8,
    "micro_batch": 4,
    "epochs": 2,
    "lr": 1e-3,
    "num_workers": 0,
    "device": "cpu",
    "log_interval": "4 steps",
    "eval_interval": "50%",
    "save_interval": "0",
}


def flags(**settings):
    """Settings as a command line: TINY, changed and added to by ``settings``; None leaves one out."""
    merged = {key: value for key, value in {**TINY, **settings}.items() if value is not None}
    return [text for key, value in merged.items() for text in (f"--{key}", _text(value))]


def _text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.fixture(autouse=True)
def own_signals():
    """Runs inside the test process take over SIGTERM and SIGUSR1; gives them back."""
    names = [signal.SIGTERM, signal.SIGUSR1]
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before):
        signal.signal(name, handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 3 classes with 48 training and 15 validation JPEGs, coloured noise that differs by class."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", [16, 16, 16])
    write_images(root / "val", [5, 5, 5], seed=1)
    return root


def write_images(root, counts, seed=0, size=(40, 48)):
    """``counts[c]`` JPEGs in each class folder: a colour and stripes of the class's own, under noise."""
    rng = random.Random(seed)
    for label, count in enumerate(counts):
        target = root / f"class_{label}"
        target.mkdir(parents=True)
        for number in range(count):
            image = Image.effect_noise(size, 60).convert("RGB")
            tint = tuple(rng.randint(0, 80) + (160 if channel == label % 3 else 0) for channel in range(3))
            image = Image.blend(image, Image.new("RGB", size, tint), 0.6)
            image.save(target / f"{number:02d}.jpg", quality=90)


@pytest.fixture(scope="session")
def run():
    """``run(output_dir=..., ...)`` -> exit code of main.py with the tiny settings, in this process."""
    import main

    def call(**settings):
        return main.main(flags(**settings))

    return call
