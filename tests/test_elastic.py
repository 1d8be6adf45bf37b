"""Elastic runs: machines (launchers on the loopback address) that leave and join, and what ends a run or does not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Run, flags, script
from processes import free_port
from test_distributed import SETTINGS, assert_close

from training import one_writer, stopping
from training.one_writer import LOCK, OneWriter
from utils import LOST, Topology, most_processes

# Of torchrun's waiting for machines that may come, and for those that may be gone.
SHORT = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
ALONE = Topology(0, 1, torch.device("cpu"))


class Launcher:
    """What scripts/train.sh --nnodes 1:3 starts on a machine, with one process."""

    def __init__(self, port, log, argv, program="main.py", **environment):
        self.log = log
        command = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nnodes", "1:3", "--rdzv_backend", "c10d"]
        command += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", f"127.0.0.1:{port}", "--max_restarts", "100"]
        command += ["--nproc_per_node", "1", str(ROOT / program), *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        environment |= {"PET_RDZV_CONF": SHORT, "PET_LOCAL_ADDR": "127.0.0.1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self):
        return self.log.read_text()

    def wait(self, timeout=240):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None


class Machines:
    """Launchers of one run, and the gates of its processes."""

    def __init__(self, folder, argv, gates):
        self.folder, self.argv, self.port, self.all = folder, argv, free_port(), []
        self.environment = {"GATE": str(folder), "GATES": ",".join(map(str, gates))}

    def join(self):
        log = self.folder / f"launcher-{len(self.all)}.log"
        self.all.append(Launcher(self.port, log, self.argv, "tests/gated_main.py", **self.environment))
        return self.all[-1]

    def open(self, step):
        (self.folder / str(step)).touch()

    def at(self, step, processes):
        """Waits until so many processes stand at the gate of ``step``; their pids by rank."""
        return {rank: int(self.wait_for((self.folder / f"at-{step}-{rank}").read_text)) for rank in processes}

    def wait_for(self, look, timeout=240):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                if found := look():
                    return found
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError("\n".join(f"--- {one.log.name}\n{one.output}" for one in self.all))

    def kill(self):
        for one in self.all:
            subprocess.run(["pkill", "-KILL", "-P", str(one.process.pid)], check=False)
            one.process.kill()
            one.process.wait()


@pytest.mark.extended
def test_machines_leave_and_join(folder, tmp_path, main_program):
    """One, two, three; one dies with all it has, one is told to leave; the first ends it. As if nothing had happened:
    the weights of an uninterrupted run to float tolerance, and each pass once in log.txt, with the same losses."""
    settings = {"model": "tests.tiny_models:plain", "data_path": folder, **SETTINGS, "save_interval": "2 steps"}
    assert main_program(flags(output_dir=tmp_path / "whole", **settings)) == 0
    machines = Machines(tmp_path, flags(output_dir=tmp_path / "run", **settings), (3, 6, 11, 14))
    try:
        first = machines.join()
        machines.at(3, [0])
        machines.join()  # the processes at the gate are told to stop, and start again as two
        machines.at(6, [0, 1])
        machines.join()
        pids = machines.at(11, [0, 1, 2])
        third = next(one for one in machines.all[1:] if child(one) == pids[2])
        for pid in (third.process.pid, pids[2]):
            os.kill(pid, signal.SIGKILL)
        machines.open(11)
        second = next(one for one in machines.all[1:] if one is not third)
        machines.at(14, [0, 1])
        second.process.send_signal(signal.SIGTERM)
        machines.wait_for(lambda: "SIGTERM: saving and stopping" in second.output)
        machines.open(14)
        assert second.wait() == 75 and "the same command resumes" in second.output.splitlines()[-1]
        assert first.wait() == 0, first.output
    finally:
        machines.kill()
    said = "".join(one.output for one in machines.all)
    for count in (1, 2, 3):
        assert f"\n{count} device" in said
    assert LOST[0] in said and said.count("resuming from") >= 4
    assert_close(Run(tmp_path / "whole"), Run(tmp_path / "run"))
    run, whole = Run(tmp_path / "run").log(), Run(tmp_path / "whole").log()
    assert [(line["epoch"], line["step"], line["images"]) for line in run] == [
        (line["epoch"], line["step"], line["images"]) for line in whole
    ]


def child(launcher):
    """The pid of a launcher's only process."""
    found = subprocess.run(["pgrep", "-P", str(launcher.process.pid)], capture_output=True, text=True)
    return int(found.stdout.split()[0]) if found.stdout else None


