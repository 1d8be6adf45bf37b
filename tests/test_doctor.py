"""--doctor: the verdicts from known speeds, and a real run on the tiny folder."""

import json
import math
import re
import time
from dataclasses import replace

import pytest
import torch

from commands import autobatch, doctor
from config import Config
from curriculum import CurriculumSampler, build_plan
from datasets import TrainSet
from models import create_model
from tests.conftest import flags
from training.build import make_plan, make_sampler, open_sources
from utils import Topology


def row(size, step, worker, fast=None, device=None, copy=math.inf, replay=1):
    return {
        "input_size": size,
        "replay": replay,
        "step": step,
        "copy": copy,
        "as set": worker,
        "--pipeline fast": fast or worker,
        "--augment_on device": device or worker,
    }


def test_the_slowest_part_is_named():
    assert "bottleneck with 4 workers: loading" in doctor.describe(row(96, 5000, 500), 4, 16)
    assert "bottleneck with 12 workers: the training step" in doctor.describe(row(96, 5000, 500), 12, 16)
    assert "bottleneck with 12 workers: loading" in doctor.describe(row(96, 5000, 500), 12, 8)  # only 8 can run at once
    assert "copying to the device" in doctor.describe(row(96, 5000, 500, copy=900), 12, 16)


def test_workers_needed_counts_replay():
    assert doctor.workers_needed(row(96, 5000, 500)) == 10
    assert doctor.workers_needed(row(96, 5000, 500, replay=4)) == 3


def test_advice_fits_the_machine():
    rows = [row(96, 5000, 500, fast=1250), row(224, 1000, 500)]
    assert doctor.advice(rows, 10, 16)[0].startswith("loading keeps up")
    assert doctor.advice(rows, 2, 16)[0].startswith("set --num_workers 10")
    lines = doctor.advice(rows, 2, 4)
    assert "10 workers" in lines[0] and "4 cores" in lines[0]
    assert "--pipeline fast: 4 workers (enough)" in lines[1]
    assert "--augment_on device: 10 workers (still too many)" in lines[2]
    assert "--replay '[3, 1]'" in lines[3]


def test_nothing_is_copied_on_the_cpu():
    assert "copy -, one" in doctor.describe(row(96, 5000, 500), 4, 16)
    assert "copy 900, one" in doctor.describe(row(96, 5000, 500, copy=900), 4, 16)


@pytest.mark.parametrize(
    "training, loading, workers, on_cpu, seconds",
    [
        (10, 30, 0, False, 40),  # one after the other
        (10, 30, 2, False, 15),  # the loader holds it back
        (10, 30, 4, False, 10),
        (10, 8, 1, True, 14),  # two threads for ten seconds and eight of the worker, on two cores
        (10, 30, 1, True, 30),
    ],
)
def test_how_long_a_stage_takes(monkeypatch, training, loading, workers, on_cpu, seconds):
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 2)
    assert doctor.busiest(training, loading, workers, 2 if on_cpu else 16, on_cpu) == seconds


def test_the_whole_run_is_the_sum_of_its_stages_and_evaluations():
    plan = build_plan("efficienttrain++", epochs=20, num_images=1000, batch_size=10, base_size=64)
    rows = [row(32, 400, 1e9), row(48, 200, 1e9), row(64, 100, 1e9)]
    config = Config(input_size=64, eval_interval="100%", model_ema=True, num_workers=4)
    expected = sum(s.steps * 10 / {32: 400, 48: 200, 64: 100}[s.input_size] for s in plan.stages)
    found = doctor.predict(rows, CurriculumSampler(plan), config, 300, Topology(0, 1, torch.device("cuda", 0)), 16)
    assert found == pytest.approx(expected + 2 * 300 / 300, rel=1e-6)  # both weights, at three times the speed
    found = doctor.predict(
        rows, CurriculumSampler(plan, world_size=2), config, 300, Topology(0, 2, torch.device("cuda", 0)), 16
    )
    assert found == pytest.approx((expected + 2) / 2, rel=1e-6)


