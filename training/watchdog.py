"""Ends a process that hangs: who waits longer than --timeout without a step done says where it stands, and stops."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _is_ours(file: str) -> bool:
    return ROOT in Path(file).parents and "site-packages" not in file  # .venv may lie in the checkout


class Watchdog:
    """A thread that ends the process unless :meth:`beat` is called at least every ``timeout`` seconds.

    Time in which the process itself was stopped does not count. It reports the rank, the host and where the main thread
    stands: in the loader (a worker hangs, or the storage), in a collective operation (another process hangs), or
    elsewhere. So no run waits for ever. Use it as a context.
    """

    def __init__(self, timeout: float, rank: int, world_size: int) -> None:
        self.timeout = timeout
        self.who = f"rank {rank} of {world_size} on {socket.gethostname()}"
        self.doing = "starting"
        self._done = threading.Event()
        self._beats = 0
        self._main = threading.get_ident()

    def beat(self, doing: str) -> None:
        """Something was done; ``doing`` is what comes next."""
        self.doing = doing
        self._beats += 1

    def __enter__(self) -> Watchdog:
        self.beat(self.doing)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        self._done.set()

    def _watch(self) -> None:
        tick, waited, beats, before = min(self.timeout / 10, 1.0), 0.0, self._beats, time.monotonic()
        while waited < self.timeout:
            if self._done.wait(tick):
                return
            now = time.monotonic()
            # While the process itself is stopped (SIGSTOP, a suspended machine) no time counts.
            waited = 0.0 if self._beats != beats else waited + min(now - before, 2 * tick)
            beats, before = self._beats, now
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        own = [place for place, frame in enumerate(frames) if _is_ours(frame.filename)]
        places = [f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in frames]
        called = ", in ".join(places[own[-1] : own[-1] + 2] if own else places[-2:])
        print(
            f"error: [{self.who}] nothing happened for {self.timeout:g} s while {self.doing}; it stands in {called}. "
            "Either this process's storage or loader hangs, or another process it waits for: see what the others say. "
            "If nothing hangs, raise --timeout",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)
