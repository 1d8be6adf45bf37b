"""Load anyone's weights into a model: every tensor of the file and of the model is accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curriculum.resample import resample

from .formats import BOOKKEEPING, MAE, recognise, timm_name
from .heads import classifier_names, fold_norm
from .normalisation import normalisation
from .reading import read_weights
from .schema import is_ordinary

# What training checkpoints call the weights and their moving average, the usual name first.
_KEYS = {"model": ("model", "state_dict"), "model_ema": ("model_ema", "state_dict_ema")}
_POSITIONAL = re.compile(r"pos_emb|position|rel_pos|attention_bias")


@dataclass
class Report:
    """What became of every tensor. `str()` is the few lines to print.

    Attributes:
        source, layout, key: where the weights came from, whose names they had, and which entry of the file it was.
        others: further sets of weights in the file, under their keys.
        loaded, resized: the model's names; resized ones with (shape in the file, shape in the model).
        dropped: the file's names that the model has no place for.
        random: the model's names that kept their initial values.
        head: what became of the classifier, where the file says which classes it is for.
        mean, std: by which pixels in [0, 1] were normalised for these weights; ``why`` says how that is known.
    """

    source: str
    layout: str
    key: str
    others: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    head: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        others = f" ({', '.join(self.others)} not used)" if self.others else ""
        resized = ""
        if self.resized:
            first = [f"{name} {old} -> {new}" for name, (old, new) in self.resized.items()]
            resized = f", of them resized {_some(first, 1)}"
        buffers = [name for name in self.dropped if BOOKKEEPING.match(name)]
        dropped = [name for name in self.dropped if name not in buffers]
        return (
            f"weights: {self.source}: {self.key}{others}, {self.layout} names: "
            f"{len(self.loaded)} tensors loaded{resized}, {_some(dropped)} dropped, "
            f"{len(buffers)} buffers not needed, {_some(self.random)} left random{self.head}; "
            f"images normalised by mean {_numbers(self.mean)}, deviation {_numbers(self.std)} ({self.why})"
        )


def load_weights(
    model: nn.Module,
    source: str | Path,
    *,
    key: str | None = None,
    head_init_scale: float = 1.0,
    classes: Sequence[str] | None = None,
) -> Report:
    """Load weights that anyone saved; the format is recognised by what the file holds, not by its name.

    Formats: checkpoints of this project and of the EfficientTrain release, the authors' of ConvNeXt, DeiT, Swin, CSWin,
    PVT, MetaFormer and MAE (pre-trained or fine-tuned), torchvision's and timm's. Prefixes of wrappers (`module.`,
    `_orig_mod.`) are removed. Position embeddings and relative position bias tables of another input size are resampled
    (bilinear). If the file has a head for another number of classes, or none, the model keeps its own. Nothing is
    changed if anything does not fit.

    Args:
        model: without wrappers, with freshly drawn weights where they may stay.
        source: a path, a URL, `hf_hub:owner/name` or `hf_hub:owner/name/file`.
        key: which weights of a training checkpoint: `model`, `model_ema`, or another entry's name. None: `model` if the
            file has it.
        head_init_scale: factor on a head that stays random (ConvNeXt fine-tunes with 0.001).
        classes: names of the model's outputs. Where the file names its own, a head for other classes is not taken, and
            one for the same classes in another order is put into this one.

    Returns:
        A `Report`.

    Raises:
        ValueError: the file cannot be read safely, its body is not this model's, or its numbers are not finite; the
            message names the tensors.
    """
    content = read_weights(source)
    report, state = choose_weights(content, source, key)
    layout = recognise(state)
    report.layout = layout.name
    order = _order(content.get("classes"), classes)
    own, heads = model.state_dict(), tuple(f"{name}." for name in classifier_names(model))
    new: dict[str, Tensor] = {}
    unexpected, misshapen = [], []
    outputs = getattr(model, "num_classes", None) or (len(classes) if classes else 0)
    for name, tensor in state.items():
        target = timm_name(layout, name)
        is_head = target is not None and target.startswith(heads)
        pre_trained_norm = layout is MAE and target is not None and target.startswith("norm.")
        if target is None or (pre_trained_norm and "fc_norm.weight" in own) or (is_head and order == []):
            report.dropped.append(name)
        elif target not in own:
            (report.dropped if is_head else unexpected).append(name)
        elif (fitted := fit(target, tensor, own[target])) is not None:
            if is_head and order:
                fitted = _in_order(fitted, order, outputs)
            new[target] = fitted
            if fitted.numel() != tensor.numel():
                report.resized[target] = tuple(tensor.shape), tuple(fitted.shape)
        elif is_head:
            report.dropped.append(name)
        else:
            misshapen.append(f"{target} {tuple(tensor.shape)}, not {tuple(own[target].shape)}")

    head = [name for name in own if name.startswith(heads)]
    if any(name not in new for name in head):  # a head is loaded whole or not at all
        report.dropped += [name for name in state if timm_name(layout, name) in new and timm_name(layout, name) in head]
        new = {name: tensor for name, tensor in new.items() if name not in head}
        report.random = head
    if layout is MAE:  # its encoder ends in a norm over tokens; averaging models put one behind the average instead
        report.random += [name for name in own if name.startswith("fc_norm.")]
    kept = {*new, *report.random}
    missing = [n for n in own if n not in kept and not n.endswith("num_batches_tracked")]
    if missing or unexpected or misshapen:
        raise ValueError(_misfit(model, report, missing, unexpected, misshapen))
    model.load_state_dict(new, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in report.random and name in head:
                parameter.mul_(head_init_scale)
    report.loaded = list(new)
    if order == []:
        report.head = f" (a new head: {Path(source).name} knows other classes than these {len(classes)})"
    elif order and not report.random:
        report.head = " (the head's rows put into this run's order of the classes)"
    report.mean, report.std, report.why = normalisation(model, content, str(source), layout, state)
    return report


def _order(theirs: Any, ours: Sequence[str] | None) -> list[int] | None:
    """Which row of the file's head is for each of our classes; None: as they are; []: they are other classes."""
    known = isinstance(theirs, list) and all(isinstance(name, str) for name in theirs)
    if ours is None or not known or list(ours) == theirs:
        return None
    place = {name: row for row, name in enumerate(theirs)}
    if len(place) != len(theirs) or place.keys() != set(ours) or len(ours) != len(theirs):
        return []
    return [place[name] for name in ours]


