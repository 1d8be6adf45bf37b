"""By which mean and deviation the images of a model's weights were normalised."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._hub import hf_split
from torch import Tensor, nn

from config.files import read_text

from .formats import Layout, is_timms

Numbers = tuple[float, ...]


def normalisation(
    model: nn.Module, content: Mapping[str, Any], source: str, layout: Layout, state: Mapping[str, Tensor]
) -> tuple[Numbers, Numbers, str]:
    """Mean and deviation per channel, for pixels in [0, 1], and how they are known.

    A checkpoint of this project says it; so does a model's repository on the hub. The authors whose names are known
    (`formats`) all took ImageNet's. Of other files the names are timm's, and so is what timm notes of the model.
    """
    settings = content.get("config")
    if isinstance(settings, Mapping) and "format_version" in content:
        mean, std = _pair(settings)
        return mean, std, "as its checkpoint says"
    hub = re.match(r"(?:hf[_-]hub:|(?=timm/))([^/]+/[^/]+)$", source)
    if hub:
        try:
            name, revision = hf_split(hub[1])
            about = json.loads(read_text(huggingface_hub.hf_hub_download(name, "config.json", revision=revision)))
            mean, std = _pair(about["pretrained_cfg"])
            return mean, std, "as its page on the hub says"
        except Exception:  # a repository without a description; each library has its own for that
            pass
    fine_tuned_mae = "fc_norm.weight" in state and "norm.weight" not in state
    if fine_tuned_mae or not is_timms(layout):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "as its authors do"
    noted = getattr(model, "pretrained_cfg", None)
    if isinstance(noted, Mapping) and noted.get("mean"):
        return *_pair(noted), "as timm notes of the model; --mean and --std say otherwise"
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "ImageNet's; --mean and --std say otherwise"


def _pair(settings: Mapping[str, Any]) -> tuple[Numbers, Numbers]:
    """What settings say, or ImageNet's where they say nothing."""
    return (
        _numbers(settings.get("mean"), IMAGENET_DEFAULT_MEAN),
        _numbers(settings.get("std"), IMAGENET_DEFAULT_STD),
    )


def _numbers(values: Sequence[float] | None, default: Numbers) -> Numbers:
    return tuple(float(value) for value in values) if values else default
