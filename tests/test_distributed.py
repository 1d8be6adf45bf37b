"""Several processes: the same run as one, to float tolerance, and every image scored once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from multiprocessing.util import Finalize

import pytest
import torch
from conftest import ROOT, Run, flags, write_images
from processes import free_port, world
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import datasets
import engine
from training import session

# Mixing and erasing are on. Off is what draws per forward pass or looks at the whole batch: drop path and BatchNorm.
SETTINGS = {"model_ema": True, "model_ema_decay": 0.9, "clip_grad": 1.0, "micro_batch": 2, "eval_interval": "1 steps"}
# A key's bias in attention has no gradient but rounding, which AdamW's own epsilon would blow up to whole steps.
SETTINGS["opt_eps"] = 1e-4
MODELS = {"convnet": "test_convnext", "transformer": "test_vit"}


def torchrun(argv, processes=2, timeout=150):
    """A real ``torchrun``; returns (exit code, its output)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "main.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def assert_close(a, b):
    """Weights, moving average and moments to float tolerance, and the log's losses and scores."""
    for key in ("model", "model_ema"):
        for name, value in a.state()[key].items():
            torch.testing.assert_close(value, b.state()[key][name], rtol=2e-4, atol=2e-5, msg=f"{key} {name}")
    for one, other in zip(a.log(), b.log(), strict=True):
        assert one["step"] == other["step"] and one["images"] == other["images"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        if "test_loss" in one:
            assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)
            assert one["eval_images"] == other["eval_images"] == 15
            assert abs(one["test_acc1"] - other["test_acc1"]) < 7  # one of 15 on the edge


@pytest.mark.parametrize("kind", MODELS)
def test_two_processes_end_like_one(folder, tmp_path, main_program, kind):
    """Under a real torchrun; the Transformer's position embedding is resized at each of the two switches."""

    def argv(name, **more):
        settings = {"model": MODELS[kind], "output_dir": tmp_path / name, "data_path": folder, **SETTINGS, **more}
        return flags(**settings)

    code, output = torchrun(argv("two"))
    assert code == 0, output
    assert output.count("stage 1/3  pass 1/") == 1  # one process speaks
    assert main_program(argv("one")) == 0
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert {record["input_size"] for record in two.log()} == {32, 48, 64}
    assert_close(one, two)
    if kind == "transformer":  # negative control: what the tolerance is there for is far smaller than another seed
        assert main_program([*argv("other"), "--seed", "1"]) == 0
        with pytest.raises(AssertionError):
            assert_close(one, Run(tmp_path / "other"))


def test_four_processes_and_accumulation(folder, tmp_path, main_program):
    """Four processes of one group each, and two that accumulate two: forked, which is faster than torchrun."""
    settings = {"model": "tests.tiny_models:plain", "data_path": folder, **SETTINGS}
    for size in (4, 2):
        for program in world(flags(output_dir=tmp_path / f"run{size}", **settings), tmp_path / f"log{size}", size):
            assert program.wait() == 0, program.output
    assert main_program(flags(output_dir=tmp_path / "run1", **settings)) == 0
    for size in (4, 2):
        assert_close(Run(tmp_path / "run1"), Run(tmp_path / f"run{size}"))


UNEVEN = {"model": "tests.tiny_models:plain", **SETTINGS, "batch_size": 16, "micro_batch": 2}  # 8 groups: 3 + 3 + 2


def mean_of_means():
    """Each process's gradient counts the same, whatever its share: what averaging alone would do."""
    original = engine.forward_loss

    def forward_loss(t, images, targets, step, groups, seeds):
        shares = t.sampler.shares(t.plan.locate(step)[0])
        weight = sum(shares) / len(shares) / shares[t.sampler.rank]
        return original(t, images, targets, step, groups, seeds) * weight

    engine.forward_loss = forward_loss


def test_three_processes_of_unequal_shares_end_like_one(folder, tmp_path, main_program):
    """And not if the shares were not weighted; what is logged and scored is one process's, too."""
    assert main_program(flags(output_dir=tmp_path / "one", data_path=folder, **UNEVEN)) == 0
    for name, fault in (("three", None), ("unweighted", mean_of_means)):
        argv = flags(output_dir=tmp_path / name, data_path=folder, **UNEVEN)
        programs = world(argv, tmp_path / f"{name}.log", 3, faults=dict.fromkeys(range(3), fault))
        for program in programs:
            assert program.wait() == 0, program.output
    assert "8 groups over 3 devices: 3+3+2, 11 % of the time idle" in programs[0].output
    one = Run(tmp_path / "one")
    assert {record["input_size"] for record in one.log()} == {32, 48, 64}
    assert_close(one, Run(tmp_path / "three"))
    with pytest.raises(AssertionError):
        assert_close(one, Run(tmp_path / "unweighted"))