def test_wrong_settings_end_an_elastic_run_with_one_line(folder, tmp_path):
    """At once, and not after a hundred restarts."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, micro_batch=3)
    launcher = Launcher(free_port(), tmp_path / "log", argv)
    assert launcher.wait(120) == 2, launcher.output
    assert launcher.output.splitlines()[-1].startswith("error: --micro_batch 3 ")
    assert launcher.output.count("error: --micro_batch 3 ") <= 3  # its own, in torchrun's report, and the last line


def test_what_ends_a_machine_s_part(tmp_path):
    """An error of its own; not that others were lost, nor that it was stopped or killed, nor nothing at all."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    launch = script("launch")

    def failure(code, line=None):
        path = tmp_path / f"{code}-{line}"[:50]
        if line is not None:
            path.write_text(json.dumps({"message": {"message": line, "extraInfo": {"timestamp": "1"}}}))
        return ProcessFailure(0, 1, code, str(path))

    def monitored(*failures):
        agent = object.__new__(launch.Agent)
        result = RunResult(WorkerState.FAILED, failures=dict(enumerate(failures)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalElasticAgent, "_monitor_workers", lambda *_: result)
            return agent._monitor_workers(None)

    lost = failure(1, f"error: [rank 0 on a] {LOST[0]}: see what it said")
    for others in ([], [failure(75)], [failure(-9)], [lost], [failure(1)], [lost, failure(75)]):
        assert len(monitored(*others).failures) == len(others)
    own = failure(1, "error: [rank 1 on a] out of device memory: lower --micro_batch")
    for failures in ([own], [lost, own], [own, failure(75)], [failure(2, "error: --micro_batch 3 is odd")]):
        with pytest.raises(launch.Leaves):
            monitored(*failures)


def test_an_elastic_run_is_made_for_the_most_machines(monkeypatch):
    assert most_processes(ALONE) == 1
    monkeypatch.setenv("ELASTIC_NODES", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert most_processes(ALONE) == 8
    assert most_processes(Topology(0, 12, torch.device("cpu"))) == 12  # machines of other sizes


def test_a_stop_does_not_stay_one_in_an_elastic_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    stopping.leave_stop_note(tmp_path, 3)
    assert stopping.stays_stopped(tmp_path, ALONE)
    monkeypatch.setenv("ELASTIC_NODES", "4")
    assert not stopping.stays_stopped(tmp_path, ALONE) and not (tmp_path / stopping.STOP_NOTE).exists()


@pytest.mark.parametrize("launch, patience", [("10.0.0.1:29500", 1.0), ("10.0.0.2:29500", 0.2), (None, 0.2)])
def test_a_lock_of_the_run_itself_is_waited_for(tmp_path, monkeypatch, launch, patience):
    """The file server holds it for a machine that is gone; that of another run is none to wait for."""
    monkeypatch.setattr(one_writer, "PATIENCE", 0.2)
    monkeypatch.setattr(one_writer, "LEASE", 1.0)
    monkeypatch.setenv("ELASTIC_NODES", "4")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "10.0.0.1:29500")
    about = {"host": "gone", "pid": 7, "since": "2026-01-01 00:00:00", "launch": launch}
    (tmp_path / LOCK).write_text(json.dumps(about))

    def held(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(one_writer.fcntl, "lockf", held)
    start = time.monotonic()
    with pytest.raises(OSError, match="another run writes there, process 7 on gone") as error:
        OneWriter(tmp_path, ALONE).hold()
    assert time.monotonic() - start >= patience
    assert ("remove" in str(error.value)) == (launch == "10.0.0.1:29500")
    tries = []

    def freed(*_):
        tries.append(1)
        if time.monotonic() - begun < 0.5:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(one_writer.fcntl, "lockf", freed)
    begun = time.monotonic()
    if launch == "10.0.0.1:29500":
        OneWriter(tmp_path, ALONE).hold()
        assert json.loads((tmp_path / LOCK).read_text())["launch"] == launch and len(tries) > 1
