"""Preemption and dying processes: a run stops in order, or is started again, and ends as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT, Run, flags, same
from processes import Program, call_before, free_port, kill_after_step, several, signal_self, world
from test_distributed import assert_close

# BatchNorm, dropout, moving average, loader processes, accumulation; evaluations at both ends of the switches.
SETTINGS = {
    "model": "tests.tiny_models:convnet",
    "model_ema": True,
    "model_ema_decay": 0.9,
    "micro_batch": 2,
    "eval_interval": "1 steps",
    "save_interval": "3 steps",
    "num_workers": 1,
}
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory, main_program):
    output = tmp_path_factory.mktemp("undisturbed")
    assert main_program(flags(output_dir=output, data_path=folder, **SETTINGS)) == 0
    return Run(output).result()


@pytest.fixture(scope="module")
def undisturbed_by_two(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    for program in world(flags(output_dir=path / "run", data_path=folder, **SETTINGS), path / "log", 2):
        assert program.wait() == 0, program.output
    return Run(path / "run").result()


MOMENTS = {
    "loader start": ("training.session:make_batches", 1),
    "first step": ("engine:forward_loss", 1),
    "mid-accumulation": ("engine:set_hyperparameters", 8),  # before the first of its passes
    "last step of an epoch": ("training.session:Session.after_step", 6),
    "evaluation": ("main:validate", 1),
    "in an evaluation": ("training.session:Session.after_batch", 2),
    "evaluation of the average": ("training.validation:evaluate", 2),
    "checkpointing": ("models.checkpoints:save", 2),
    "size change": ("training.session:set_input_size", 1),
    "logging": ("training.session:RunLog.epoch", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(folder, tmp_path, undisturbed, moment):
    place, count = MOMENTS[moment]
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    first = Program(argv, tmp_path / "first", fault=partial(call_before, place, signal_self, TERM, count=count))
    assert first.wait() == 75, first.output
    assert "stopped by a signal after step" in first.output and "Traceback" not in first.output
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert note == {"step": Run(tmp_path / "run").state()["step"], "exit_code": 75} and note["step"] < 22
    assert Program(argv, tmp_path / "second").wait() == 0
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert same(Run(tmp_path / "run").result(), undisturbed)


@pytest.mark.parametrize("moment", ["first step", "in an evaluation", "checkpointing"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(folder, tmp_path, undisturbed_by_two, moment, rank):
    place, count = MOMENTS[moment]
    rank = 0 if moment == "checkpointing" else rank  # the one that writes
    number = USR1 if rank else TERM
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    fault = partial(call_before, place, signal_self, number, count=count)
    for program in world(argv, tmp_path / "first", 2, faults={rank: fault}):
        assert program.wait() == 75, program.output
    assert (tmp_path / "run" / "stopped.json").exists()
    for program in world(argv, tmp_path / "second", 2):
        assert program.wait() == 0, program.output
    assert same(Run(tmp_path / "run").result(), undisturbed_by_two)


def test_a_second_signal_changes_nothing(folder, tmp_path, undisturbed):
    """To the process while it saves, and to its loader processes too, as a cluster does."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    stop = partial(call_before, "training.session:Session.after_step", signal_group, TERM, count=5)
    again = partial(call_before, "models.checkpoints:os.replace", signal_group, TERM, USR1, TERM, count=12)
    first = Program(argv, tmp_path / "first", fault=partial(several, stop, again))
    assert first.wait() == 75, first.output
    assert first.output.count("SIGTERM: saving") == 1
    assert Program(argv, tmp_path / "second").wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def signal_group(*numbers):
    for number in numbers:
        os.killpg(os.getpgid(0), number)


