"""A run that is killed and started again ends bit-identical to one that was not, around a stage boundary too."""

import gc
import signal
import weakref
from functools import partial
from pathlib import Path

import pytest
from conftest import Run, flags, same
from processes import Program, kill_after_epoch, kill_after_step

from curriculum import build_plan
from models import checkpoints
from training import session

# A Transformer, whose weights, moments and moving average change shape at the boundary; everything random is on.
SETTINGS = {
    "model": "test_vit",
    "model_ema": True,
    "model_ema_decay": 0.9,
    "drop_path": 0.2,
    "model_args": {"patch_drop_rate": 0.25},
    "clip_grad": 1.0,
    "amp": "bf16",
    "save_interval": "3 steps",
}
BOUNDARY = 9  # optimizer steps of the first stage; the second ends at 17


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory, main_program):
    output = tmp_path_factory.mktemp("undisturbed")
    assert main_program(flags(output_dir=output, data_path=folder, **SETTINGS)) == 0
    return Run(output).result()


def test_boundary():
    plan = build_plan("efficienttrain++", epochs=2, num_images=48, batch_size=8, base_size=64)
    assert [stage.first_step for stage in plan.stages] == [0, BOUNDARY, 17]


@pytest.mark.parametrize(
    "fault, resumed_from, more",
    [
        (partial(kill_after_step, BOUNDARY - 1), 6, {}),
        (partial(kill_after_epoch, 1), BOUNDARY, {"num_workers": 2}),
        (partial(kill_after_step, BOUNDARY + 5), BOUNDARY + 3, {}),
    ],
    ids=["before", "at", "after"],
)
def test_killed_around_a_stage_boundary(folder, tmp_path, undisturbed, fault, resumed_from, more):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, **more})
    assert Program(argv, tmp_path / "first", fault=fault).wait() == -signal.SIGKILL
    assert Run(tmp_path / "run").state()["step"] == resumed_from
    second = Program(argv, tmp_path / "second")
    assert second.wait() == 0
    assert f"step {resumed_from}" in second.output.splitlines()[0]
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_killed_again_and_again(folder, tmp_path, undisturbed):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "save_interval": "1 steps"})
    for step in (2, 9, 10, 18, 22):
        assert Program(argv, tmp_path / f"log{step}", fault=partial(kill_after_step, step)).wait() == -signal.SIGKILL
        assert Run(tmp_path / "run").state()["step"] == step - 1
    assert Program(argv, tmp_path / "last").wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_stop_after_ends_a_run_and_the_command_without_it_goes_on(folder, tmp_path, undisturbed, main_program, capsys):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    for duration, step in (("4 steps", 4), ("9 steps", BOUNDARY), ("9 steps", BOUNDARY), ("60%", 18)):
        assert main_program([*argv, "--stop_after", duration]) == 0
        assert f"ended after step {step}, as --stop_after says" in capsys.readouterr().out
        assert Run(tmp_path / "run").state()["step"] == step
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert main_program([*argv, "--stop_after", "1000 steps"]) == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_killed_before_the_first_checkpoint(folder, tmp_path, undisturbed):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    assert Program(argv, tmp_path / "first", fault=partial(kill_after_step, 2)).wait() == -signal.SIGKILL
    assert Program(argv, tmp_path / "second").wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


