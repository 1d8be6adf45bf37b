"""docs/own_loop.md: a stopped run resumes to the weights of a run without a stop, alone and in other trainers; several
processes; the sampler alone."""

import json
import os
import runpy
import subprocess
import sys
from itertools import chain

import pytest
import timm
import torch
from conftest import ROOT, same
from processes import free_port
from test_own_loop import PROGRAMS

from curriculum import IndexSampler, LiveCurriculum, build_plan
from models import create_model

PLAN = build_plan(epochs=2, num_images=96, batch_size=8, base_size=64)
STOP = PLAN.stages[1].first_step + 7  # inside the second stage, and inside a pass


class Stopped(Exception):
    pass


def run(name, folder, monkeypatch, stop=None):
    """A program of the page in a folder, stopped before a step. Returns (its names, the steps that it started)."""
    (folder / "output").mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(PROGRAMS[name])
    monkeypatch.chdir(folder)
    started, original = [], LiveCurriculum.start_step

    def start_step(live, step):
        if step == stop:
            raise Stopped
        started.append(step)
        return original(live, step)

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(LiveCurriculum, "start_step", start_step)
        try:
            return runpy.run_path(name), started
        except Stopped:
            return None, started


def result(names):
    """All that a run ends with."""
    model, optimizer, live = names["live"].model, names["live"].optimizer, names["live"]
    return [model.state_dict(), optimizer.state_dict()["state"], live.state_dict()]


@pytest.mark.parametrize(
    "name",
    [
        "resume.py",
        pytest.param("lightning_run.py", marks=pytest.mark.extended),
        pytest.param("transformers_run.py", marks=pytest.mark.extended),
        pytest.param("accelerate_run.py", marks=pytest.mark.extended),
    ],
)
def test_a_stopped_run_resumes_to_equal_weights(name, tmp_path, monkeypatch):
    if name != "resume.py":
        pytest.importorskip(name.removesuffix("_run.py"))
    if name == "transformers_run.py":  # in this process `datasets` is this project's module, not Hugging Face's
        import transformers.trainer

        monkeypatch.setattr(transformers.trainer, "is_datasets_available", lambda: False)
    whole, steps = run(name, tmp_path / "whole", monkeypatch)
    assert steps == list(range(PLAN.total_steps))
    _, before = run(name, tmp_path / "stopped", monkeypatch, STOP)
    assert before == list(range(STOP))
    resumed, after = run(name, tmp_path / "stopped", monkeypatch)
    assert STOP - 5 <= after[0] <= STOP and after == list(range(after[0], PLAN.total_steps))
    assert PLAN.locate(after[0] - 1)[0].stage == 1  # so that the weights had another shape than at the start
    assert same(result(resumed), result(whole))
    assert whole["live"].saved > 0.3


