"""Copies to the device, the side stream that prepares batches, and how much a loader holds ready."""

import pytest
import torch

import datasets
from curriculum import CurriculumSampler, build_plan
from datasets import loader_options, training_batches
from inputs.transfer import SideStream, to_device


class Copied:
    """A tensor that notes how it is copied."""

    def __init__(self, pinned):
        self.pinned, self.asked = pinned, None

    def is_pinned(self):
        return self.pinned

    def to(self, device, non_blocking):
        self.asked = non_blocking
        return self


@pytest.mark.parametrize("device, pinned, waits_not", [("cuda", True, True), ("cuda", False, False)])
@pytest.mark.parametrize("other", [None, "mps", "cpu"])
def test_only_copies_from_page_locked_memory_to_cuda_do_not_wait(device, pinned, waits_not, other):
    tensor = Copied(pinned)
    to_device(tensor, torch.device(other or device))
    assert tensor.asked is (waits_not and other is None)


class Stream:
    """A CUDA stream's bookkeeping: what happened, in the order of the host."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0
        self.device = torch.device("cuda", 0)

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} records {self.events}")
        return self.events

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.log.append("enter")

    def __exit__(self, *_):
        self.log.append("exit")


class Prepared:
    alive = 0

    def __init__(self):
        Prepared.alive += 1

    def __del__(self):
        Prepared.alive -= 1


def test_the_side_stream_holds_two_batches_and_reuses_memory_only_after_its_use(monkeypatch):
    log = []
    main, side = Stream("main", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    stream = SideStream(torch.device("cuda", 0))
    batch = None
    for step in range(6):
        batch = stream.prepare(lambda: (log.append("prepare"), Prepared())[1:])
        log.append(f"train {step}")
        assert Prepared.alive <= 2
    assert batch is not None
    # Batch 3 is prepared while batch 2 trains, in memory that batch 1 had: when the main stream has trained on that.
    place = log.index("train 2")
    assert log[place + 1 : place + 8] == [
        *("main records 4", "side waits for 3", "enter", "prepare", "exit", "main waits for side", "train 3")
    ]
    assert log.index("train 1") < log.index("main records 3") < log.index("train 2")


def test_elsewhere_it_only_calls(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", None)
    assert SideStream(torch.device("cpu")).prepare(lambda: (1, 2)) == (1, 2)


@pytest.mark.parametrize("workers, images, side, ahead", [(8, 1280, 96, 4), (8, 1280, 224, 1), (16, 4096, 224, 1)])
def test_what_is_loaded_ahead_is_bounded(workers, images, side, ahead):
    batch = images * 3 * side * side
    factor = loader_options(workers, True, batch)["prefetch_factor"]
    assert factor == ahead
    assert factor == 1 or factor * workers * batch <= datasets.PREFETCH


@pytest.mark.parametrize("operator, augment, side", [("lanczos", None, 32), ("fourier", None, 64), ("lanczos", "", 64)])
def test_the_largest_batch_of_the_plan_decides(monkeypatch, operator, augment, side):
    """Four groups of four images at 32, one at 48 and at 64."""
    asked = []

    def options(workers, pin, batch_bytes):
        asked.append(batch_bytes)
        raise InterruptedError

    monkeypatch.setattr(datasets, "loader_options", options)
    plan = build_plan("efficienttrain++", epochs=4, num_images=64, batch_size=16, base_size=64, operator=operator)
    sampler = CurriculumSampler(plan, micro_batch=4)
    with pytest.raises(InterruptedError):
        next(training_batches(None, sampler, torch.device("cpu"), 2, augment))
    assert asked == [3 * max(16 * side**2, 4 * 64**2)]