def test_without_the_handler_a_signal_would_lose_steps(folder, tmp_path):
    """Negative control: what a signal does to a process that does not listen."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    deaf = partial(call_before, "training.session:Session.after_step", default_then_term, count=5)
    assert Program(argv, tmp_path / "first", fault=deaf).wait() == -TERM
    assert Run(tmp_path / "run").state()["step"] == 3


def default_then_term():
    signal.signal(TERM, signal.SIG_DFL)
    signal_self(TERM)


def test_saving_by_the_clock(folder, tmp_path, undisturbed_by_two):
    """Minutes on the main process's clock, of which each step takes more; both processes save at the same steps."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "save_interval": "0.00001 minutes"})
    argv += ["--keep_checkpoints", "100"]
    kill = {rank: partial(kill_after_step, 14) for rank in range(2)}
    programs = world(argv, tmp_path / "first", 2, faults=kill)
    assert [program.wait() for program in programs] == [-signal.SIGKILL] * 2
    steps = {int(path.stem.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-[0-9]*.pth")}
    assert len(steps) >= 3
    for program in world(argv, tmp_path / "second", 2):
        assert program.wait() == 0, program.output
    assert same(Run(tmp_path / "run").result(), undisturbed_by_two)


# -- torchrun ----------------------------------------------------------------------------------------------------------


def torchrun(argv, log, *options, restarts=0, script="main.py", environment=None):
    """Starts a real torchrun of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", str(restarts)]
    command += ["--monitor_interval", "0.1", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | (
        environment or {}
    )
    with open(log, "w") as file:
        return subprocess.Popen(
            [*command, *options, str(ROOT / script), *argv],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process, log, timeout=120):
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"torchrun still running after {timeout} s:\n{log.read_text()}") from None


def test_torchrun_starts_a_killed_rank_again(folder, tmp_path, main_program, undisturbed_by_two):
    """Rank 1 is killed at step 8 of the first try: on from step 6, bit-identical; and with one process, close."""
    log = tmp_path / "log"
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    process = torchrun(argv, log, restarts=1, script="tests/killed_once.py")
    assert end(process, log) == 0, log.read_text()
    said = log.read_text()
    assert "killing rank 1" in said and said.count("resuming from") == 1 and "step 6" in said
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert same(Run(tmp_path / "run").result(), undisturbed_by_two)


def test_torchrun_does_not_restart_what_was_stopped(folder, tmp_path, undisturbed_by_two):
    """It turns 75 into a failure and restarts the workers; they find the note and leave it to a new launch."""
    log = tmp_path / "log"
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    process = torchrun(argv, log, restarts=2, script="tests/killed_once.py", environment={"FAULT": "stop"})
    assert end(process, log) != 0
    said = log.read_text()
    assert "stopped by a signal" in said and "launch the command again" in said
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["exit_code"] == 75
    stopped_at = Run(tmp_path / "run").state()["step"]
    assert 8 <= stopped_at <= 10
    for program in world(argv, tmp_path / "second", 2):
        assert program.wait() == 0, program.output
    assert same(Run(tmp_path / "run").result(), undisturbed_by_two)


def test_on_with_another_number_of_processes(folder, tmp_path, main_program):
    """Two are killed, one goes on, without being told the micro-batch: the same images, weights to float tolerance."""
    settings = {**SETTINGS, "model": "test_convnext", "num_workers": 0, "micro_batch": None}
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **settings)
    kill = {rank: partial(kill_after_step, 10) for rank in range(2)}
    assert [program.wait() for program in world(argv, tmp_path / "log", 2, faults=kill)] == [-signal.SIGKILL] * 2
    assert main_program(argv) == 0
    assert main_program(flags(output_dir=tmp_path / "one", data_path=folder, **{**settings, "micro_batch": 4})) == 0
    assert_close(Run(tmp_path / "run"), Run(tmp_path / "one"))
    assert Run(tmp_path / "run").state()["config"]["micro_batch"] == 4


@pytest.mark.extended
def test_soak(tmp_path):
    """A sample of scripts/soak.sh."""
    command = [sys.executable, str(ROOT / "tests" / "soak.py"), "--runs", "12", "--minutes", "2", "--seed", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: 0" in done.stdout and "identical endings: " in done.stdout


# -- hangs -------------------------------------------------------------------------------------------------------------

QUICK = {**SETTINGS, "timeout": 0.1}  # 6 s: longer than anything that does not hang takes on a busy machine


def test_a_dead_process_is_reported_by_the_others(folder, tmp_path):
    """At once, or when its loader processes have noticed, which hold its connections open for up to 5 s."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "timeout": 0.3})
    programs = world(argv, tmp_path / "log", 2, faults={1: partial(kill_after_step, 4)})
    assert programs[1].wait() == -signal.SIGKILL
    assert programs[0].wait(60) == 1
    (line,) = [line for line in programs[0].output.splitlines() if line.startswith("error: ")]
    assert "[rank 0 on " in line and "lost another process" in line and "Traceback" not in programs[0].output


def test_a_process_that_hangs_is_reported_with_rank_host_and_place(folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **QUICK)
    hang = partial(call_before, "training.session:Session.after_step", time.sleep, 1000, count=4)
    programs = world(argv, tmp_path / "log", 2, faults={1: hang})
    assert [program.wait() for program in programs] == [1, 1]  # of waits that would take 1000 s
    said = programs[1].output
    assert f"error: [rank 1 of 2 on {os.uname().nodename}] nothing happened for 6 s" in said
    assert "while training, after step 3" in said and "--timeout" in said


def test_an_evaluation_alone_that_hangs(folder, tmp_path, main_program):
    assert main_program(flags(output_dir=tmp_path / "run", data_path=folder, epochs=1)) == 0
    argv = flags(data_path=folder, eval=True, resume=tmp_path / "run" / "checkpoint-last.pth", timeout=0.1)
    hang = partial(call_before, "inputs.transforms:EvalTransform.__call__", time.sleep, 1000, count=9)
    program = Program(argv, tmp_path / "log", fault=hang)
    assert program.wait(60) == 1
    assert "error: [rank 0 of 1 on " in program.output and "while evaluating" in program.output


@pytest.mark.parametrize("action", ["stop", "kill"])
def test_a_loader_process_that_hangs_or_dies(folder, tmp_path, action):
    settings = QUICK if action == "stop" else SETTINGS
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **settings)
    program = Program(
        argv, tmp_path / "log", fault=partial(call_before, "inputs.bad_files:load", harm, action, count=20)
    )
    assert program.wait(60) == 1
    said = [line for line in program.output.splitlines() if line.startswith("error: ")]
    if action == "stop":
        assert "[rank 0 of 1 on " in said[0] and "nothing happened for 6 s while" in said[0]
        assert "dataloader.py" in said[0]
    else:
        assert "DataLoader worker" in said[0] and "--num_workers" in said[0]
    assert len(said) == 1


def harm(action):
    """In a loader process, since that is where images are read."""
    os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)


def test_a_process_that_never_comes_is_not_waited_for_for_ever(folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **QUICK)
    (program,) = world(argv, tmp_path / "log", 1, environment={"WORLD_SIZE": "2"})
    assert program.wait(60) == 1
    (line,) = [line for line in program.output.splitlines() if line.startswith("error: ")]
    assert "[rank 0 on " in line and "another process" in line
