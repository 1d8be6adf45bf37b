"""Parameter groups for the optimizer: what decays, and layer-wise learning rate decay for every model."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Any

from timm.models import group_parameters
from timm.models.convnext import ConvNeXt
from timm.models.metaformer import MetaFormer
from timm.optim import auto_group_layers
from torch import Tensor, nn

from .heads import classifier_names


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, matrices: bool = False
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into optimizer groups.

    No weight decay: vectors and scalars (norms, biases, layer scale) and what `model.no_weight_decay()` names (class
    tokens, position embeddings, Swin's bias tables). The learning rate of a layer is `layer_decay ** (layers above it)`
    times that of the head; the schedule multiplies by the group's `lr_scale`.

    Args:
        model: without wrappers, so that its names are its own.
        weight_decay: of the other parameters.
        layer_decay: in (0, 1]; 1 is off.
        matrices: keep apart what maps features to features (`is_matrix`), for Muon.

    Returns:
        Groups with `params`, `weight_decay`, `lr_scale` and, if asked for, `matrix`, in the order of their first
        parameter.

    Raises:
        ValueError: `layer_decay` out of range, or the model does not say which layer a parameter belongs to.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay {layer_decay}: it must be above 0 and at most 1 (1 is off)")
    ids = layer_ids(model) if layer_decay < 1.0 else {}
    last = max(ids.values(), default=0)  # not their count: the smaller CSWin and ConvNeXt leave gaps below the head
    exempt = list(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else []
    heads = classifier_names(model) if matrices else []
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = ids.get(name, last)
        decays = parameter.ndim > 1 and not name.endswith(".bias") and not any(fnmatch(name, p) for p in exempt)
        empty = {"params": [], "weight_decay": weight_decay * decays, "lr_scale": layer_decay ** (last - layer)}
        matrix = matrices and decays and is_matrix(parameter) and name.rpartition(".")[0] not in heads
        if matrices:
            empty["matrix"] = matrix
        groups.setdefault((layer, decays, matrix), empty)["params"].append(parameter)
    return list(groups.values())


def is_matrix(parameter: Tensor) -> bool:
    """Whether a weight maps features to features: neither the stem, which sees the image's three channels, nor a
    depthwise convolution, an embedding or a vector."""
    return parameter.ndim in (2, 4) and min(parameter.shape[:2]) > 3


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The layer of every parameter, 0 at the image, for layer-wise learning rate decay.

    A model's own `layer_id(name)` decides (CSWin); ConvNeXt follows its authors' twelve layers; any other follows
    timm's `group_matcher`, or, in the few that have none, timm's count of twelve tensors a layer.
    """
    names = [name for name, _ in model.named_parameters()]
    if hasattr(model, "layer_id"):
        return {name: model.layer_id(name) for name in names}
    if isinstance(model, ConvNeXt):
        return {name: _convnext_layer(name) for name in names}
    if isinstance(model, MetaFormer):
        return group_parameters(model, _METAFORMER, reverse=True)
    if hasattr(model, "group_matcher"):
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    if getattr(model, "pretrained_cfg", {}).get("classifier"):
        return auto_group_layers(model)
    raise ValueError(
        f"layer_decay: {type(model).__name__} does not say which layer a parameter belongs to; "
        "give it a method layer_id(name) -> int or timm's group_matcher(), or set layer_decay to 1"
    )


# CAFormer and its kin have no group_matcher in timm: one layer per block, a downsampling with the block after it.
_METAFORMER = {
    "stem": r"^stem",
    "blocks": [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
}

# timm's names -> (first layer, blocks per layer) of the ConvNeXt authors' optim_factory; None: the layer of all of it.
_CONVNEXT = [
    (r"stem\.", 0, None),
    (r"stages\.0\.", 1, None),
    (r"stages\.1\.", 2, None),
    (r"stages\.2\.downsample\.", 3, None),
    (r"stages\.2\.blocks\.(\d+)\.", 3, 3),
    (r"stages\.3\.", 12, None),
]


def _convnext_layer(name: str) -> int:
    """Three blocks of the third stage make a layer; the fourth stage is layer 12 in every size, the head 13."""
    for pattern, first, per_layer in _CONVNEXT:
        if match := re.match(pattern, name):
            return min(first + int(match[1]) // per_layer, 11) if per_layer else first
    return 13
