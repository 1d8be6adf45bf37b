"""main.py in processes of its own, forked from a server that has imported everything once: they start fast."""

import faulthandler
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from conftest import ROOT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["main", "torchvision.datasets", "timm.data.mixup"])


class Program:
    """One process that runs ``main.main(argv)``.

    Args:
        argv: the command line.
        log: file that takes its standard output and error.
        environment: more environment variables.
        fault: called (no arguments) before main, in the process: what is to go wrong. A function of a module or a
            functools.partial of one, for it is sent to the process.
    """

    def __init__(self, argv, log, environment=None, fault=None):
        self.log = Path(log)
        self.process = _context.Process(target=_program, args=(argv, str(log), environment or {}, fault))
        self.process.start()

    def wait(self, timeout=120):
        """Exit code, negative for a signal. A process that takes longer is killed and reported."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.signal(signal.SIGUSR2)  # where it hangs
            time.sleep(1)
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}")
        return self.process.exitcode

    def signal(self, number):
        os.kill(self.process.pid, number)

    def wait_for(self, text, timeout=120):
        """Waits until its output holds ``text``."""
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.is_alive() or text in self.output, f"ended without {text!r}:\n{self.output}"
            assert time.monotonic() < end, f"no {text!r} after {timeout} s:\n{self.output}"
            time.sleep(0.01)

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""


def world(argv, log, size, environment=None, faults=None):
    """``size`` processes of one run, as torchrun would start them; ``faults`` by rank."""
    rendezvous = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Program(
            argv,
            f"{log}.{rank}",
            {**rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})},
            (faults or {}).get(rank),
        )
        for rank in range(size)
    ]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _program(argv, log, environment, fault):
    os.setsid()  # a kill of its group takes its loader workers along
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR2)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own: here it is the server's
    os.environ.update(environment)
    os.chdir(ROOT)

    import torch

    import main

    torch.set_num_threads(1)
    if fault is not None:
        fault()
    sys.exit(main.main(argv))


# -- faults ------------------------------------------------------------------------------------------------------------


def kill_after_step(step):
    """SIGKILLs the process once optimizer step number ``step`` is done, before what follows it (saving)."""
    from training import session

    original = session.Session.after_step

    def after_step(self, lr, images):
        if self.training.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, lr, images)

    session.Session.after_step = after_step


def kill_after_epoch(epoch):
    """SIGKILLs the process once the pass of this index is evaluated, logged and saved, and before the next."""
    from training import session

    original = session.Session.enter

    def enter(self, record):
        if record.index == epoch + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, record)

    session.Session.enter = enter


def call_before(place, action, *arguments, count=1):
    """Calls ``action(*arguments)`` when the ``count``-th call of ``place`` ("training.session:Session.save") begins."""
    module, _, path = place.partition(":")
    *owner, name = path.split(".")
    target = importlib.import_module(module)
    for part in owner:
        target = getattr(target, part)
    original, left = getattr(target, name), [count]

    def wrapper(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            action(*arguments)
        return original(*args, **kwargs)

    setattr(target, name, wrapper)


def signal_self(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def several(*faults):
    for fault in faults:
        fault()
