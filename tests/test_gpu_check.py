"""scripts/gpu_check.sh --quick without a GPU, what it makes of a missed bar, and what travels as wheels."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))


def test_quick_runs_all_that_needs_no_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = {}
    for row in content["rows"]:
        rows.setdefault(row["check"], []).append(row)
    skipped = {name for name, found in rows.items() if found[0]["value"] == "needs a GPU"}
    assert skipped == {"synchronisations", "cpu and gpu agree", "memory", "host", "options"}
    bars = ("resuming", "end to end", "switching", "tasks", "data parallel", "compiled")
    assert {row["met"] for name in bars for row in rows[name]} == {True}
    assert all(row["value"] > 0 for name in ("loop", "sizes", "augmenting") for row in rows[name])
    table = done.stdout[done.stdout.index("| check |") :]
    assert table.count("\n| ") == len(content["rows"]) and content["about"]["device"] == "CPU"


@pytest.mark.parametrize("fault", [None, RuntimeError("cuDNN\nis not there")])
def test_a_missed_bar_or_an_error_fails_and_the_rest_goes_on(fault, monkeypatch, tmp_path, capsys):
    import gpu_check

    def broken(machine):
        yield "this", 0.5, ">= 0.9", False
        if fault:
            raise fault

    def fine(machine):
        yield "that", 1.0, ">= 0.9", True

    monkeypatch.setattr(gpu_check, "CHECKS", ((broken, False), (fine, False)))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path)])
    assert gpu_check.main() == 1
    printed = capsys.readouterr().out
    assert (
        f"{1 + bool(fault)} of {2 + bool(fault)} bars missed" in printed
        and "| fine | that | 1 | >= 0.9 | met |" in printed
    )
    assert ("RuntimeError: cuDNN is not there" in printed) == bool(fault)
    monkeypatch.setattr(gpu_check, "CHECKS", ((fine, False),))
    assert gpu_check.main() == 0


def test_a_gpus_bars_are_not_a_cpus():
    import gpu_speed

    machine = SimpleNamespace(gpu=False, quick=True)
    assert gpu_speed.bar(machine, 0.1, 0.97) == (0.1, ">= 0.97", None)
    machine = SimpleNamespace(gpu=True, quick=False)
    assert gpu_speed.bar(machine, 0.1, 0.97)[2] is False and gpu_speed.bar(machine, 0.98, 0.97)[2] is True


def test_wheels_are_what_runs_need_beside_the_machines_own(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$CALL"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALL": str(tmp_path / "call")}
    command = ["bash", str(ROOT / "scripts" / "gpu_wheels.sh"), str(tmp_path / "wheels")]
    assert subprocess.run(command, env=environment).returncode == 0
    names = [
        line.split(">")[0].split("[")[0] for line in (tmp_path / "wheels" / "requirements.txt").read_text().splitlines()
    ]
    assert {"jsonargparse", "simplejpeg", "tensorboardX", "opencv-python-headless"} <= set(names)
    assert not {"torch", "torchvision", "timm", "numpy", "pytest", "matplotlib", "ruff"} & set(names)
    call = (tmp_path / "call").read_text().splitlines()
    assert call[call.index("--python-version") + 1] == "3.12" and call[-1] == str(tmp_path / "wheels")


@pytest.mark.parametrize("epochs", ["2", "16 steps"])
def test_bench_train_tells_rates_and_both_speed_ups(capsys, epochs):
    """The same budget in epochs and in steps of 8 of 64 images."""
    import bench

    flags = ["--model", "test_resnet", "--model_args", "{}", "--batch_size", "8", "--micro_batch", "8"]
    flags += ["--epochs", epochs]
    args = {"recipe": str(bench.DEMO), "share": 0.5, "images": 64, "side": 80, "steps": 1, "repetitions": 1}
    result = bench.train(SimpleNamespace(**args, flags=[*flags, "--num_workers", "0"]))
    assert set(result["rates"]) == set(result["bare"]) == {"32", "48", "64"}
    assert all(rate > 0 for rate in (*result["rates"].values(), *result["bare"].values()))
    assert 1.8 < result["flops"] < 2.2 and result["wall"] > 0
    assert result["share"] == pytest.approx(result["wall"] / result["flops"], abs=0.01)
    assert capsys.readouterr().out.count("a bare loop") == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--warmup_epochs", "500 steps"], "--warmup_epochs 500"), (["--task", "mae"], "--task is mae")],
)
def test_bench_train_refuses_what_it_cannot_time(monkeypatch, capsys, flags, said):
    import bench

    small = ["--images", "64", "--", "--batch_size", "8", "--micro_batch", "8", "--epochs", "16 steps"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "train", *small, *flags])
    assert bench.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