def test_a_resume_that_forgets_the_curriculum_is_noticed(tmp_path, monkeypatch):
    """The negative control: without its state the model has other shapes than the checkpoint's."""
    run("resume.py", tmp_path, monkeypatch, STOP)
    monkeypatch.setattr(LiveCurriculum, "load_state_dict", lambda live, state: None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run("resume.py", tmp_path, monkeypatch)


def test_a_state_of_another_plan_is_refused():
    model = create_model("tests.tiny_models:convnet", 3, 64)
    state = json.loads(json.dumps(LiveCurriculum(PLAN, model).state_dict()))
    longer = LiveCurriculum(build_plan(epochs=3, num_images=96, batch_size=8, base_size=64), model)
    with pytest.raises(ValueError, match="of another plan"):
        longer.load_state_dict(state)


def test_state_survives_json():
    live = LiveCurriculum(PLAN, create_model("test_vit", 3, 64))
    for step in (0, STOP):
        live.start_step(step)
        live.model(torch.rand(2, 3, 64, 64))
    other = LiveCurriculum(PLAN, create_model("test_vit", 3, 64))
    other.load_state_dict(json.loads(json.dumps(live.state_dict())))
    assert (other.step, other.seen, other.input_size) == (STOP + 1, {32: 2, 48: 2}, 48)
    assert other.model.pos_embed.shape == live.model.pos_embed.shape


# -- several processes -------------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """Refuses parameters of other shapes than it was made for, as a data-parallel wrapper would."""

    def __init__(self, model):
        super().__init__()
        self.module, self.shapes = model, [parameter.shape for parameter in model.parameters()]

    def forward(self, images):
        assert self.shapes == [parameter.shape for parameter in self.module.parameters()]
        return self.module(images)


def test_a_wrapper_is_made_anew_at_each_stage():
    made = []

    def wrap(model):
        made.append(model.input_size)
        return Wrapper(model)

    live = LiveCurriculum(PLAN, create_model("test_vit", 3, 64), wrap=wrap)
    for stage in PLAN.stages:
        for step in (stage.first_step, stage.first_step + 1):
            live.start_step(step)
            live.wrapped(torch.rand(2, 3, 64, 64)).sum().backward()
    assert made == [32, 48, 64] and live.seen == {32: 4, 48: 4, 64: 4}


def test_without_a_wrapper_the_model_is_called_as_it_was_given():
    model = torch.nn.DataParallel(create_model("tests.tiny_models:convnet", 3, 64))
    assert LiveCurriculum(PLAN, model).wrapped is model


def processes(folder, name, count, launcher):
    """Runs a program of the page in so many processes; returns the weights that it ends with."""
    folder.mkdir(exist_ok=True)
    more = "\nif rank == 0:\n    torch.save(live.model.state_dict(), 'weights.pt')\n"
    stop = (
        "import os, curriculum.live\noriginal = curriculum.live.LiveCurriculum.start_step\n"
        "def start_step(live, step):\n    if str(step) == os.environ.get('STOP'):\n        raise SystemExit(3)\n"
        "    return original(live, step)\ncurriculum.live.LiveCurriculum.start_step = start_step\n"
    )
    (folder / name).write_text(stop + PROGRAMS[name] + more)
    command = [sys.executable, "-m", *launcher(count), name]

    def call(**environment):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return call


def torchrun(count):
    port = f"--master_port={free_port()}"
    return ["torch.distributed.run", f"--nproc_per_node={count}", "--master_addr=127.0.0.1", port]


def accelerate(count):
    several = ["--num_processes", str(count), "--num_machines", "1", "--main_process_port", str(free_port())]
    # Without MPI its launcher starts several processes for GPUs alone; the program says that it wants the CPU.
    return ["accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", *several]


def logits(weights=None):
    """Of the page's model. Weights may differ: some, such as the bias of keys, change no output, and Adam moves them by
    what rounding leaves of their gradients."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=64).eval()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        return model(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.extended
def test_two_processes_end_with_the_weights_of_one(tmp_path):
    for count in (1, 2):
        done = processes(tmp_path / str(count), "processes.py", count, torchrun)()
        assert done.returncode == 0, done.stderr
    one, two = (logits(tmp_path / str(count) / "weights.pt") for count in (1, 2))
    torch.testing.assert_close(one, two, atol=5e-3, rtol=0)
    assert (one - logits()).abs().max() > 0.05  # it learned something


@pytest.mark.extended
def test_accelerate_on_two_processes_resumes_to_equal_weights(tmp_path):
    pytest.importorskip("accelerate")
    done = processes(tmp_path / "whole", "accelerate_run.py", 2, accelerate)()
    assert done.returncode == 0, done.stderr
    call = processes(tmp_path / "stopped", "accelerate_run.py", 2, accelerate)
    assert call(STOP=str(STOP)).returncode != 0 and not (tmp_path / "stopped" / "weights.pt").exists()
    done = call()
    assert done.returncode == 0, done.stderr
    ends = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "stopped")]
    assert same(*ends)


# -- the sampler alone -------------------------------------------------------------------------------------------------


def test_the_sampler_alone_resumes_inside_a_pass_on_other_numbers_of_processes():
    plan = build_plan("none", epochs=3, num_images=96, batch_size=12)
    whole = list(IndexSampler(plan, seed=1))
    steps = []
    for world_size, first, last in ((1, 0, 3), (2, 3, 13), (3, 13, 24)):
        ranks = [IndexSampler(plan, seed=1, rank=r, world_size=world_size, start_step=first) for r in range(world_size)]
        assert all(len(sampler) == 24 - first for sampler in ranks)
        batches = [list(sampler)[: last - first] for sampler in ranks]
        steps += [list(chain(*shares)) for shares in zip(*batches)]
    assert steps == whole
    passes = [list(chain(*steps[8 * k : 8 * k + 8])) for k in range(3)]
    assert all(sorted(images) == list(range(96)) for images in passes)
    assert passes[0] != passes[1] != passes[2]
