"""What several tests share: a tiny real image folder, and running main.py inside the test process."""

import atexit
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Under nohup: tests outlive their terminal as before, but what they start does not inherit that SIGHUP is ignored.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
# Indices of the tests' data sets are kept here, not in the cache folder of whoever runs the tests; processes that tests
# start, and that import this again, share it.
CACHE_PREFIX = "efficienttrain_tests_"
if not Path(os.environ.get("XDG_CACHE_HOME", "")).name.startswith(CACHE_PREFIX):
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix=CACHE_PREFIX)
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def script(name):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# A run of a second or two: 48 images, batches of 8 in groups of 4, sizes 32, 48 and 64.
TINY = {
    "model": "tests.tiny_models:convnet",
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
def main_program():
    """``main_program(argv)`` -> exit code of main.py in this process, which gets its signal handlers back."""
    import main
    from utils import STOP_SIGNALS

    def call(argv):
        before = {name: signal.getsignal(name) for name in map(signal.Signals.__getitem__, STOP_SIGNALS)}
        try:
            return main.main(argv)
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    return call


@pytest.fixture
def train(main_program, folder, tmp_path):
    """``train(name="a", lr=..., ...)`` trains on ``folder`` with the tiny settings, and returns its :class:`Run`."""

    def call(name="run", **settings):
        output = tmp_path / name
        assert main_program(flags(output_dir=output, **{"data_path": folder, **settings})) == 0
        return Run(output)

    return call


def checkpoint_fields(**fields):
    """All that a checkpoint must hold, of a run that has not begun; ``fields`` replace and add to it."""
    empty = {"model_ema": None, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}, "step": 0, "epoch": 0}
    meters = {"loss": [0.0, 0.0], "seconds": 0.0}
    return {"model": {}, **empty, "best": {"acc1": -1.0}, "meters": meters, "config": {}, **fields}


class Run:
    """What a run left in its output folder."""

    def __init__(self, output):
        self.output = Path(output)

    def log(self):
        """The records of log.txt."""
        return [json.loads(line) for line in (self.output / "log.txt").read_text().splitlines()]

    def state(self, name="checkpoint-last.pth"):
        """A checkpoint's content."""
        from models import checkpoints

        return checkpoints.load(self.output / name)

    def result(self):
        """What must not depend on interruptions: all of the last checkpoint and of the log but the times."""
        state = self.state()
        state["meters"] = {"loss": state["meters"]["loss"]}
        del state["config"]
        timed = ("seconds", "images_per_s", "memory_gib")
        log = [{key: value for key, value in record.items() if key not in timed} for record in self.log()]
        return {"state": state, "log": log}


def same(a, b):
    """Whether two nested values are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
