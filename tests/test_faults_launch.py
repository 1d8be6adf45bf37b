"""scripts/train.sh for real: two processes under torchrun, whose launcher is signalled or killed, or told wrongly."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, Run
from processes import free_port

from training.one_writer import OneWriter
from utils import Topology

pytestmark = pytest.mark.extended
LONG = {**TINY, "epochs": 2000}
MODEL = LONG.pop("model")  # code of the tests' own: the command line has to name it


class TrainSh:
    """The script, begun; as a context it leaves no process behind."""

    def __init__(self, folder, base, *flags):
        self.output, self.log = base / "out", base / "log"
        recipe = base / "tiny.yaml"
        recipe.write_text("".join(f"{key}: {value}\n" for key, value in LONG.items()))
        command = ["bash", "scripts/train.sh", str(recipe), "--nproc", "2", "--data_path", str(folder)]
        environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--output_dir", str(self.output), "--model", MODEL, *flags],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        if self.process.poll() is None:
            self.process.kill()  # its workers then end by themselves
            self.process.wait()

    def wait_for(self, happened):
        deadline = time.monotonic() + 120
        while not happened():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def wait_for_text(self, text):
        self.wait_for(lambda: text in self.log.read_text() or self.process.poll() is not None)
        assert text in self.log.read_text(), self.log.read_text()

    def stopped(self):
        """The step at which the run says that it was stopped, which is that of its checkpoint."""
        note = json.loads((self.output / "stopped.json").read_text())
        assert note == {"step": Run(self.output).state()["step"], "exit_code": 75}
        return note["step"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_signal_to_the_launcher_saves_and_stops_the_run(folder, tmp_path, name):
    with TrainSh(folder, tmp_path) as run:
        run.wait_for_text("pass 3/")
        run.process.send_signal(getattr(signal, name))
        assert run.process.wait(120) == 75, run.log.read_text()
        assert "saving and stopping" in run.log.read_text() and run.stopped() > 0
        with OneWriter(run.output, Topology(0, 1, torch.device("cpu"))):  # no worker is left
            pass


def test_a_terminal_that_goes_away_and_the_same_command_again(folder, tmp_path):
    """The terminal tells every process of its group; launched again, the run resumes at the step it stopped at."""
    with TrainSh(folder, tmp_path) as run:
        run.wait_for_text("pass 3/")
        os.killpg(run.process.pid, signal.SIGHUP)
        assert run.process.wait(120) == 75, run.log.read_text()
        step = run.stopped()
    with TrainSh(folder, tmp_path) as run:
        run.wait_for_text(f"step {step}\n")
        assert f"resuming from {run.output}/checkpoint-" in run.log.read_text()
        run.wait_for_text("stage 1/3  pass ")
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(120) == 75 and run.stopped() > step


def test_a_killed_launcher(folder, tmp_path):
    """Its workers save, stop, and give the folder free."""
    with TrainSh(folder, tmp_path) as run:
        run.wait_for_text("pass 3/")
        run.process.kill()
        run.process.wait()
        run.wait_for((run.output / "stopped.json").exists)
        assert "torchrun has died: stopping" in run.log.read_text() and run.stopped() > 0
        with OneWriter(run.output, Topology(0, 1, torch.device("cpu"))):
            pass


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--micro_batch", "3"], "--micro_batch 3"),
        (["--mixupp", "1"], "unknown setting 'mixupp'; did you mean mixup"),
        (["--lr", "fast"], "--lr"),
        (["--epochs", "-1"], "--epochs is -1"),
        (["--resume", "GOLDEN", "--model", "tests.tiny_models:plain"], "is of another run"),
    ],
)
def test_a_wrong_setting_is_wrong_usage_and_our_line_the_last(folder, tmp_path, flags, said):
    golden = str(ROOT / "tests" / "golden" / "checkpoint-v2.pth")
    with TrainSh(folder, tmp_path, *(golden if flag == "GOLDEN" else flag for flag in flags)) as run:
        assert run.process.wait(120) == 2, run.log.read_text()
        last = run.log.read_text().splitlines()[-1]
        assert last.startswith("error: [rank ") and said in last
        assert not run.output.exists()


@pytest.mark.parametrize(
    ("flags", "said"), [(["--micro_batch", "3"], "--micro_batch 3"), (["--lr", "fast"], "--lr is")]
)
def test_a_wrong_setting_on_two_machines_ends_both_with_our_line(folder, tmp_path, flags, said):
    where = ["--nproc", "1", "--nnodes", "2", "--master", f"127.0.0.1:{free_port()}"]
    bases = [tmp_path / "0", tmp_path / "1"]
    for base in bases:
        base.mkdir()
    machines = [TrainSh(folder, base, *where, "--node_rank", base.name, *flags) for base in bases]
    with machines[0], machines[1]:
        for rank, run in enumerate(machines):
            assert run.process.wait(120) == 2, run.log.read_text()
            last = run.log.read_text().splitlines()[-1]
            assert last.startswith(f"error: [rank {rank} ") and said in last
            assert not run.output.exists()
