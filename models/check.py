"""Check what a model of one's own offers to the curriculum: python -m models.check package.module:function."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from curriculum.resize import InputSizeError, check_input_sizes, set_input_size
from curriculum.skeleton import Skeleton

from .flops import count_flops
from .heads import classifier_names
from .layer_decay import layer_ids
from .registry import create_model

SIZES = (96, 160, 224)  # EfficientTrain++ at base size 224


@dataclass
class Subject:
    """The model under test and how it was asked for."""

    name: str
    model: nn.Module
    classes: int
    sizes: tuple[int, ...]


@dataclass
class Finding:
    """One line of the report: whether it is there, whether training needs it, what was seen or is to be done."""

    topic: str
    good: bool
    needed: bool
    text: str

    def __str__(self) -> str:
        verdict = "ok" if self.good else "MISSING" if self.needed else "without"
        return f"{verdict:<8} {self.topic:<16} {self.text}"


def check(name: str, classes: int = 10, sizes: Sequence[int] = SIZES) -> list[Finding]:
    """Try on a model all that training does with one.

    Args:
        name: as `--model` takes it; mostly ``package.module:function``.
        classes: outputs to ask for.
        sizes: input sizes, the base size last.

    Returns:
        Findings; where a needed one is bad, the model does not train under a curriculum of these sizes.
    """
    try:
        model = create_model(name, classes, sizes[-1])
    except Exception as error:  # whatever the user's own code raises
        return [Finding("made by name", False, True, _line(error))]
    subject = Subject(name, model, classes, tuple(sizes))
    found = [Finding("made by name", True, True, f"{type(model).__name__}, {_millions(model)} M parameters")]
    for topic, needed, test in CHECKS:
        try:
            good, text = True, test(subject)
        except Exception as error:
            good, text = False, _line(error)
        found.append(Finding(topic, good, needed, text))
        if needed and not good:
            break  # what follows rests on it
    return found


def check_trainable(build: Callable[[int], nn.Module], classes: int, size: int) -> None:
    """See, before a run begins, that a classifier trains: a forward and a backward pass of two images.

    It is built without values and run so, which takes no time; for real where it computes with values.

    Args:
        build: makes the model for an input size.

    Raises:
        ValueError: it returns something else than (N, classes) logits when it trains, or parameters get no gradient.
    """
    try:
        with torch.device("meta"), Skeleton():
            model = build(size).train()
        with torch.device("meta"), warnings.catch_warnings():  # a skeleton's in-place additions do nothing
            warnings.simplefilter("ignore")
            unused = _without_gradient(model, classes, size, "meta")
    except _Fault:
        raise
    except Exception:  # it computes with values
        unused = _without_gradient(build(size).train(), classes, size, "cpu")
    if unused:
        raise _Fault(
            f"{len(unused)} parameters of the model get no gradient ({', '.join(sorted(unused)[:3])}): on several "
            "devices training would fail; use them in forward, freeze them (requires_grad_(False)), or do not make them"
        )


class _Fault(ValueError):
    """What keeps a model from training."""


def _without_gradient(model: nn.Module, classes: int, size: int, device: str) -> set[str]:
    """Names of the parameters that get no gradient: in three passes, for some models drop layers at random."""
    for _ in range(3):
        out = model(torch.zeros(2, 3, size, size, device=device))
        if not isinstance(out, torch.Tensor):
            raise _Fault(
                f"the model returns a {type(out).__name__} when it trains, not logits (images, {classes}): return "
                "those alone, or switch its further outputs off (--model_args)"
            )
        if out.shape != (2, classes):
            raise _Fault(
                f"the model's output has shape {tuple(out.shape)} for two images, not (2, {classes}): return logits, "
                "and take num_classes as an argument"
            )
        F.cross_entropy(out.float(), torch.zeros(2, dtype=torch.long, device=device)).backward()
        unused = {name for name, one in model.named_parameters() if one.requires_grad and one.grad is None}
        if not unused:
            break
    return unused


def _training(subject: Subject) -> str:
    check_trainable(partial(create_model, subject.name, subject.classes), subject.classes, subject.sizes[0])
    return "every parameter gets a gradient"


def _classes(subject: Subject) -> str:
    images = torch.zeros(2, 3, subject.sizes[-1], subject.sizes[-1])
    with torch.no_grad():
        out = subject.model.eval()(images)
    if not isinstance(out, torch.Tensor) or out.shape != (2, subject.classes):
        got = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"two images give {got}, not (2, {subject.classes}): return logits, and take num_classes as an argument"
        )
    return f"logits (N, {subject.classes})"


def _sizes(subject: Subject) -> str:
    try:
        check_input_sizes(subject.model, subject.sizes)
    except InputSizeError as error:
        raise ValueError(
            f"{error}. Offer set_input_size(img_size=(H, W)) as timm's models do, or take img_size as an argument, so "
            "that it can be built anew for another size; a model that needs other multiples says so as size_multiple"
        ) from None
    depends = hasattr(subject.model, "set_input_size") or subject.model.takes_size
    way = "by its own set_input_size" if hasattr(subject.model, "set_input_size") else "by building it for each"
    return f"{', '.join(map(str, subject.sizes))}: {way if depends else 'it does not depend on them'}"


def _resizing(subject: Subject) -> str:
    """Trains a step at each size, as a run does, and sees that parameters and optimizer follow."""
    model = create_model(subject.name, subject.classes, subject.sizes[0]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = dict(model.named_parameters())
    changed = set()
    for size in subject.sizes:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        set_input_size(model, size, optimizer)
        after = dict(model.named_parameters())
        if any(after.get(name) is not parameter for name, parameter in before.items()):
            raise ValueError(f"at size {size} its parameters are other objects, which the optimizer does not know")
        changed |= {name for name, parameter in after.items() if parameter.shape != shapes[name]}
        F.cross_entropy(model(torch.randn(2, 3, size, size)), torch.zeros(2, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return f"resamples {', '.join(sorted(changed))}" if changed else "changes no parameter"


def _rebuilding(subject: Subject) -> str:
    fresh = subject.model.rebuild(subject.model.input_size)
    fresh.load_state_dict(subject.model.state_dict())
    return "a fresh model takes its state dict"


def _meta(subject: Subject) -> str:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            model = create_model(subject.name, subject.classes, subject.sizes[-1]).eval()
            with torch.no_grad():
                model(torch.zeros(1, 3, subject.sizes[-1], subject.sizes[-1]))
        except Exception as error:
            raise ValueError(
                f"{_line(error)}. Plans and checks build and run it for real instead, which takes longer; avoid "
                ".item(), NumPy and tensors made in forward without a device"
            ) from None
    flops, _ = count_flops(lambda size: create_model(subject.name, subject.classes, size), subject.sizes)
    costs = ", ".join(f"{flops[size] / 1e9:.3g} at {size}" for size in subject.sizes)
    return f"counted without computing: G multiply-adds {costs}"


def _drop_path(subject: Subject) -> str:
    create_model(subject.name, subject.classes, subject.sizes[-1], drop_path=0.1)
    return "--drop_path works"


def _classifier(subject: Subject) -> str:
    names = classifier_names(subject.model)
    if not names:
        raise ValueError(
            "--linear_probe and fine-tuning to other classes need to know the classifier: call it head, fc or "
            "classifier, or offer get_classifier()"
        )
    return f"{', '.join(names)}: --linear_probe and fine-tuning to other classes work"


def _layer_decay(subject: Subject) -> str:
    return f"--layer_decay works, {max(layer_ids(subject.model).values()) + 1} layers"


def _features(subject: Subject) -> str:
    if not hasattr(subject.model, "forward_features"):
        raise ValueError("forward_features(images) would give the features before the head to other code")
    side = subject.sizes[-1]
    with torch.no_grad():
        out = subject.model.eval().forward_features(torch.zeros(1, 3, side, side))
    return f"forward_features gives {tuple(out.shape)} at {side}"


# In this order; what is needed comes first.
CHECKS: list[tuple[str, bool, Callable[[Subject], str]]] = [
    ("classes", True, _classes),
    ("input sizes", True, _sizes),
    ("training", True, _training),
    ("resizing", True, _resizing),
    ("checkpoints", True, _rebuilding),
    ("meta device", False, _meta),
    ("drop path", False, _drop_path),
    ("classifier", False, _classifier),
    ("layer decay", False, _layer_decay),
    ("features", False, _features),
]


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.check", description=__doc__)
    parser.add_argument("name", help="package.module:function, looked up from here; or any name that --model takes")
    parser.add_argument("--num_classes", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, metavar="B", help="input sizes, the base size last (96 160 224)"
    )
    options = parser.parse_args(arguments)
    found = check(options.name, options.num_classes, options.sizes)
    print("\n".join(map(str, found)))
    missing = [finding.topic for finding in found if finding.needed and not finding.good]
    if missing:
        print(f"error: {options.name} cannot be trained under the curriculum: {missing[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
