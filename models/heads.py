"""Which layers of a model are its classifier, and training them alone (linear probing)."""

from __future__ import annotations

from torch import nn


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the layers whose outputs are the classes: two in a distilled DeiT, the last of an MLP head.

    Where the classifier was removed (num_classes 0) it is the name of what stands in its place.
    """
    parts = dict(model.named_modules())
    declared = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = [name for name in ([declared] if isinstance(declared, str) else declared) if name in parts]
    if not names and hasattr(model, "get_classifier"):
        head = model.get_classifier()
        heads = head if isinstance(head, (tuple, list)) else (head,)
        names = [name for name, part in parts.items() if any(part is head for head in heads)]
    return names or [name for name in ("head", "fc", "classifier") if name in parts]


def freeze_body(model: nn.Module) -> None:
    """Prepare linear probing: only the classifier trains, the body neither learns nor draws nor updates statistics.

    The body is put into eval mode before every forward pass, whatever `train()` the training loop calls: its dropout
    and drop path are off and its BatchNorm uses, and leaves, the running statistics it has.

    Raises:
        ValueError: the model has no classifier to train.
    """
    heads = [model.get_submodule(name) for name in classifier_names(model)]
    if not any(True for head in heads for _ in head.parameters()):
        raise ValueError(f"linear probing: {type(model).__name__} has no classifier to train (num_classes 0?)")
    model.requires_grad_(False)
    for head in heads:
        head.requires_grad_(True)
    model.register_forward_pre_hook(_still_body)


def _still_body(model: nn.Module, _arguments) -> None:
    live = {part for name in classifier_names(model) for part in model.get_submodule(name).modules()} | {model}
    for part in model.modules():
        if part not in live:
            part.training = False
