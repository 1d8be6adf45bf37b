"""What the fields of a checkpoint must be: a file may come from anyone, and whoever reads one relies on this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import torch
from typing_extensions import Required, TypedDict

from config import Config
from config.checks import check_ranges

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Optimizer(TypedDict):
    """As torch's optimizers give it; what each parameter's state holds is checked against the parameter."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class Best(TypedDict, total=False):
    """The best evaluation so far, by the task's score; empty for a task that has none."""

    acc1: float
    box_AP: float
    mIoU: float
    map: float
    step: Count
    weights: Literal["model", "model_ema"]
    eval_size: Count


class Standing(TypedDict, total=False):
    """The best evaluation of the stage (training.early_stop); empty before the first."""

    stage: Count
    score: float
    step: Count


class Meters(TypedDict, total=False):
    """Of the epoch in progress."""

    loss: Required[tuple[float, float]]
    gradient: tuple[float, float]
    skipped: tuple[Count, Count, Count, Count]
    seconds: Required[Seconds]


class Identity(TypedDict, total=False):
    """What the run is, see identity.py."""

    model: dict[str, Any]
    data: dict[str, Any]
    validation: dict[str, Any]
    curriculum: dict[str, Any]
    batch_size: Count
    seed: int
    optimizer: dict[str, Any]


class Change(TypedDict):
    """Of settings, on the way (training.resume.History)."""

    step: Count
    progress: Share
    logged: Share
    replanned: bool
    what: list[str]


class Checkpoint(TypedDict, total=False):
    """What each field of a checkpoint must be. Fields that are not named here may be anything plain."""

    format_version: Required[int]
    model: Required[dict[str, torch.Tensor]]
    model_ema: Required[dict[str, torch.Tensor] | None]
    optimizer: Required[Optimizer]
    scaler: Required[dict[str, int | float | None]]
    step: Required[Count]
    epoch: Required[Count]
    input_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 14)] | None
    best: Required[Best]
    meters: Required[Meters]
    identity: Identity | None
    config: Required[dict[str, Any]]
    classes: Annotated[list[str], msgspec.Meta(max_length=1 << 24)]
    progress: Share
    logged: Share
    trained: list[list[Count]]
    changes: list[Change]
    unwritten: str
    standing: Standing
    unusable: Count


def check_fields(payload: dict[str, Any]) -> None:
    """Raises ValueError for a field of another type or range than this project writes; names the field.

    A setting that this code does not know is left to whoever asks for it.
    """
    for schema, content, place in ((Checkpoint, payload, ""), (Config, payload.get("config"), ".config")):
        try:
            typed = msgspec.convert(content, schema, str_keys=schema is Config)
            if schema is Config:
                check_ranges(typed)
        except msgspec.ValidationError as error:
            raise ValueError(str(error).replace("`$", f"`{place}").replace("`.", "`")) from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except (AttributeError, TypeError):  # msgspec takes a tensor for a mapping
            raise ValueError("it holds a tensor where it must hold a mapping") from None
    for key in ("model", "model_ema", "optimizer"):
        if not all(is_ordinary(tensor) for tensor in _tensors(payload[key])):
            raise ValueError(f"`{key}` holds a tensor that is not an ordinary, dense one")


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor that was read is dense, on the CPU, and no larger than the numbers that came with it."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
