"""Which layers of a model are its classifier, and training them alone (linear probing)."""

from __future__ import annotations

from torch import Tensor, nn

_EPS = 1e-6  # of a probe's BatchNorm
_MEAN = ".0.running_mean"


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


def freeze_body(model: nn.Module, normalise: bool = False) -> None:
    """Prepare linear probing: only the classifier trains, the body neither learns nor draws nor updates statistics.

    The body is put into eval mode before every forward pass, whatever `train()` the training loop calls: its dropout
    and drop path are off and its BatchNorm uses, and leaves, the running statistics it has.

    Args:
        normalise: put a BatchNorm without weights before the classifier, as MAE's authors do: features of
            self-supervised models differ much in scale. `fold_norm` takes it out of the weights again.

    Raises:
        ValueError: the model has no classifier to train, or none that is a linear layer where one is asked for.
    """
    names = classifier_names(model)
    heads = [model.get_submodule(name) for name in names]
    if not any(True for head in heads for _ in head.parameters()):
        raise ValueError(f"linear probing: {type(model).__name__} has no classifier to train (num_classes 0?)")
    model.requires_grad_(False)
    for head in heads:
        head.requires_grad_(True)
    for name, head in zip(names, heads) if normalise else ():
        if not isinstance(head, nn.Linear):
            raise ValueError(f"--linear_probe batchnorm: the classifier {name} is no linear layer; use true")
        norm = nn.BatchNorm1d(head.in_features, eps=_EPS, affine=False)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Sequential(norm, head))
    model.register_forward_pre_hook(_still_body)


def fold_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the BatchNorm of a probe into its classifier: weights of the model as it was before `freeze_body`."""
    for name in [key.removesuffix(_MEAN) for key in state if key.endswith(_MEAN)]:
        mean, variance = (state.get(f"{name}.0.running_{what}") for what in ("mean", "var"))
        weight, bias = (state.get(f"{name}.1.{what}") for what in ("weight", "bias"))
        if f"{name}.0.weight" in state or weight is None or bias is None or weight.shape[1:] != mean.shape:
            continue  # another BatchNorm
        weight = weight / (variance + _EPS).sqrt()
        state = {key: value for key, value in state.items() if not key.startswith((f"{name}.0.", f"{name}.1."))}
        state |= {f"{name}.weight": weight, f"{name}.bias": bias - weight @ mean}
    return state


def _still_body(model: nn.Module, _arguments) -> None:
    live = {part for name in classifier_names(model) for part in model.get_submodule(name).modules()} | {model}
    for part in model.modules():
        if part not in live:
            part.training = False
