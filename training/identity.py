"""What makes a run this run and no other: a resume under other settings of these is refused unless allowed by name."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import numpy as np

from config import Config
from config.checks import PARTS
from curriculum import Plan, Segment
from datasets import Source

OPTIMIZER = ("opt", "opt_eps", "opt_betas", "momentum", "layer_decay")  # what its saved state holds or rests on
MAE = ("task", "mae_target", "mask_ratio", "decoder")
SAMPLED = 1000  # names of images that a fingerprint looks at, evenly spaced


def identify(config: Config, plan: Plan, source: Source, classes: int) -> dict[str, Any]:
    """Plain types; the keys are PARTS, which ``--allow_change`` names."""
    curriculum = asdict(plan.curriculum)
    curriculum["stages"] = [_segment(stage) for stage in plan.curriculum.stages]
    curriculum.update(
        epochs=plan.epochs,
        max_magnitude=plan.max_magnitude,
        early_large_batch=config.early_large_batch,
        replay=[stage.replay for stage in plan.stages],
    )
    # Of a classifier nothing more, so that checkpoints from before there were other tasks are still known.
    task = {key: getattr(config, key) for key in MAE} if config.task == "mae" else {}
    if config.task == "multilabel":
        task = {"task": config.task}
    return {
        "model": {"name": config.model, "classes": classes, "arguments": config.model_args or {}, **_plain(task)},
        "data": {"images": len(source), "classes": len(source.classes), "fingerprint": fingerprint(source)},
        "curriculum": _plain(curriculum),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "optimizer": _plain({key: getattr(config, key) for key in OPTIMIZER}),
    }


def _segment(stage: Segment) -> str:
    filtered = "" if stage.radius is None else f", low-pass {stage.radius:g}"
    return f"{stage.input_size} until {stage.until:g}{filtered}" + f", mixing x {stage.mixing:g}" * (stage.mixing != 1)


def fingerprint(source: Source) -> str:
    """SHA-256 (its first 16 digits) of class names, all labels, and evenly spaced image names without their folders.

    Another copy of the same data set has the same one; images added, removed, renamed in number or put into another
    class change it.
    """
    sha = hashlib.sha256("\0".join(map(str, source.classes)).encode("utf-8", "surrogateescape"))
    labels = source.labels()
    sha.update((np.asarray(labels, dtype="<i8") if labels.ndim == 1 else np.packbits(labels, axis=1)).tobytes())
    for index in np.linspace(0, len(source) - 1, min(SAMPLED, len(source)), dtype=np.int64).tolist():
        sha.update(source.name(index).rsplit("/", 1)[-1].encode("utf-8", "surrogateescape") + b"\0")
    return sha.hexdigest()[:16]


def check_same_run(saved: dict[str, Any] | None, now: dict[str, Any], allowed: list[str], where: str) -> None:
    """Compares a checkpoint's identity with this run's.

    Args:
        saved: None for a checkpoint of format 1, which has none.
        allowed: parts that may differ.
        where: the checkpoint, for messages.

    Raises:
        ValueError: they differ in what is not allowed to; lists the differences.
    """
    if saved is None:
        return
    refused = [name for name in PARTS if saved.get(name) != now[name] and name not in allowed]
    if refused:
        differences = "; ".join(line for name in refused for line in _differences(saved.get(name), now[name], name))
        raise ValueError(
            f"{where} is of another run: {differences}. Choose another --output_dir to start anew, go back to the "
            f"settings of then, or go on regardless with --allow_change {','.join(refused)}"
        )


def _differences(before: Any, now: Any, name: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{name} {key}")]
    return [f"{name} was {_short(before)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any) -> Any:
    """Tuples as lists, as a checkpoint's neighbours in JSON have them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
