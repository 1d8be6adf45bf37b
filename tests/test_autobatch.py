"""--micro_batch auto: what fits is found, recorded and kept; out-of-memory errors are faked."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

import main
from commands import autobatch
from config import Config
from curriculum import CurriculumSampler, build_plan
from models import create_model
from utils import Topology

CPU = Topology(0, 1, torch.device("cpu"))


def plan_of(**changes):
    settings = {"epochs": 20, "num_images": 5000, "batch_size": 512, "base_size": 224, **changes}
    return build_plan("efficienttrain++", **settings)


def pixels_fit(limit):
    """A device that holds so many pixels, and the questions it was asked."""
    asked = []

    def fits(size, images):
        asked.append((size, images))
        return size * size * images <= limit

    return fits, asked


def test_largest_group_and_passes_that_fit():
    fits, asked = pixels_fit(70 * 224**2)
    micro, forward = autobatch.search(plan_of(), 1, True, fits)
    assert micro == 64  # of 512, 256, 128, 64
    # 96: 381 images' worth of memory holds 5 groups of 64, but 8 groups in two passes are 4 and 4.
    assert forward == {224: 64, 160: 128, 96: 256}
    assert asked[:4] == [(224, 512), (224, 256), (224, 128), (224, 64)]
    sampler = CurriculumSampler(plan_of(), micro_batch=micro, forward_batch=forward)
    passes = {epoch.input_size: sampler.forward_passes(epoch) for epoch in sampler.plan}
    assert {size: max(map(len, ranges)) * micro for size, ranges in passes.items()} == forward


def test_groups_divide_a_processs_share_and_are_even_when_images_are_mixed():
    fits, _ = pixels_fit(100 * 224**2)
    assert autobatch.search(plan_of(batch_size=360), 4, True, fits)[0] == 90
    fits, _ = pixels_fit(50 * 224**2)
    assert autobatch.search(plan_of(batch_size=360), 4, True, fits)[0] == 30
    assert autobatch.search(plan_of(batch_size=360), 4, False, fits)[0] == 45


def test_early_large_batches_fill_the_passes():
    fits, _ = pixels_fit(64 * 224**2)
    micro, forward = autobatch.search(plan_of(early_large_batch=True), 8, True, fits)
    assert (micro, forward) == (64, {224: 64, 160: 64, 96: 256})


def test_nothing_fits():
    with pytest.raises(ValueError, match="not even 2 images of 224 pixels fit"):
        autobatch.search(plan_of(), 1, True, lambda size, images: False)


@pytest.mark.parametrize("operator, ema", [("fourier", True), ("lanczos", False)])
def test_trial_trains_the_real_thing_and_survives_a_lack_of_memory(monkeypatch, operator, ema):
    config = Config(model="test_convnext", input_size=64, operator=operator, model_ema=ema, opt="adamw")
    plan = build_plan("efficienttrain++", epochs=20, num_images=500, batch_size=16, base_size=64, operator=operator)
    trial = autobatch.Trial(config, plan, lambda size: create_model("test_convnext", 10, size), CPU)
    seen = []
    real = autobatch.finished

    def limited(training, batches, epoch, seeds):
        images, targets = next(batches)
        seen.append(tuple(images.shape))
        if len(images) * epoch.input_size**2 > 8 * 64**2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (a fake)")
        return real(training, iter([(images, targets)]), epoch, seeds)

    monkeypatch.setattr(autobatch, "finished", limited)
    assert autobatch.search(plan, 1, True, trial.fits) == (8, {64: 8, 48: 8, 32: 16})
    assert (8, 3, 64, 64) in seen and ((16, 3, 32, 32) in seen) == (operator == "lanczos")


def test_other_errors_of_a_trial_are_not_taken_for_a_lack_of_memory(monkeypatch):
    trial = autobatch.Trial(Config(), plan_of(), lambda size: create_model("test_convnext", 10, size), CPU)
    monkeypatch.setattr(trial, "train", lambda size, images: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        trial.fits(64, 8)


@pytest.mark.parametrize(
    "text, lacks",
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_every_way_to_say_out_of_memory_is_known(text, lacks):
    assert autobatch.ran_out(RuntimeError(text)) is lacks


@pytest.mark.parametrize("processes", [1, 2])
def test_the_trial_does_all_that_the_run_does(monkeypatch, processes):
    """It augments at the base size, keeps gradients where data-parallel buckets would stay, updates the average."""
    config = Config(model="test_convnext", input_size=64, augment_on="device", model_ema=True)
    plan = build_plan("efficienttrain++", epochs=20, num_images=500, batch_size=16, base_size=64)
    model, asked = create_model("test_convnext", 10, 32), []
    blank = autobatch.Blank(config, plan, model, 16, 16, Topology(0, processes, CPU.device))
    real = blank.augment
    monkeypatch.setattr(blank, "augment", lambda *args: (asked.append(args), real(*args))[1])
    blank.forward_and_backward()
    blank.update()
    ((images, choices, size),) = asked
    assert images.shape == (16, 3, 64, 64) and size == 32
    assert choices.shape == (16, 5) and (choices[:, 0] == 1).all()
    assert (next(model.parameters()).grad is not None) == (processes == 2)
    fast = autobatch.Blank(replace(config, pipeline="fast"), plan, create_model("test_convnext", 10, 32), 8, 8, CPU)
    assert fast.batch[0].shape == (8, 3, 32, 32)


def test_reckoning_counts_what_autograd_keeps():
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
    )
    model.input_size = 16
    fixed, per_image = autobatch.kept_bytes(model)
    assert fixed == 16 * sum(parameter.numel() for parameter in model.parameters())
    # The input (a view of the images), the ReLU's output, which the second layer keeps too.
    assert per_image == 4 * (3 * 16 * 16 + 5)


def test_reckoning_follows_free_memory(monkeypatch):
    def build(size):
        return create_model("test_convnext", 10, size)

    fixed, per_image = autobatch.kept_bytes(build(64))
    monkeypatch.setattr(autobatch, "free_memory", lambda device: fixed + 10.5 * per_image)
    fits = autobatch.Reckoning(build, CPU).fits
    assert fits(64, 10) and not fits(64, 11)
    assert autobatch.free_memory(torch.device("cpu")) > 0


def test_found_sizes_belong_to_the_run(train, monkeypatch):
    monkeypatch.setattr(autobatch, "find", lambda *_: (4, {64: 4, 48: 4, 32: 8}))
    run = train(micro_batch="auto", epochs=1, save_interval="3 steps")
    settings = yaml.safe_load((run.output / "config.yaml").read_text())
    assert settings["micro_batch"] == 4 and settings["forward_batch"] == {64: 4, 48: 4, 32: 8}
    plan = json.loads((run.output / "plan.json").read_text())
    assert plan["micro_batch"] == 4 and [stage["forward_batch"] for stage in plan["stages"]] == [8, 4, 4]

    def never(*_):
        raise AssertionError("a run that goes on keeps its groups")

    monkeypatch.setattr(autobatch, "find", never)
    train(micro_batch="auto", epochs=1)  # goes on, and finds itself done
    settled = main.settle_micro_batch(Config(), plan_of(), 3, CPU, run.state())
    assert settled == {"micro_batch": 4, "forward_batch": {64: 4, 48: 4, 32: 8}}


def test_auto_on_the_cpu_end_to_end(train, capsys):
    train(micro_batch="auto", epochs=1)
    assert "--micro_batch auto: groups of 8" in capsys.readouterr().out