def test_gradients_are_reduced_once_per_step(folder, tmp_path):
    """Accumulating two passes on one of three: as many reductions as optimizer steps, counted in the process."""
    argv = flags(
        output_dir=tmp_path / "run",
        data_path=folder,
        model="tests.tiny_models:plain",
        curriculum="none",
        micro_batch=2,
        epochs=1,
    )
    for program in world(argv, tmp_path / "log", 3, faults=dict.fromkeys(range(3), count_reductions)):
        assert program.wait() == 0, program.output
        assert "gradient reductions: 6" in program.output


def count_reductions():
    """Counts DDP's reductions through its communication hook, and tells them at the end."""
    import main

    count, original = [0], main.wrap

    def wrap(model, topology, compile_model):
        wrapped = original(model, topology, compile_model)

        def hook(state, bucket):
            count[0] += 1
            return default_hooks.allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, hook)
        return wrapped

    main.wrap = session.wrap = wrap
    Finalize(None, lambda: print(f"gradient reductions: {count[0]}", flush=True), exitpriority=9)


def test_batchnorm_is_evaluated_with_the_first_process_s_statistics(folder, tmp_path, main_program, capsys):
    """Every process scores its share with the same model, that of the checkpoint."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, model_ema=True, epochs=1)
    for program in world(argv, tmp_path / "log", 2):
        assert program.wait() == 0, program.output
    run = Run(tmp_path / "run")
    capsys.readouterr()
    assert main_program(flags(data_path=folder, eval=True, resume=run.output / "checkpoint-last.pth")) == 0
    raw, ema = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert raw["loss"] == pytest.approx(run.log()[-1]["test_loss"], abs=1e-5)
    assert ema["loss"] == pytest.approx(run.log()[-1]["test_loss_ema"], abs=1e-5)


@pytest.mark.parametrize("images", [1, 7, 15])
def test_each_image_is_scored_once_whatever_the_share(folder, tmp_path, images):
    """Also when there are fewer than processes, so that one of them has none."""
    data = tmp_path / "data"
    write_images(data / "train", [8])
    write_images(data / "val", [images])
    argv = flags(output_dir=tmp_path / "run", data_path=data, epochs=2, model_ema=True, curriculum="none")
    for program in world(argv, tmp_path / "log", 2):
        assert program.wait() == 0, program.output
    assert Run(tmp_path / "run").log()[-1]["eval_images"] == images


def test_a_batch_that_does_not_share_out(folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, batch_size=8, micro_batch=8)
    for rank, program in enumerate(world(argv, tmp_path / "log", 2)):
        assert program.wait() == 2
        line = program.output.strip().splitlines()[-1]
        assert line.startswith(f"error: [rank {rank} on {socket.gethostname()}] --micro_batch 8 makes 1 group of ")
        assert line.endswith("--batch_size 8, fewer than 2 processes; 4 would serve")
    assert not (tmp_path / "run").exists()


def fails_in_step(step, kind=torch.OutOfMemoryError):
    """An error in the forward pass of ``step``; as under NCCL, taking the process group down waits for the others."""
    original = engine.forward_loss

    def forward_loss(t, images, targets, number, *rest):
        if number == step:
            raise kind("CUDA out of memory (a fake)")
        return original(t, images, targets, number, *rest)

    engine.forward_loss = forward_loss
    torch.distributed.destroy_process_group = lambda: (print("taken down", flush=True), time.sleep(600))


def and_its_loader_hangs(step, kind=torch.OutOfMemoryError):
    fails_in_step(step, kind)
    original = datasets.TrainSet.__getitem__
    count = [0]

    def getitem(self, sample):
        count[0] += 1
        if count[0] > 24:
            time.sleep(600)
        return original(self, sample)

    datasets.TrainSet.__getitem__ = getitem


@pytest.mark.parametrize(
    "fault, workers, said",
    [
        (partial(fails_in_step, 3), 0, "out of device memory: lower --micro_batch"),
        (partial(and_its_loader_hangs, 3), 1, "out of device memory: lower --micro_batch"),
        (partial(fails_in_step, 3, KeyError), 0, "KeyError: 'CUDA out of memory (a fake)'"),
    ],
)
def test_an_error_of_one_process_is_told_at_once_and_ends_it(folder, tmp_path, fault, workers, said):
    """Whatever its loader does, and though taking the process group down would wait for ever."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, num_workers=workers, save_interval="100%")
    first, second = world(argv, tmp_path / "log", 2, faults={1: fault})
    second.wait_for(said, timeout=60)
    assert second.wait(timeout=10) == 1
    assert ("taken down" not in second.output and "error: [rank 1 on " in second.output) or "Traceback" in second.output
    assert first.wait(timeout=60) == 1  # under gloo the other one notices; torchrun ends it under NCCL
    assert "lost another process" in first.output


def test_processes_that_succeed_take_the_group_down(folder, tmp_path):
    """The control of the one above: then it waits, as said."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, epochs=1, curriculum="none")
    programs = world(argv, tmp_path / "log", 2, faults={0: partial(fails_in_step, -1), 1: partial(fails_in_step, -1)})
    for program in programs:
        program.wait_for("taken down")
        program.signal(signal.SIGKILL)
