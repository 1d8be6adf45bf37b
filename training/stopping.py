"""How a run comes to a stop: by a signal to any of its processes, with its launcher, and how it is known later."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from utils import STOP_SIGNALS, STOPPED, Topology, most_nodes, write_text

STOP_NOTE = "stopped.json"
ECHO = 1.0  # seconds
WEEK = timedelta(days=7)
LAST_WAY_OUT = 120.0  # seconds to save in when the launcher has died
# Kept to the end: the thread of gloo that drops the last reference to a tensor waits for the interpreter, and taking
# the group down in torch 2.4 waits for the thread, the interpreter held.
_LAST_VOTES: list[tuple[dist.Work, torch.Tensor]] = []


class Agreement:
    """Lets a signal to any process stop all of them, and one process's clock make all of them save, at the same
    optimizer step.

    Each step starts a small asynchronous sum of the processes' wishes over gloo and reads the one of the step before,
    so nothing waits for it and no device is synchronised. Signals only set a flag: further ones change nothing, but for
    a second SIGINT, which raises KeyboardInterrupt.

    Args:
        timeout: how long to wait for the other processes.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.stop_requested = False
        self._interrupted: float | None = None  # when the last SIGINT came
        self._process = os.getpid()
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        for name in STOP_SIGNALS:
            if name == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                continue  # nohup: to outlive its terminal is what the user asked for
            signal.signal(getattr(signal, name), self._request_stop)

    def _request_stop(self, number: int, _frame) -> None:
        if os.getpid() != self._process:
            return  # a loader process between its start and its own handlers
        if number == signal.SIGINT:
            before, self._interrupted = self._interrupted, time.monotonic()
            # Of one Ctrl-C torchrun's workers hear twice: from the terminal and from torchrun.
            echo = "TORCHELASTIC_RUN_ID" in os.environ and before is not None and self._interrupted - before < ECHO
            if before is not None and not echo:
                raise KeyboardInterrupt
        if not self.stop_requested:  # print() is not for signal handlers
            name = signal.Signals(number).name
            again = "; a second one ends the run at once, unsaved" if number == signal.SIGINT else ""
            with suppress(OSError):
                os.write(2, f"{name}: saving and stopping after this optimizer step{again}\n".encode())
        self.stop_requested = True

    def poll(self, save: bool = False) -> tuple[bool, bool]:
        """Whether to (stop, save) now, as some process wished one call earlier (at once, if there is only one process).

        Every process must call it equally often; all get the same answer.
        """
        if self._group is None:
            return self.stop_requested, save
        stop_now = save_now = False
        if self._pending is not None:
            work, votes = self._pending
            work.wait()
            stop_now, save_now = (vote > 0 for vote in votes.tolist())
        votes = torch.tensor([float(self.stop_requested), float(save and not save_now)])
        self._pending = (dist.all_reduce(votes, group=self._group, async_op=True), votes)
        return stop_now, save_now

    def wait_for(self, timeout: timedelta) -> None:
        """Sets how long collective operations wait from now on, these and the default group's.

        Their clock goes on while all processes of a run are stopped (a suspended job), the watchdog's does not: while
        that one watches, they wait for a `WEEK`.
        """
        if self._group is not None:
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its older name
            for group in (None, self._group):
                set_timeout(timeout, group)

    def close(self) -> None:
        """Lets the last votes arrive; older torch cannot take down a group with an operation in it."""
        if self._pending is not None:
            with suppress(RuntimeError):  # of a process that died
                self._pending[0].wait()
            _LAST_VOTES.append(self._pending)
            self._pending = None


def end_with_launcher() -> None:
    """Stops this process when the torchrun that started it has died, which nobody else would tell it: by SIGTERM, so
    that a run saves, and by force where that does not end it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        with suppress(OSError):
            os.write(2, b"torchrun has died: stopping\n")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_WAY_OUT)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def leave_stop_note(output: Path, step: int) -> None:
    """Says in the output folder that the run was stopped on purpose: torchrun turns a worker's exit code into 1."""
    write_text(output / STOP_NOTE, json.dumps({"step": step, "exit_code": STOPPED}) + "\n")


def stays_stopped(output: Path, topology: Topology) -> bool:
    """Whether this worker was started again by torchrun after a stop, and so has to exit at once.

    A new launch resumes instead: it removes the note. So does an elastic run, which stops whenever machines come or go.
    """
    note = output / STOP_NOTE
    if not note.exists():
        return False
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and not most_nodes():
        if topology.is_main:
            print(f"stopped: {note} says so; launch the command again to resume", flush=True)
        return True
    if topology.is_main:
        note.unlink(missing_ok=True)
    return False
