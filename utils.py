"""Processes and devices: distributed set-up, reductions, and what a run says and writes."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import nn

from config import UsageError
from config.launcher import read_launcher
from config.urls import redact

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGXCPU")  # each saves and stops
STOPPED = 75  # exit code: stopped by a signal after saving; the same command continues (EX_TEMPFAIL)
LOST = ("lost another process of this run", "the processes cannot connect")  # said after waiting for one in vain


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


def init_topology(device: str, deterministic: bool, tf32: bool, timeout: timedelta) -> Topology:
    """Joins the process group that the launcher's environment describes (none: one process) and takes a device.

    Args:
        deterministic: whether CUDA computes bit-identically each time.
        tf32: whether CUDA may compute float32 products in TF32.
        timeout: how long a collective operation waits for the other processes.

    Raises:
        UsageError: a device that is not there, or a launcher that does not say where the processes meet.
    """
    read_launcher()
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
        # Blocks that grow: what one stage's sizes leave free then serves the next's. Read when CUDA starts.
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is what torch before 2.9 reads
        if not any(name in os.environ for name in names):
            os.environ[names[torch.__version__ < (2, 9)]] = "expandable_segments:True"
        there = torch.cuda.device_count()
        if there == 1:  # each process may be shown its own only; if two share it, NCCL says so
            local_rank = 0
        if local_rank >= there:
            raise UsageError(
                f"local rank {local_rank} has no CUDA device: there are {there}; start one process for each"
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = not deterministic
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    elif kind == "cpu":  # a step reuses the memory of the one before; the kernel gives it page by page
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            _glibc("mallopt", threshold, 1 << 30)
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


def most_nodes() -> int:
    """The most machines that an elastic run may have, whose number changes as it goes; 0 for any other run."""
    return int(os.environ.get("ELASTIC_NODES", 0))  # by scripts/launch.py


def most_processes(topology: Topology) -> int:
    """The most processes that this run may come to have: the groups of a run are made for them from its start."""
    return max(topology.world_size, most_nodes() * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def close_topology() -> None:
    """Takes the process group down; every process must have finished its work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_now(code: int) -> None:
    """Ends this process of several, which failed. Does nothing where there is no process group.

    Taking the group down, as Python's exit does too, would wait for collectives that this process never joins, while
    the others wait for it.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # the loader's workers
            child.kill()
        os._exit(code)


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


def release_memory(device: torch.device) -> None:
    """Gives back what the allocator holds in blocks of the sizes of a stage that is over."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library
        getattr(ctypes.CDLL(None), name)(*arguments)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is whole at any time: as it was or as it is to be. UTF-8, whatever the locale; bytes of
    a path that are none go through as they are."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def duration_text(seconds: float) -> str:
    """75 -> 1:15, 90000 -> 1 d 1:00:00."""
    if seconds == float("inf"):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02d}:{seconds:02d}" if hours or days else f"{minutes}:{seconds:02d}"
    return f"{days} d {text}" if days else text


class _Tolerant:
    """A text stream that loses what it cannot write: a full disk, a reader that is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


@contextmanager
def printing_never_fails() -> Iterator[None]:
    """For a run, whose results are files: what it says is lost where it cannot be written."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Tolerant, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except (OSError, ValueError):  # what is left would be tried again at the interpreter's end, and fail there
                with suppress(OSError, ValueError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, stream.fileno())
                    os.close(null)


def prepare_streams() -> None:
    """Lets every text be printed in any locale, characters that its encoding lacks as escapes; and where a standard
    stream was closed before the start, keeps files that are opened later from taking its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def explain(error: Exception) -> str | None:
    """One line about an error of the machine, not of the code: a dead process, memory, the network; None for others."""
    if isinstance(error, Unreachable):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory: lower --micro_batch, or set it to auto ({text[:200]})"
    if re.search(r"shared memory|Bus error|(/torch_|/dev/shm).*No space left", text):
        return (
            "/dev/shm, through which loader processes hand on batches, is too small: lower --num_workers, or give "
            f"the container more shared memory (docker run --shm-size 8g, or --ipc host) ({text[-200:]})"
        )
    if re.search(r"DataLoader worker .*(killed|exited)", text) or _broke_in_loader(error):
        return f"a DataLoader worker died ({text[:200]}); if the machine ran out of memory, lower --num_workers"
    if "Duplicate GPU" in text:
        return f"two processes share a GPU: start one process for each GPU ({text[:200]})"
    if re.search(r"connectFullMesh|nable to (resolve|find)|gloo.*(timed out|refused).*connect", text):
        return (
            f"{LOST[1]}: if none of them died, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the "
            f"network interface between the machines, as `ip link` names it ({text[:200]})"
        )
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError) if dist.is_available() else ()
    if isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|Connection (closed|reset) by peer|Timed out waiting", text)
    ):
        return f"{LOST[0]}: see what it said, or what ended it ({text[:200]})"
    return None


def _broke_in_loader(error: Exception) -> bool:
    """Whether a connection to a loader process broke, which may reach this process before its end does."""
    if not isinstance(error, ConnectionError | EOFError | FileNotFoundError) or str(error).startswith("Caught "):
        return False
    return any("multiprocessing" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def die(message: str | Exception, code: int = 1) -> int:
    """Prints one line on standard error, with rank and host if there are several, and returns the exit code.

    torchrun gets it too, for its own report.
    """
    who = f"[rank {os.environ['RANK']} on {socket.gethostname()}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    line = f"error: {who}{redact(' '.join(str(message).split()))}"
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": line, "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": line}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": about}), encoding="utf-8")
    return code
