"""Two "nodes" in network namespaces of their own, over torchrun's c10d rendezvous and gloo (extended: needs root)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from conftest import ROOT, flags

pytestmark = pytest.mark.extended
PORT = "29511"


@pytest.fixture
def nodes():
    """Two namespaces joined by a cable: (name, address of its own), (name, address)."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names, addresses = [f"et{os.getpid()}{end}" for end in "ab"], ["10.213.7.1", "10.213.7.2"]
    cable = [f"v{os.getpid()}{end}" for end in "ab"]
    made = []
    try:
        for name in names:
            if ip("netns", "add", name).returncode:
                pytest.skip("network namespaces cannot be made here")
            made.append(name)
        assert (
            ip(
                "link", "add", cable[0], "netns", names[0], "type", "veth", "peer", cable[1], "netns", names[1]
            ).returncode
            == 0
        )
        for name, end, address in zip(names, cable, addresses):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, addresses, cable))
    finally:
        for name in made:
            ip("netns", "del", name)


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True)


def start(node, argv, log):
    """One node's torchrun, in a session of its own."""
    name, address, cable = node
    command = ["ip", "netns", "exec", name]
    command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    # Both namespaces have this machine's host name, so torchrun must be told which is which.
    command += ["--local_addr", address, "--rdzv_conf", f"is_host={int(address.endswith('.1'))}"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"10.213.7.1:{PORT}", "--rdzv_id", "7"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": cable}
    with open(log, "a") as file:
        return subprocess.Popen(
            [*command, str(ROOT / "main.py"), *argv],
            cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def kill_session(process):
    """SIGKILL to a node: torchrun and its workers, by their ids."""
    children = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in children.splitlines()]
    family = {process.pid}
    while more := {pid for pid, parent in pairs if parent in family} - family:
        family |= more
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


def finish(processes, log):
    assert [process.wait(240) for process in processes] == [0, 0], log.read_text()[-4000:]


def weights(output):
    return torch.load(output / "checkpoint-last.pth", weights_only=True)


def check_equal(one, other):
    assert one["step"] == other["step"]
    for key, value in one["model"].items():
        assert torch.allclose(value, other["model"][key], rtol=1e-4, atol=1e-6), key


def test_two_nodes_are_one_and_survive_the_loss_of_one(nodes, main_program, folder, tmp_path):
    settings = {
        "model": "tests.tiny_models:plain",
        "data_path": folder,
        "epochs": 30,
        "seed": 3,
        "save_interval": "10 steps",
    }
    assert main_program(flags(output_dir=tmp_path / "one", **settings)) == 0
    one = weights(tmp_path / "one")

    log = tmp_path / "two.log"
    argv = flags(output_dir=tmp_path / "two", **settings)
    finish([start(node, argv, log) for node in nodes], log)
    check_equal(one, weights(tmp_path / "two"))

    log = tmp_path / "killed.log"
    argv = flags(output_dir=tmp_path / "killed", timeout=1, **settings)
    processes = [start(node, argv, log) for node in nodes]
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoint-*0.pth")):
        assert time.monotonic() < deadline and processes[0].poll() is None, log.read_text()[-4000:]
        time.sleep(0.02)
    kill_session(processes[1])
    kill_session(processes[0])  # what a scheduler does when a node is lost
    assert "done in" not in log.read_text()
    finish([start(node, argv, log) for node in nodes], log)
    assert "resuming from" in log.read_text()
    check_equal(one, weights(tmp_path / "killed"))
