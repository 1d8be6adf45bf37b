"""Processes and devices: distributed set-up, reductions, and the agreement to stop and to save."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from config import UsageError
from config.urls import redact

STOP_NOTE = "stopped.json"
STOPPED = 75  # exit code: stopped by a signal after saving; the same command continues (EX_TEMPFAIL)


class Unreachable(RuntimeError):
    """Data over the network that do not come, after all tries. Its text is one line, without credentials."""

    def __str__(self) -> str:
        # From a loader's worker the exception arrives as the text of a whole traceback, whose last line is the message.
        lines = super().__str__().strip().splitlines() or [""]
        return lines[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")


@dataclass(frozen=True)
class Topology:
    """Which process this is, of how many, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_topology(device: str, deterministic: bool, timeout: timedelta) -> Topology:
    """Joins the process group that torchrun's environment describes (none: one process) and takes a device.

    Args:
        timeout: how long a collective operation waits for the other processes.

    Raises:
        UsageError: a device that is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, there in available.items() if there) if device == "auto" else device
    if kind not in available:
        raise UsageError(f"--device {device!r} is unknown; choose one of auto, {', '.join(available)}")
    if not available[kind]:
        raise UsageError(f"--device {device} is not available here; choose --device cpu or auto")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"local rank {local_rank} has no CUDA device: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = not deterministic
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, **_torchrun_store(rank, world_size, timeout))
    return Topology(rank, world_size, place)


def _torchrun_store(rank: int, world_size: int, timeout: timedelta) -> dict[str, Any]:
    """Where processes find each other under torchrun, fresh after each of its restarts.

    Its store outlives the workers; with a fixed --master_addr, torch would find the addresses of those that died.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": world_size}


def close_topology() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place; as it is with one process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_min(values: torch.Tensor) -> torch.Tensor:
    """Minimum over all processes, in place; as it is with one process."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def from_main(value: Any) -> Any:
    """What the main process holds, on all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast_buffers(*modules: nn.Module | None) -> None:
    """Gives every process rank 0's buffers (BatchNorm's running statistics), before they are evaluated."""
    if dist.is_initialized():
        for module in modules:
            for buffer in module.buffers() if module is not None else ():
                dist.broadcast(buffer, 0)


def wrap(model: nn.Module, topology: Topology, compile_model: bool) -> nn.Module:
    """The model as training calls it: data-parallel if there are several processes, compiled on request."""
    if topology.world_size > 1:
        ids = [topology.device.index] if topology.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is not in older torch
            model = nn.parallel.DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    # One graph per input size: automatic dynamic shapes recompile at the second size, for slower code.
    return torch.compile(model, dynamic=False) if compile_model else model


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without data-parallel and compilation wrappers."""
    model = _uncompiled(model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def no_sync(model: nn.Module):
    """Context in which a wrapped model's backward pass leaves gradients unreduced (before a step's last pass)."""
    model = _uncompiled(model)
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


class Agreement:
    """Lets SIGTERM or SIGUSR1 to any process stop all of them, and one process's clock make all of them save, at the
    same optimizer step.

    Each step starts a small asynchronous sum of the processes' wishes over gloo and reads the one of the step before,
    so nothing waits for it and no device is synchronised. Signals only set a flag: a second one changes nothing.

    Args:
        timeout: how long to wait for the other processes.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.stop_requested = False
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), self._request_stop)

    def _request_stop(self, number: int, _frame) -> None:
        if not self.stop_requested:  # print() is not for signal handlers
            os.write(2, f"{signal.Signals(number).name}: saving and stopping after this optimizer step\n".encode())
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

    def close(self) -> None:
        """Lets the last votes arrive; older torch cannot take down a group with an operation in it."""
        if self._pending is not None:
            with suppress(RuntimeError):  # of a process that died
                self._pending[0].wait()
            self._pending = None


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is whole at any time: as it was or as it is to be."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def leave_stop_note(output: Path, step: int) -> None:
    """Says in the output folder that the run was stopped on purpose: torchrun turns a worker's exit code into 1."""
    write_text(output / STOP_NOTE, json.dumps({"step": step, "exit_code": STOPPED}) + "\n")


def stays_stopped(output: Path, topology: Topology) -> bool:
    """Whether this worker was started again by torchrun after a stop, and so has to exit at once.

    A new launch goes on instead: it removes the note.
    """
    note = output / STOP_NOTE
    if not note.exists():
        return False
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        if topology.is_main:
            print(f"stopped: {note} says so; launch the command again to go on", flush=True)
        return True
    if topology.is_main:
        note.unlink(missing_ok=True)
    return False


def explain(error: RuntimeError) -> str | None:
    """One line about an error of the machine rather than of the code: a process that died, memory, the network; None
    for others."""
    if isinstance(error, Unreachable):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory: lower --micro_batch, or set it to auto ({text[:200]})"
    if re.search(r"DataLoader worker .*(killed|exited)", text):
        return f"{text}; if the machine ran out of memory, lower --num_workers"
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError) if dist.is_available() else ()
    if isinstance(error, kinds) or re.search(r"gloo|Connection (closed|reset) by peer|Timed out waiting", text):
        return f"lost another process of this run: see what it said, or what ended it ({text[:200]})"
    return None


def die(message: str, code: int = 1) -> int:
    """Prints one line on standard error, with rank and host if there are several, and returns the exit code."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    who = f"[rank {os.environ['RANK']} on {socket.gethostname()}] " if several else ""
    print(f"error: {who}{redact(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    return code
