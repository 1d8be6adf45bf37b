"""Counts what code would ask of a GPU on a machine without one: kernels, and moments at which the host waits for it.

Tensors are fake: they have shapes and devices but no values, and nothing is computed. What needs values cannot run, nor
can the backward pass, which asks for a real device: gradients are just there, and what makes them is not counted.
"""

import collections
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import curriculum.device_augment
import curriculum.operators
import engine
import inputs.finish

CUDA = torch.device("cuda", 0)
NO_KERNEL = (  # views and allocations
    *("view", "select.", "slice", "split", "expand", "permute", "alias", "detach", "unsqueeze", "transpose", "unbind"),
    *("as_strided", "unfold", "squeeze", "prim.device", "chunk", "t.default", "lift_fresh", "is_same_size", "empty"),
)
CACHES = (
    *(inputs.finish._generator, inputs.finish._per_channel, curriculum.device_augment._constant),
    *(curriculum.operators._fourier_axis, curriculum.operators._lanczos_matrix),
)


@contextmanager
def fake_device():
    """Tensors made inside may lie on CUDA. Page-locked memory is remembered; generators and streams exist in name
    only."""
    none = SimpleNamespace(manual_seed=lambda seed: None)
    for cache in CACHES:
        cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.Tensor, "pin_memory", _pin)
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor: getattr(tensor, "was_pinned", False))
        patch.setattr(inputs.finish, "_generator", lambda device: none)
        patch.setattr(curriculum.operators, "_fourier_axis", partial(_fourier_axis, curriculum.operators._fourier_axis))
        patch.setattr(engine, "seed_generators", lambda device, seed: None)
        patch.setattr(engine, "SideStream", lambda device: SimpleNamespace(prepare=lambda make: make()))
        patch.setattr(torch.Tensor, "backward", _gradients)
        yield
    for cache in CACHES:
        cache.cache_clear()


def _gradients(loss):
    """Gives every parameter on which a loss depends a gradient."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)


def _fourier_axis(make, length, size, dtype, device):
    """The matrices' shapes; making them needs values."""
    with unset_fake_temporarily():
        real = make(length, size, dtype, torch.device("cpu"))
    matrices, *rest = tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), tuple(real))
    return type(real)(matrices, *rest)


def _pin(tensor):
    pinned = tensor.clone()
    pinned.was_pinned = True
    return pinned


def to_fake(module: nn.Module) -> nn.Module:
    """Inside `fake_device`: puts every parameter and buffer on the device; tied ones stay tied."""
    seen: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor | None, parameter: bool) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in seen:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CUDA)
            seen[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if parameter else fake
        return seen[id(tensor)]

    for part in module.modules():
        part._parameters.update({name: moved(value, True) for name, value in part._parameters.items()})
        part._buffers.update({name: moved(value, False) for name, value in part._buffers.items()})
    return module


class Count(TorchDispatchMode):
    """``kernels`` in all and ``ops`` by name; ``copies`` to the device; ``waits``, by the place in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.copies = 0, 0
        self.ops, self.waits = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function).removeprefix("aten.")
        if name.startswith(("_local_scalar_dense", "nonzero", "masked_select", "equal")):
            self.waits[self._place()] += 1
        if name.startswith("_local_scalar_dense"):
            return 1
        out = function(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cuda" for x in given + made) and not name.startswith(NO_KERNEL):
            self.kernels += 1
            self.ops[name] += 1
        if name.startswith(("_to_copy", "copy_")) and given and made:
            source = given[0] if name.startswith("_to_copy") else given[-1]
            ways = source.device.type, made[0].device.type
            asynchronous = kwargs.get("non_blocking") or any(value is True for value in args)
            self.copies += ways == ("cpu", "cuda")
            if ways == ("cuda", "cpu") or (ways == ("cpu", "cuda") and not asynchronous):
                self.waits[self._place()] += 1
        return out

    @staticmethod
    def _place() -> str:
        own = [frame for frame in traceback.extract_stack()[:-2] if Path(frame.filename).is_relative_to(ROOT)]
        own = [frame for frame in own if "site-packages" not in frame.filename]
        return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
