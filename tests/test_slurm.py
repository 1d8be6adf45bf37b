"""scripts/slurm.sh against stand-ins for sbatch, srun and scontrol, and (extended) with real training under them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, flags
from test_scripts import PYTHON, Checkout

# Each notes its arguments, one JSON list a line; sbatch can also run what it was given, as Slurm would.
NOTE = f"""#!/bin/bash
"{sys.executable}" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$(basename "$0")" "$@" >> "$NOTES"
"""
SCONTROL = NOTE + '[ "$2" != hostnames ] || echo 127.0.0.1\n'
SRUN = NOTE + 'eval "${SRUN_DOES:-true}"\n'


class Cluster(Checkout):
    """A checkout with a Slurm of stand-ins."""

    def __init__(self, base):
        super().__init__(base)
        self.notes_file = base / "notes"
        self.torchrun_knows("--signals_to_handle --shutdown_timeout")
        for name, text in (("sbatch", NOTE), ("scontrol", SCONTROL), ("srun", SRUN)):
            self.program(self.tools / name, text)
        for name in ("basename", "head", "rm", "grep", "touch"):
            (self.tools / name).symlink_to(shutil.which(name))

    def torchrun_knows(self, options):
        answer = f'"-m torch.distributed.run --help") echo "{options}"; exit ;;\n"-m "*) exit ;;'
        self.program(self.active / "bin" / "python", PYTHON.replace('"-m "*) exit ;;', answer))

    def call(self, *arguments, **environment):
        """Runs slurm.sh; returns the finished process and what the stand-ins were asked."""
        self.notes_file.unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", str(self.root / "scripts" / "slurm.sh"), *map(str, arguments)],
            cwd=self.home,
            env={
                "PATH": str(self.tools),
                "HOME": str(self.home),
                "VIRTUAL_ENV": str(self.active),
                "CALLS": str(self.calls_file),
                "NOTES": str(self.notes_file),
                "TORCHRUN": "",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        notes = (
            [json.loads(line) for line in self.notes_file.read_text().splitlines()] if self.notes_file.exists() else []
        )
        return result, notes

    def job(self, command, **environment):
        """Runs what sbatch was given, with the variables that Slurm sets."""
        start = next(index for index, text in enumerate(command) if text.endswith("slurm.sh"))
        slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", **environment}
        return self.call(*command[start + 1 :], **slurm)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for path in (ROOT / "scripts").glob("*.sh")]
    result = subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_submission(cluster):
    recipe = cluster.home / "my recipe.yaml"
    recipe.write_text("")
    result, notes = cluster.call(
        recipe, "--output_dir", "out put", "--nodes", 4, "--gpus=2", "--warn", 60, "--sbatch", "--partition=big one",
        "--sbatch", "--time=1:00:00", "--data_path", "/data/image net", "--lr=1e-3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (command,) = notes
    output = str(cluster.home / "out put")
    assert command[0] == "sbatch"
    for option in ("--job-name=my recipe", "--nodes=4", "--ntasks-per-node=1", "--requeue", "--signal=USR1@60",
                   "--open-mode=append", f"--output={output}/slurm-%j.log", "--gpus-per-node=2", "--cpus-per-task=18",
                   "--partition=big one", "--time=1:00:00"):  # fmt: skip
        assert option in command
    script = command.index(str(cluster.root / "scripts" / "slurm.sh"))
    assert command.index("--partition=big one") > command.index("--requeue")  # so that it can replace a default
    assert command[script + 1 :] == [
        "job", str(cluster.root), str(cluster.active / "bin" / "python"), "2", "60", output,
        "--recipe", str(recipe), "--data_path", "/data/image net", "--lr", "1e-3",
    ]  # fmt: skip
    (planned,) = (line for line in cluster.calls_file.read_text().splitlines() if "main.py" in line)
    assert planned.endswith("--plan table --devices 8")


def test_an_array_over_seeds(cluster):
    _, (command,) = cluster.call("recipes/demo.yaml", "--output_dir", cluster.home / "o", "--seeds", "0-2")
    assert "--array=0-2" in command and f"--output={cluster.home}/o/slurm-%A_%a.log" in command
    variables = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "4240"}
    _, notes = cluster.job(command, **variables)
    run = notes[-1]
    assert run[-4:] == ["--seed", "2", "--output_dir", f"{cluster.home}/o/seed-2"]
    stop = f'mkdir -p "{cluster.home}/o/seed-2"; touch "{cluster.home}/o/seed-2/stopped.json"; false'
    _, notes = cluster.job(command, SRUN_DOES=stop, **variables)
    assert notes[-1] == ["scontrol", "requeue", "4240_2"]


def test_a_job_starts_torchrun_on_every_node_with_a_port_of_its_own(cluster):
    _, (command,) = cluster.call("recipes/demo.yaml", "--output_dir", "o", "--nodes", "2", "--gpus", "4")
    result, notes = cluster.job(command, SLURM_CPUS_PER_TASK="32")
    assert result.returncode == 0, result.stderr
    assert notes[0] == ["scontrol", "show", "hostnames", "n[1-2]"]
    run = notes[1]
    assert run[:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=32"]
    pairs = dict(pairwise(run))
    assert pairs["--nnodes"] == "2" and pairs["--nproc_per_node"] == "4" and pairs["--rdzv_backend"] == "c10d"
    assert pairs["--rdzv_endpoint"] == "127.0.0.1:24242" and pairs["--rdzv_id"] == "4242"
    assert {"SIGUSR1", "SIGXCPU"} <= set(pairs["--signals_to_handle"].split(","))
    assert pairs["--shutdown_timeout"] == "300"
    assert pairs["--recipe"] == str(cluster.root / "recipes" / "demo.yaml")
    _, notes = cluster.job(command, SLURM_JOB_ID="4243")
    assert dict(pairwise(notes[1]))["--rdzv_endpoint"] == "127.0.0.1:24243"


def test_an_older_torchrun_is_stopped_by_sigterm(cluster):
    cluster.torchrun_knows("--nnodes")
    _, (command,) = cluster.call("recipes/demo.yaml", "--output_dir", "o")
    assert "--signal=TERM@300" in command
    _, notes = cluster.job(command)
    assert not {"--signals_to_handle", "--shutdown_timeout"} & set(notes[1])


def test_a_stopped_run_is_requeued_and_a_failed_one_is_not(cluster):
    _, (command,) = cluster.call("recipes/demo.yaml", "--output_dir", "o")
    note = cluster.home / "o" / "stopped.json"
    result, notes = cluster.job(command, SRUN_DOES=f'touch "{note}"; exit 1')
    assert notes[-1] == ["scontrol", "requeue", "4242"] and result.returncode == 0 and not note.exists()
    note.touch()  # of the run before, whose launcher died
    result, notes = cluster.job(command, SRUN_DOES="exit 3")
    assert result.returncode == 3 and notes[-1][0] == "srun"
    result, notes = cluster.job(command, SRUN_DOES=f'test ! -e "{note}"')
    assert result.returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the recipe comes first"),
        (["--output_dir", "o"], "the recipe comes first"),
        (["recipes/no.yaml", "--output_dir", "o"], "there is no recipe recipes/no.yaml"),
        (["recipes/demo.yaml"], "--output_dir is not set"),
        (["recipes/demo.yaml", "--output_dir", "o", "--nodes", "0"], "--nodes 0 is no number of nodes"),
        (["recipes/demo.yaml", "--output_dir", "o", "--gpus", "two"], "--gpus two is no number"),
        (["recipes/demo.yaml", "--output_dir", "o", "--lr"], "--lr needs a value"),
    ],
)
def test_wrong_usage(cluster, arguments, message):
    result, notes = cluster.call(*arguments)
    assert result.returncode == 2 and f"error: {message}" in result.stderr and not notes
    assert "--seeds LIST" in result.stderr


def test_what_cannot_be_planned_is_not_submitted(cluster):
    (cluster.root / "main.py").write_text("import sys; sys.exit('error: --epochs 0')")
    result, notes = cluster.call("recipes/demo.yaml", "--output_dir", "o", "--epochs", "0")
    assert result.returncode == 1 and "--epochs 0" in result.stderr and not notes


@pytest.mark.extended
def test_two_real_nodes_stopped_by_the_time_limit_and_requeued(cluster, folder, tmp_path):
    """Two real torchruns; SIGUSR1 reaches them; the requeued job ends with an uninterrupted run's weights."""
    settings = flags(data_path=folder, epochs=6, opt="sgd", seed=3)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("model: test_convnext\n")
    both = '"${@:2}" & "${@:2}" & wait -n; a=$?; wait -n; b=$?; exit $((a > b ? a : b))'

    def start(output):
        argv = ["job", str(ROOT), sys.executable, "0", "60", str(output), "--recipe", str(recipe), *settings]
        variables = {
            "PATH": f"{cluster.tools}:{os.environ['PATH']}",
            "NOTES": str(cluster.notes_file),
            "SLURM_JOB_ID": "777",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SRUN_DOES": both,
        }
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(
                ["bash", str(ROOT / "scripts/slurm.sh"), *argv],
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def finish(job):
        assert job.wait(240) == 0, (tmp_path / "log").read_text()

    whole, cut = tmp_path / "whole", tmp_path / "cut in two"
    whole.mkdir(), cut.mkdir()
    finish(start(whole))
    job = start(cut)
    deadline = time.monotonic() + 120
    while "step 4/" not in (tmp_path / "log").read_text().split("done in")[-1]:
        assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    for pid in torchruns(job.pid):  # Slurm signals the tasks of the job's steps
        os.kill(pid, signal.SIGUSR1)
    finish(job)
    assert json.loads(cluster.notes_file.read_text().splitlines()[-1]) == ["scontrol", "requeue", "777"]
    assert not (cut / "stopped.json").exists()
    finish(start(cut))
    states = [torch.load(output / "checkpoint-last.pth", weights_only=True) for output in (whole, cut)]
    assert states[0]["step"] == states[1]["step"]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key


def torchruns(session):
    """The process ids of the torchruns in a session."""
    listing = subprocess.run(["ps", "-s", str(session), "-o", "pid=,args="], capture_output=True, text=True).stdout
    lines = [line.split(None, 1) for line in listing.splitlines()]
    return [int(pid) for pid, command in lines if "launch.py" in command and "srun" not in command]