@pytest.mark.parametrize("tamper", ["weight", "moment", "seed"])
def test_a_run_that_did_not_go_on_exactly_is_noticed(folder, tmp_path, undisturbed, tamper, main_program):
    """Negative control: one number of the checkpoint changed, or another seed, and the end differs."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    assert Program(argv, tmp_path / "first", fault=partial(kill_after_epoch, 1)).wait() == -signal.SIGKILL
    path = tmp_path / "run" / "checkpoint-last.pth"
    state = checkpoints.load(path)
    if tamper == "weight":
        state["model"]["pos_embed"].view(-1)[0] += 1e-6
    elif tamper == "moment":
        state["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1e-6
    else:
        argv += ["--seed", "1", "--allow_change", "seed"]
    checkpoints.save(path, state)
    (tmp_path / "run" / f"checkpoint-{BOUNDARY}.pth").unlink()
    assert main_program(argv) == 0
    assert not same(Run(tmp_path / "run").result(), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_by_a_signal(folder, tmp_path, undisturbed, number):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS, **{"log_interval": "1 steps"})
    first = Program(argv, tmp_path / "first")
    first.wait_for("step 5/")
    first.signal(number)
    assert first.wait() == 75
    assert "stopped by a signal" in first.output
    assert 5 <= Run(tmp_path / "run").state()["step"] < 22
    assert (tmp_path / "run" / "stopped.json").exists()
    assert Program(argv, tmp_path / "second").wait() == 0
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_log_of_later_steps_is_cut_back(folder, tmp_path, main_program):
    """A kill between the record and the checkpoint leaves a record too many; it is written again, not twice."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, save_interval="1 steps", keep_checkpoints=100)
    assert main_program(argv) == 0
    whole = Run(tmp_path / "run").result()
    for path in (tmp_path / "run").glob("checkpoint-*.pth"):
        if path.name != "checkpoint-8.pth":
            path.unlink()
    with open(tmp_path / "run" / "log.txt", "a") as file:
        file.write('{"epoch": 5, "st')  # cut short
    assert main_program(argv) == 0
    assert same(Run(tmp_path / "run").result(), whole)


@pytest.mark.parametrize("version", [1, 2])
def test_going_on_from_every_checkpoint_format(folder, tmp_path, main_program, version):
    """The end of a run whose first 9 steps were trained when that format was new, on other images."""
    golden = Path(__file__).parent / "golden" / f"checkpoint-v{version}.pth"
    output = tmp_path / "run"
    argv = flags(output_dir=output, data_path=folder, model="tests.tiny_models:plain", model_ema=True, resume=golden)
    assert main_program([*argv, "--allow_change", "data"]) == 0
    state = Run(output).state()
    assert state["step"] == 22 and [record["epoch"] for record in Run(output).log()] == [2, 3, 4]
    moments = state["optimizer"]["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {22}  # the optimizer went on too


def test_the_command_with_resume_goes_on_from_what_it_has_done(folder, tmp_path, main_program, capsys):
    """Launched again, --resume FILE does not go back to the file; another file is another start."""
    first = flags(output_dir=tmp_path / "first", data_path=folder, save_interval="1 steps", keep_checkpoints=100)
    assert main_program(first) == 0
    argv = flags(output_dir=tmp_path / "second", data_path=folder, save_interval="1 steps")
    from_8 = [*argv, "--resume", str(tmp_path / "first" / "checkpoint-8.pth")]
    from_4 = [*argv, "--resume", str(tmp_path / "first" / "checkpoint-4.pth")]
    assert Program(from_8, tmp_path / "log", fault=partial(kill_after_step, 12)).wait() == -signal.SIGKILL
    for command, source, step in ((from_8, "second", 11), (from_4, "first", 4)):
        capsys.readouterr()
        assert main_program(command) == 0
        said = capsys.readouterr().out
        assert f"{source}/checkpoint-" in said.splitlines()[0] and f"step {step}" in said.splitlines()[0]
    assert same(Run(tmp_path / "second").result()["state"], Run(tmp_path / "first").result()["state"])


def test_the_checkpoint_is_not_kept_in_memory(train, monkeypatch):
    """It is as large as the model with its moments; after a resume nothing refers to it."""

    class Payload(dict):
        """A dictionary to which there can be weak references."""

    train(stop_after="4 steps", **SETTINGS)
    load, after_step, loaded, alive = checkpoints.load, session.Session.after_step, [], []

    def weakly(path):
        payload = Payload(load(path))
        loaded.append(weakref.ref(payload))
        return payload

    def look(self, lr, images):
        gc.collect()
        alive.append(sum(reference() is not None for reference in loaded))
        return after_step(self, lr, images)

    monkeypatch.setattr(checkpoints, "load", weakly)
    monkeypatch.setattr(session.Session, "after_step", look)
    train(stop_after="6 steps", **SETTINGS)
    assert loaded and alive == [0, 0]
