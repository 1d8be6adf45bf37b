"""Loading the state of an optimizer from a file: every tensor is seen to be one that the optimizer would have made."""

from __future__ import annotations

import copy
from typing import Any

import torch

Signature = dict[str, tuple[torch.dtype, tuple[int, ...]] | type]


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Fill ``optimizer`` with what its ``state_dict()`` gave in another process.

    Kernels trust the state they are given: one of another shape makes them write where they must not, and one of
    another layout (of a run with another ``--channels_last``) mixes the moments up. So each entry is compared with the
    state that such an optimizer makes for such a parameter, and brought to the parameter's layout. Of the parameter
    groups only counters are taken, and the learning rate; the settings stay those of ``optimizer``.

    Args:
        optimizer: over the same parameters in the same order, without any state.

    Raises:
        ValueError: groups or entries that are not this optimizer's; names the parameter's number and the entry.
    """
    groups, states = saved["param_groups"], saved["state"]
    counts = [len(group["params"]) for group in optimizer.param_groups]
    try:
        found = [len(group["params"]) for group in groups]
        numbers = [number for group in groups for number in group["params"]]
    except (KeyError, TypeError):
        raise ValueError("its parameter groups do not list their parameters") from None
    if found != counts:
        raise ValueError(f"it has parameter groups of {found} parameters, the optimizer of {counts}")
    if numbers != list(range(len(numbers))) or not states.keys() <= set(numbers):
        raise ValueError("it holds the state of parameters that it does not list")
    counters = [_counters(own, group) for own, group in zip(optimizer.param_groups, groups)]
    signatures: dict[tuple, Signature | None] = {}
    state = {}
    parameters = ((group, parameter) for group in optimizer.param_groups for parameter in group["params"])
    for number, (group, parameter) in enumerate(parameters):
        if number not in states:
            continue
        kind = (tuple(parameter.shape), parameter.dtype, id(group))
        if kind not in signatures:
            signatures[kind] = _signature(optimizer, group, parameter)
        try:
            _check(states[number], signatures[kind], parameter)
        except ValueError as error:
            raise ValueError(f"optimizer state of parameter {number}: {error}") from None
        state[number] = {key: _like(value, parameter) for key, value in states[number].items()}
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": [a | b for a, b in zip(own, counters)]})


def _counters(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a saved group that the settings do not say: what the optimizer counts there (LAMB its steps)."""
    # A switch that is not there today is one of a newer torch (AdamW's decoupled_weight_decay).
    counters = {
        key: value for key, value in saved.items() if key == "step" or (key not in own and not isinstance(value, bool))
    }
    for key, value in counters.items():
        plain = value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
        if not isinstance(key, str) or isinstance(plain, bool) or not isinstance(plain, int | float | None):
            raise ValueError(f"its parameter groups have a {key!r} that is no number")
    return counters | ({"lr": saved["lr"]} if isinstance(saved.get("lr"), float) else {})


def _signature(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> Signature | None:
    """What the state of such a parameter is after a step, tried on one that stands still; None where that fails."""
    trial = torch.zeros_like(parameter, requires_grad=True)
    trial.grad = torch.zeros_like(trial)
    twin = copy.copy(optimizer)
    twin.__dict__ = {
        **optimizer.__dict__,
        "state": type(optimizer.state)(optimizer.state.default_factory),
        "param_groups": [{**group, "params": [trial]}],
    }
    try:
        twin.step()
        entries = twin.state[trial]
    except Exception:  # an optimizer that steps in a way of its own: then shapes alone are compared
        return None
    return {
        key: (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value)
        for key, value in entries.items()
    }


def _check(entries: dict[str, Any], signature: Signature | None, parameter: torch.Tensor) -> None:
    if not isinstance(entries, dict):
        raise ValueError(f"it is a {type(entries).__name__}")
    if signature is not None and entries.keys() != signature.keys():
        raise ValueError(f"it holds {_names(entries)}; this optimizer keeps {_names(signature)}")
    for key, value in entries.items():
        if isinstance(value, torch.Tensor):
            is_now = value.dtype, tuple(value.shape)
            fits = value.ndim == 0 or value.shape == parameter.shape if signature is None else is_now == signature[key]
            if not fits:
                right = signature and signature[key]
                right = "no tensor" if not isinstance(right, tuple) else f"{right[0]} {right[1]}"
                raise ValueError(f"{key} is {is_now[0]} {is_now[1]}, not {right}")
        elif signature is not None and type(value) is not signature[key]:
            raise ValueError(f"{key} is a {type(value).__name__}")


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """A tensor of the parameter's shape in its layout and on its device; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or value.ndim == 0:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _names(entries: dict[str, Any]) -> str:
    return ", ".join(map(str, entries)) or "nothing"