def test_a_loop_that_was_timed_with_its_loader_is_not_reckoned():
    plan = build_plan("efficienttrain++", epochs=20, num_images=1000, batch_size=10, base_size=64)
    rows = [{**row(size, 400, 1e9), "whole": whole} for size, whole in ((32, 50), (48, 20), (64, None))]
    config = Config(input_size=64, eval_interval="100%", num_workers=4)
    small, middle, large = (stage.steps * 10 for stage in plan.stages)
    found = doctor.predict(rows, CurriculumSampler(plan), config, 0, Topology(0, 1, torch.device("cpu")), 1)
    reckoned = doctor.busiest(large / 400, 0, 4, 1, True)  # the stage was too short
    assert found == pytest.approx(small / 50 + middle / 20 + reckoned, rel=1e-6)


def test_a_loop_is_timed_with_its_loader_beside_it(folder, monkeypatch):
    """A loader of 100 images/s holds back a model of thousands; a stage of three steps tells nothing."""
    real = TrainSet.__getitem__
    monkeypatch.setattr(TrainSet, "__getitem__", lambda data, sample: (time.sleep(0.01), real(data, sample))[1])
    monkeypatch.setattr(doctor, "SECONDS", 0.5)  # many times what a full queue of the loader holds
    config = Config(model="test_resnet", input_size=64, batch_size=8, micro_batch=8, epochs=40, data_path=str(folder))
    config = replace(config, num_workers=1)
    source, _ = open_sources(config)
    plan = make_plan(config, len(source), 3)
    sampler, topology = make_sampler(config, plan, 1), Topology(0, 1, torch.device("cpu"))
    for stage in plan.stages:
        model = create_model("test_resnet", 3, stage.input_size)
        speed = doctor.loop_speed(config, plan, sampler, source, model, stage, topology)
        assert 0 < speed < 250
        short = replace(stage, first_step=stage.first_step + stage.steps - 3, steps=3)
        assert doctor.loop_speed(config, plan, sampler, source, model, short, topology) is None
    assert sampler.start_step == 0


def test_a_step_is_timed_in_the_runs_groups_from_one_batch(monkeypatch):
    seen = []
    real = autobatch.finished

    def finished(training, batches, record, seeds):
        images, targets = next(batches)
        seen.append((len(images), training.sampler.micro_batch, len(seeds), images.data_ptr()))
        return real(training, iter([(images, targets)]), record, seeds)

    monkeypatch.setattr(autobatch, "finished", finished)
    monkeypatch.setattr(doctor, "SECONDS", 0)
    plan = build_plan("efficienttrain++", epochs=20, num_images=100, batch_size=16, base_size=64)
    config = Config(model="test_convnext", input_size=64, batch_size=16)
    model = create_model("test_convnext", 10, 32)
    forward, _ = doctor.step_seconds(config, plan, model, 16, 8, Topology(0, 1, torch.device("cpu")))
    assert forward > 0 and len(seen) == 4
    assert {what[:3] for what in seen} == {(16, 8, 2)} and len({pointer for *_, pointer in seen}) == 1


@pytest.mark.parametrize("settings", [{}, {"augment_on": "device"}, {"operator": "fourier", "magnitude": "none"}])
def test_a_real_run_measures_every_size(main_program, folder, tmp_path, capsys, monkeypatch, settings):
    monkeypatch.setattr(doctor, "SECONDS", 0.02)
    assert main_program(flags(data_path=folder, output_dir=tmp_path / "out", doctor=True, **settings)) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0].split()[-1] for line in printed.splitlines() if line.startswith("B ")] == [
        "32",
        "48",
        "64",
    ]
    assert re.search(r"the whole run: \d+:\d\d, [\d.]+ process-hours", printed) and "copy -" in printed
    speeds = json.loads((tmp_path / "out" / "speeds.json").read_text())["images_per_s"]
    assert set(speeds) == {"32", "48", "64"} and all(speed > 0 for speed in speeds.values())
    assert not list((tmp_path / "out").glob("checkpoint*"))
    assert main_program(flags(data_path=folder, plan="table", speeds=tmp_path / "out" / "speeds.json")) == 0
