"""--doctor: the verdicts from known speeds, and a real run on the tiny folder."""

import json
import math

import pytest

from commands import doctor
from tests.conftest import flags


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


@pytest.mark.parametrize("settings", [{}, {"operator": "fourier", "magnitude": "none"}])
def test_a_real_run_measures_every_size(main_program, folder, tmp_path, capsys, monkeypatch, settings):
    monkeypatch.setattr(doctor, "SECONDS", 0.02)
    assert main_program(flags(data_path=folder, output_dir=tmp_path / "out", doctor=True, **settings)) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0].split()[-1] for line in printed.splitlines() if line.startswith("B ")] == [
        "32",
        "48",
        "64",
    ]
    speeds = json.loads((tmp_path / "out" / "speeds.json").read_text())["images_per_s"]
    assert set(speeds) == {"32", "48", "64"} and all(speed > 0 for speed in speeds.values())
    assert not list((tmp_path / "out").glob("checkpoint*"))
    assert main_program(flags(data_path=folder, plan="table", speeds=tmp_path / "out" / "speeds.json")) == 0
