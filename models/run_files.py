"""What a run leaves in its output folder besides checkpoints, read back by rules: the folder may come from anyone."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import Required, TypedDict

from config import Config
from config.files import read_bytes, read_text
from config.recipes import plain, read_yaml

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
Number = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]  # and so neither NaN nor infinity
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
MOST_DAMAGED = 1000  # lines of a log.txt
Short = Annotated[str, msgspec.Meta(max_length=1000)]


class Stage(TypedDict, total=False):
    input_size: Required[Size]
    passes: Required[Number]
    progress: tuple[Number, Number]
    steps: Required[Count]
    images: Required[Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]]
    magnitude: Required[tuple[Number | None, Number | None]]
    batch_size: Required[Count]
    compute: Required[Number]
    forward_passes: Required[Count | None]
    forward_batch: Required[Count | None]
    flops: Number | None


class Total(TypedDict, total=False):
    steps: Required[Count]
    equivalent_epochs: Required[Number]
    speedup_pixels: Required[Positive]
    speedup_flops: Required[Positive | None]
    params: Required[Count | None]
    flops: Required[Number | None]


class PlanFile(TypedDict, total=False):
    """plan.json, as far as it is read back."""

    curriculum: Required[Short]
    base_size: Required[Size]
    epochs: Required[Number]
    devices: Count | None
    stages: Required[Annotated[list[Stage], msgspec.Meta(min_length=1, max_length=1000)]]
    total: Required[Total]
    changes: list[Annotated[str, msgspec.Meta(max_length=100_000)]]


class Record(TypedDict, total=False):
    """A line of log.txt, as far as it is read back."""

    epoch: Required[Count]
    step: Required[Count]
    start: Annotated[float, msgspec.Meta(ge=0, le=1)]
    progress: Required[Annotated[float, msgspec.Meta(ge=0, le=1)]]
    equivalent_epochs: Required[Number]
    input_size: Size
    train_loss: Required[float]
    images: Required[Count]
    images_per_s: Required[Number]
    seconds: Required[Seconds]
    eval_size: Size
    test_loss: float
    test_loss_ema: float
    test_acc1: Number
    test_acc1_ema: Number
    test_acc5: Number
    test_acc5_ema: Number
    test_map: Number
    test_map_ema: Number
    test_box_AP: Number | None
    test_box_AP_ema: Number | None
    test_mask_AP: Number | None
    test_mIoU: Number | None
    test_mIoU_ema: Number | None
    per_class: dict[Short, dict[Short, Number | None]]


class Class(TypedDict, total=False):
    name: Required[str]
    images: Required[Count]
    training_images: Required[Count]
    acc1: Number | None
    ap: Number | None


class Pair(TypedDict):
    label: str
    predicted: str
    images: Count


class Image(TypedDict):
    image: str
    thumbnail: Annotated[str, msgspec.Meta(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]*$")]
    labels: list[str]
    predicted: list[str]


class Findings(TypedDict, total=False):
    """validation.json, as training/findings.py makes it."""

    eval_size: Required[Size]
    step: Required[Count]
    images: Required[Count]
    classes: Required[list[Class]]
    confusions: list[Pair]
    worst: Required[list[Image]]


def read_settings(folder: Path) -> dict[str, Any]:
    """config.yaml, with the default of every setting that it does not state.

    Raises:
        OSError: it is not there. ValueError: it is no mapping, or a setting has another type; both name the file.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    settings = read_yaml(path, "the settings")
    config = _convert(settings, Config, path)
    return {**plain(config), **settings}


def read_plan(folder: Path) -> dict[str, Any]:
    """plan.json. Raises OSError or ValueError, naming the file."""
    path = folder / "plan.json"
    plan = _json(read_text(path, 1 << 24), path)
    _convert(plan, PlanFile, path)
    return plan


def read_environment(folder: Path) -> dict[str, str]:
    """environment.json; empty without one. Raises OSError or ValueError, naming the file."""
    path = folder / "environment.json"
    if not path.exists():
        return {}
    about = _json(read_text(path, 1 << 20), path)
    return _convert(about, dict[str, Short], path)


def read_findings(path: Path) -> dict[str, Any] | None:
    """validation.json; None without one. Raises OSError or ValueError, naming the file."""
    if not path.exists():
        return None
    found = _json(read_text(path, 1 << 26), path)
    _convert(found, Findings, path)
    return found


def check_records(records: list[Any], path: Path) -> list[dict[str, Any]]:
    """The records of a log.txt. Raises ValueError for a line that is no record of a pass, naming it."""
    for number, record in enumerate(records, 1):
        _convert(record, Record, f"{path}, record {number}")
    return records


def parse_record(line: str) -> dict[str, Any] | None:
    """A line of log.txt; None for a damaged one."""
    try:
        record = json.loads(line)
        return record if isinstance(record, dict) and math.isfinite(record["progress"]) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.txt. Damaged lines are passed over, and said on standard error.

    Raises:
        ValueError: it has more than 1,000 of them: it is something else.
    """
    records, damaged = [], []
    for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):
        record = parse_record(line.decode("utf-8", "surrogateescape"))
        if record is not None:
            records.append(record)
        elif line.endswith(b"\n"):  # else it is in the making, or a kill cut it short
            damaged.append(number)
        if len(damaged) > MOST_DAMAGED:
            raise ValueError(f"{path} is no log of a run: more than {MOST_DAMAGED:,} lines hold no record")
    if damaged:
        listed = ", ".join(map(str, damaged[:5])) + ", ..." * (len(damaged) > 5)
        print(f"warning: {path} line {listed} is damaged and passed over", file=sys.stderr)
    return records


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _convert(content: Any, schema: Any, where: Path | str) -> Any:
    try:
        return msgspec.convert(content, schema, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{where} is not what a run writes: {' '.join(str(error).split())[:300]}") from None