def _in_order(tensor: Tensor, order: list[int], outputs: int) -> Tensor:
    """Rows of a layer whose outputs are the classes, and perhaps more that have no names; other tensors as they are."""
    if tensor.ndim == 0 or len(tensor) != outputs or outputs < len(order):
        return tensor
    return tensor[torch.tensor([*order, *range(len(order), outputs)])]


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def choose_weights(content: Mapping[str, Any], source: str | Path, key: str | None) -> tuple[Report, dict[str, Tensor]]:
    """Pick one set of weights from what a file holds, without the prefixes of wrappers and the BatchNorm of a probe.

    Raises:
        ValueError: there are none, or none under `key`.
    """
    if _is_weights(content):
        content = {"model": content}
    sets = {name: value for name, value in content.items() if _is_weights(value)}
    wanted = _KEYS.get(key, (key,)) if key else [name for names in _KEYS.values() for name in names]
    found = next((name for name in wanted if name in sets), None)
    if found is None:
        what = f"no weights under {key!r}" if key else "no weights"
        raise ValueError(f"{source}: holds {what}; it has {', '.join(map(str, content)) or 'nothing'}")
    report = Report(str(source), "", found, [name for name in sets if name != found])
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in sets[found].items()}
    if odd := [name for name, tensor in state.items() if not is_ordinary(tensor)]:
        raise ValueError(f"{source}: {found} holds tensors that are not ordinary, dense ones: {_some(odd)}")
    if bad := nonfinite(state):
        raise ValueError(
            f"{source}: {found} holds numbers that are not finite, in {_some(bad)}; take a checkpoint of before "
            "its training went wrong"
        )
    return report, fold_norm(state)


def nonfinite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, but for masks, which may be made of it."""
    floats = {name: t for name, t in state.items() if t.is_floating_point() and not BOOKKEEPING.match(name)}
    return [name for name, tensor in floats.items() if not torch.isfinite(tensor).all()]


def _is_weights(value: Any) -> bool:
    named = isinstance(value, Mapping) and bool(value) and all(isinstance(name, str) for name in value)
    return named and all(isinstance(x, Tensor) for x in value.values())


def fit(name: str, tensor: Tensor, own: Tensor) -> Tensor | None:
    """The tensor in the shape of the model's own, resampled if it is positional; None if it does not fit."""
    if tensor.shape == own.shape:
        return tensor
    if [n for n in tensor.shape if n > 1] == [n for n in own.shape if n > 1]:  # linear layers as 1 x 1 convolutions
        return tensor.reshape(own.shape)
    if _POSITIONAL.search(name) and _are_grids(tensor.shape, own.shape):
        return resample(tensor, tuple(tensor.shape), tuple(own.shape))
    return None


def _are_grids(old: torch.Size, new: torch.Size) -> bool:
    """Whether two shapes differ by the size of a square grid alone, with up to 8 entries that belong to no position."""
    axes = [axis for axis, (a, b) in enumerate(zip(old, new)) if a != b]
    if len(old) != len(new) or not 1 <= len(axes) <= 2:
        return False
    if len(axes) == 2:
        return axes[1] == axes[0] + 1 and old[axes[0]] == old[axes[1]] and new[axes[0]] == new[axes[1]]
    a, b = old[axes[0]], new[axes[0]]
    return any(min(a, b) > k and math.isqrt(a - k) ** 2 == a - k and math.isqrt(b - k) ** 2 == b - k for k in range(9))


def _misfit(model: nn.Module, report: Report, missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    faults = [
        f"{what}: {_some(names)}"
        for what, names in [
            ("that the file lacks", missing),
            ("that the model lacks", unexpected),
            ("of another shape in the file", misshapen),
        ]
        if names
    ]
    return (
        f"{report.source} does not fit {type(model).__name__}; its weights ({report.key!r}) have {report.layout} "
        f"names. Tensors {'; '.join(faults)}"
    )


def _some(names: list[str], most: int = 4) -> str:
    """A count and the first few names."""
    return f"{len(names)} ({', '.join(names[:most])}{', ...' * (len(names) > most)})" if names else "0"
