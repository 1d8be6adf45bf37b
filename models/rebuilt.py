"""The model of a checkpoint, built from what the checkpoint says of it, with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .reading import read_weights
from .registry import build_from_file, check_name_from_file
from .weights import Report, load_weights


@dataclass(frozen=True)
class Rebuilt:
    """A classifier and where it is from.

    Attributes:
        content: all that the checkpoint holds.
        model: in evaluation mode, at ``size`` pixels a side.
        name, arguments: what :func:`models.create_model` made it of.
        classes: names of its outputs.
        crop_pct: the share of an image that the centre crop of an evaluation takes.
        report: of loading its weights.
    """

    content: dict[str, Any]
    model: nn.Module
    name: str
    arguments: dict[str, Any]
    size: int
    classes: list[str]
    crop_pct: float
    report: Report


def refuse_dense(content: Mapping[str, Any], source: str) -> None:
    """Raises ValueError for a checkpoint of a detector or segmenter."""
    settings = content.get("config") if "format_version" in content else None
    if settings and settings.get("task") in ("detection", "segmentation"):
        raise ValueError(f"{source} is a {settings['task']} checkpoint: export it by python -m dense.export")


def rebuild(source: str, size: int | None = None, ema: bool = False, name: str | None = None) -> Rebuilt:
    """Build the classifier of a checkpoint of this project.

    Args:
        source: whatever :func:`read_weights` reads.
        size: pixels a side; default: the checkpoint's base size.
        ema: the moving average instead of the weights themselves.
        name: of the model; default: the checkpoint's, which must then be one of the registry's.

    Raises:
        ValueError: a checkpoint without settings, of another task than classification, or that cannot be built.
    """
    content = read_weights(source)
    settings, classes = content.get("config"), content.get("classes")
    if "format_version" not in content or not classes:
        raise ValueError(f"{source} is not a checkpoint of this project, so its model cannot be built from it")
    refuse_dense(content, source)
    try:
        size = size or settings["eval_size"] or settings["input_size"]
        outputs = settings["num_classes"] or len(classes)
        wanted, arguments, crop = name or settings["model"], settings["model_args"] or {}, settings["crop_pct"]
    except KeyError as error:
        raise ValueError(f"{source}: its settings lack {error}, so its model cannot be built from it") from None
    if name is None:
        check_name_from_file(wanted, arguments, source)
    model = build_from_file(wanted, outputs, size, arguments, content["model"], source)
    report = load_weights(model, source, key="model_ema" if ema else "model")
    if report.random:
        raise ValueError(
            f"{source} has no classifier ({report.random[0]} would stay random): train one with --finetune, or take "
            "the rest by --format timm"
        )
    return Rebuilt(content, model.eval(), wanted, arguments, size, classes, crop, report)
