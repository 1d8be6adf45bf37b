"""Which checkpoint a launch goes on from, the same one on every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
from config import Config
from models.reading import read_weights
from utils import Topology, from_main


def checkpoint_to_resume(config: Config, topology: Topology) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint in --output_dir that this very command wrote, else --resume's, else None.

    So the same command launched again goes on from what it has done, also when it started from ``--resume``. Without
    ``--resume`` every checkpoint there counts; ``--auto_resume false`` counts none.

    Raises:
        ValueError: ``--auto_resume false`` would write over another run's checkpoints.
        BadCheckpoint: a file that cannot be used, or nothing but such files.
    """
    found, error = None, None
    if topology.is_main:
        try:
            found = _choose(config)
        except ValueError as problem:
            error = problem
    # Folders on a network may look different from different machines: one process decides.
    path, kind, message = from_main((found and str(found[0]), type(error), str(error)))
    if kind is not type(None):
        raise kind(message)
    if path is None:
        return None
    if topology.is_main:
        print(f"going on from {path}, step {found[1]['step']}", flush=True)
        return found
    return Path(path), checkpoints.load(path)


def class_order(config: Config, found: tuple[Path, dict[str, Any]] | None) -> list[str] | None:
    """The order of the classes that the weights to start from know: those of the checkpoint; None if it has none.

    Other versions of this project, and other programs, sort class names in another way.
    """
    if found is not None:
        return found[1].get("classes")
    return read_weights(config.finetune).get("classes") if config.finetune else None


def _choose(config: Config) -> tuple[Path, dict[str, Any]] | None:
    output = Path(config.output_dir)
    if not config.auto_resume:
        if not config.resume and (there := sorted(output.glob("checkpoint-*.pth"))):
            raise ValueError(
                f"--auto_resume false, but {output} holds another run's checkpoints ({there[0].name}, ...): remove "
                "them or name another --output_dir"
            )
    elif output.is_dir():
        wrote = None if config.resume is None else lambda payload: payload["config"].get("resume") == config.resume
        found = checkpoints.newest(output, wrote)
        if found is not None:
            return found
    return (Path(config.resume), checkpoints.load(config.resume)) if config.resume else None
