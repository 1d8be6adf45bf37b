"""Where a run's numbers are drawn as it trains: TensorBoard always, Weights & Biases on request (``--wandb``)."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import image, scalar

from config import UsageError
from config.files import read_text
from utils import write_text

RUN_ID = "wandb_id.txt"  # in the output folder, so that a run that is started again is the same run
PATIENCE = 60.0  # seconds that W&B's server may take at the start of a run
LAST_WAY_OUT = 30.0  # and at its end; what it has not got by then stays in the output folder


class Curves(Protocol):
    """One place where numbers are drawn. No method raises: what fails is said once, and the run continues."""

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        """The values of curves, by name, after ``step`` optimizer steps."""

    def picture(self, step: int, name: str, pixels: torch.Tensor) -> None:
        """uint8 (3, H, W)."""

    def close(self) -> None: ...


def give_up(what: str, error: Exception) -> None:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    print(f"warning: no more {what} curves from here on ({reason[:300]}); log.txt has the numbers", flush=True)


class TensorBoard:
    """Event files. Written here and now: tensorboardX's SummaryWriter leaves it to a thread, and blocks the training
    for ever once that thread has met a full disk.

    Args:
        folder: of the event files. step: optimizer steps done.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.writer: EventsWriter | None = None
        try:
            folder.mkdir(exist_ok=True)
            self.writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            # Of the run before, TensorBoard hides what comes after the checkpoint.
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
            self.writer.flush()
        except (OSError, ValueError) as error:  # its ValueError is a path that protobuf cannot hold
            self._give_up(error)

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        self._show(step, *(scalar(key, value) for key, value in scalars.items()))

    def picture(self, step: int, name: str, pixels: torch.Tensor) -> None:
        self._show(step, image(name, pixels.cpu().numpy()))

    def close(self) -> None:
        """Every event has been flushed."""

    def _show(self, step: int, *summaries: Summary) -> None:
        if self.writer is None:
            return
        try:
            for summary in summaries:
                self._write(Event(step=step, summary=summary))
            self.writer.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.writer.write_event(event)

    def _give_up(self, error: OSError | ValueError) -> None:
        give_up("TensorBoard", error)
        self.writer = None


class WandB:
    """A run of Weights & Biases, the same one each time the run of ``folder`` is started.

    Points carry the optimizer step themselves: W&B's own count cannot go back to a checkpoint. Where its server does
    not answer at the start, or nobody is logged in, the run is recorded offline.

    Args:
        project: PROJECT or ENTITY/PROJECT. folder: the run's output folder. settings: what the run's page shows.
    """

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]) -> None:
        self.run: Any = None
        try:
            import wandb

            entity, _, name = project.rpartition("/")
            how = {"console": "off", "silent": True, "init_timeout": PATIENCE, "login_timeout": PATIENCE}
            start = {"project": name, "entity": entity or None, "id": _run_id(folder), "resume": "allow"}
            start |= {"name": folder.resolve().name, "dir": str(folder), "config": settings}
            start["settings"] = wandb.Settings(**how, finish_timeout=LAST_WAY_OUT)
            try:
                self.run = wandb.init(**start)
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                print(f"warning: --wandb {project}: recording offline, for W&B says: {reason}", flush=True)
                self.run = wandb.init(**start, mode="offline")
            self.run.define_metric("step", hidden=True)
            self.run.define_metric("*", step_metric="step")
            where = self.run.url or f"offline; to send it: wandb sync {self.run.settings.sync_dir}"
            print(f"W&B run {self.run.id}: {where}", flush=True)
        except Exception as error:
            self._give_up(error)

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        self._log({**scalars, "step": step})

    def picture(self, step: int, name: str, pixels: torch.Tensor) -> None:
        if self.run is not None:
            import wandb

            self._log({name: wandb.Image(pixels.permute(1, 2, 0).cpu().numpy()), "step": step})

    def close(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)

    def _log(self, content: dict[str, Any]) -> None:
        if self.run is not None:
            try:
                self.run.log(content)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        give_up("W&B", error)
        self.run = None


def check_wandb(project: str) -> None:
    """Raises UsageError where the package is missing, or for a name that W&B does not take."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder wandb/, as the package itself leaves behind, is no package
        raise UsageError(f"--wandb {project} needs a package that is not installed: pip install 'wandb>=0.27'")
    if not re.fullmatch(r"([\w.-]+/)?[^/\\#?%:]{1,128}", project):
        raise UsageError(
            f"--wandb {project!r} is no project of W&B: it is NAME or ENTITY/NAME, without any of / \\ # ? % : in it"
        )


def _run_id(folder: Path) -> str:
    """Of the run that the folder holds; WANDB_RUN_ID (a sweep sets it) or a new one for a run that begins."""
    path = folder / RUN_ID
    if path.exists() and re.fullmatch(r"[\w-]{1,64}", known := read_text(path, 1 << 10).strip()):
        return known
    new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_text(path, new + "\n")
    return new
