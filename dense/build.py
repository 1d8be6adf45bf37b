"""Detectors and segmenters by name, with what a run asks of a model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .backbones import STRIDES, OnBody, make_body
from .detectors import HEADS, RETINANET_STRIDES
from .upernet import upernet

DETECTORS = tuple(HEADS)
SEGMENTERS = ("upernet",)
MULTIPLE = 32  # what batches are padded to, and sides rounded to


def make_dense(
    head: str,
    name: str,
    num_classes: int,
    drop_path: float = 0.0,
    body: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> OnBody:
    """Build a detector or segmenter with random weights.

    Args:
        head: one of ``DETECTORS`` or ``SEGMENTERS``.
        name, drop_path: of the body, as :func:`make_body` takes them; ``body``: its further settings.
        num_classes: of the data set, without background.
        options: the head's settings (channels, width, ...).

    Returns:
        The model, with the attributes that `models.create_model` gives. It takes images of any size.

    Raises:
        ValueError: names the setting.
    """
    strides = RETINANET_STRIDES if head == "retinanet" else STRIDES
    made = make_body(name, drop_path, strides, pyramid=head in DETECTORS, **(body or {}))
    try:
        model = ({**HEADS, "upernet": upernet}[head])(made, num_classes, **(options or {}))
    except TypeError as error:
        raise ValueError(f"--head_args {options}: {error}") from None
    model.rebuild = partial(_rebuild, head, name, num_classes, drop_path, body, options)
    model.any_size, model.takes_size, model.size_multiple, model.input_size = True, False, MULTIPLE, 0
    return model


def _rebuild(head: str, name: str, num_classes: int, drop_path: float, body, options, _size: int) -> nn.Module:
    return make_dense(head, name, num_classes, drop_path, body, options)
