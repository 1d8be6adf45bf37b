"""Change the input size of a live model: the same object trains on, with its optimizer's moments and its EMA."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from timm.layers import PatchEmbed
from torch import nn

from curriculum.resample import resample, resample_state
from curriculum.skeleton import Skeleton

_TORCH_OWN = frozenset(vars(nn.Module()))  # attributes of every module: parameters, buffers, hooks, training, ...
_PLAIN = (int, float, str, bool, tuple, list, type(None))


def set_input_size(
    model: nn.Module, size: int, optimizer: torch.optim.Optimizer | None = None, ema: nn.Module | None = None
) -> bool:
    """Make `model` ready for square images of `size` pixels, in place; parameters keep their identity.

    A model that says ``any_size`` pads what it is given, whatever its shape: only its ``input_size`` is noted. Else
    three ways, tried in order: nothing to do for a model that does not depend on the size; the model's own (timm's)
    `set_input_size(img_size=(H, W))`; a model built anew by `model.rebuild(size)`, from which the present one takes
    what depends on the size. In each, position embeddings and bias tables are resampled from what the model held
    before: bilinear, align_corners=False, not antialiased; class tokens are kept. Optimizer state of the parameter's
    shape is resampled as the parameter is (second moments stay non-negative), scalars are kept, and state of any other
    shape (factored moments) is started anew. Gradients are cleared.

    Args:
        model: without DDP or torch.compile around it: drop them first and wrap again after.
        size: pixels per side.
        optimizer: any torch.optim.Optimizer over the model's parameters.
        ema: a module of the same construction, or an object that holds it as `.module` (timm's ModelEmaV3).

    Returns:
        bool: whether any parameter changed its shape.

    Raises:
        ValueError: if the model is wrapped, or cannot take the size; the model is then as it was.

    >>> from timm import create_model
    >>> model = create_model("test_vit", img_size=64)
    >>> model.pos_embed.shape  # a class token and 4 x 4 patches
    torch.Size([1, 17, 64])
    >>> set_input_size(model, 32), model.pos_embed.shape
    (True, torch.Size([1, 5, 64]))
    >>> set_input_size(create_model("test_resnet"), 32)
    False
    """
    averaged = getattr(ema, "module", ema)
    for part in (model, averaged):
        _refuse_wrapped(part)
    if getattr(model, "any_size", False):
        for part in (model, averaged):
            if part is not None:
                part.input_size = size
        return False
    changed = []
    if size != _present_size(model):
        check_input_sizes(model, [size])
        changed = _resize(model, size)
        model.zero_grad(set_to_none=True)
    for parameter, *change in changed if optimizer is not None else ():
        resample_state(optimizer.state, parameter, *change)
    if averaged is not None:
        _resize(averaged, size)
    return bool(changed)


class InputSizeError(ValueError):
    """A model cannot take an input size; `nearest` lists those around it that it takes, 0 to 2."""

    def __init__(self, message: str, nearest: list[int]):
        super().__init__(message)
        self.nearest = nearest


def check_input_sizes(model: nn.Module, sizes: Iterable[int]) -> None:
    """See that a model takes every one of `sizes`: a copy without values makes a forward pass; nothing changes.

    Raises:
        InputSizeError: naming the size, the reason, what sizes should be a multiple of, and the nearest that work.

    >>> from timm import create_model
    >>> check_input_sizes(create_model("test_vit", img_size=64), [32, 48])
    """
    _refuse_wrapped(model)
    if getattr(model, "any_size", False):
        return
    trial = _Trial(model)
    for size in sizes:
        reason = trial.refusal(size)
        if reason is None:
            continue
        nearest = trial.nearest(size)
        hint = f"the nearest that work: {' and '.join(map(str, nearest))}" if nearest else "nor any size near it"
        name = f"{type(model).__name__} (size multiple {getattr(model, 'size_multiple', 16)})"
        raise InputSizeError(f"input size {size}: {name} cannot take it ({reason}); {hint}", nearest)


# The check


class _Trial:
    """Finds out which input sizes a model takes, on copies of it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.present = _present_size(model)

    def refusal(self, size: int) -> str | None:
        """Why the model cannot take the size, or None."""
        if not isinstance(size, int) or size < 1:
            return "sizes are positive whole numbers of pixels"
        patch = getattr(self.model, "patch_embed", None)
        if isinstance(patch, PatchEmbed) and not patch.dynamic_img_pad and size % patch.patch_size[0]:
            side = patch.patch_size[0]
            return f"its patches of {side} pixels would leave {size % side} out"
        windowed = any(hasattr(part, "window_size") for part in self.model.modules())
        if windowed and hasattr(self.model, "set_input_size") and size % getattr(self.model, "size_multiple", 1):
            return "its windows would need padding"
        reason = self.attempt(size, "meta")
        # A few models compute with values in forward or, in torch 2.4, in resizing, which meta tensors lack: only a
        # real pass tells.
        unsure = reason is not None and ("meta" in reason or not self.runs_on_meta)
        return self.attempt(size, "cpu") if unsure else reason

    @cached_property
    def runs_on_meta(self) -> bool:
        return self.present is not None and self.attempt(self.present, "meta") is None

    def attempt(self, size: int, device: str) -> str | None:
        """Resize a copy on the device and run it. Why that failed, or None."""
        model = self.model
        try:
            clone = model.rebuild(self.present) if device == "cpu" and _on_meta(model) else _copy_on(model, device)
            _resize(clone.eval(), size)
            dtype = next((p.dtype for p in clone.parameters() if p.is_floating_point()), torch.float32)
            with torch.no_grad(), _fork_rng():
                clone(torch.zeros(2, getattr(model, "in_chans", 3), size, size, dtype=dtype, device=device))
        except Exception as error:
            if str(error).strip():
                return str(error).strip().splitlines()[0]
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in Path(f.filename).parts]
            return f"{type(error).__name__} at {frames[-1].line}"  # an assertion without a message: what it asserts

    def nearest(self, size: int) -> list[int]:
        """The nearest sizes below and above that work: of the next two multiples, the present size and its half."""
        multiple, present = getattr(self.model, "size_multiple", 16), self.present or size
        first = size // multiple * multiple
        near = {first + multiple * k for k in (-2, -1, 0, 1, 2)} | {present, present // 2}
        below = sorted((c for c in near if 0 < c < size), reverse=True)
        above = sorted(c for c in near if c > size)
        found = [next((c for c in side if self.refusal(c) is None), None) for side in (below, above)]
        return [c for c in found if c is not None]


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _copy_on(model, device):
    """A deep copy on another device, without copying values first where the device is 'meta'."""
    _drop_caches(model)
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(t): _like(t, t.detach().to(device, copy=True)) for t in tensors}
    return copy.deepcopy(model, memo)


def _like(tensor, data):
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _refuse_wrapped(model):
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if parallel or hasattr(model, "_orig_mod"):
        kind = type(model).__name__
        raise ValueError(f"set_input_size got a {kind}: pass the model inside it, and wrap that again after")


@contextmanager
def _fork_rng():
    """Leave the global generator as it was: a run that resizes draws the same numbers as one that does not."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The change


def _resize(model: nn.Module, size: int) -> list[tuple]:
    """Change structure and values. Returns [(parameter, old shape, new shape, new size / old size)] of the changed."""
    old_size = _present_size(model)
    if size == old_size:
        return []
    before = dict(model.named_parameters(remove_duplicate=False))
    shapes = {}  # of the parameters that change theirs
    with _fork_rng():
        if hasattr(model, "set_input_size"):
            shapes = _restructure(model, size, before)
        elif getattr(model, "takes_size", False):
            with torch.device("meta") if _on_meta(model) else nullcontext(), Skeleton():
                fresh = model.rebuild(old_size), model.rebuild(size)
            shapes = _graft(model, *fresh)
    changed = {}
    for name, parameter in before.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name in shapes and parameter not in changed:
            if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
                raise ValueError(f"{name} mixes positions and cannot be resampled to {tuple(shapes[name])}")
            change = (tuple(parameter.shape), tuple(shapes[name]), size / old_size if old_size else None)
            _replace(parameter, resample(parameter.data, *change))
            changed[parameter] = change
    model.input_size = size
    _drop_caches(model)
    return [(parameter, *change) for parameter, change in changed.items()]


def _restructure(model: nn.Module, size: int, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Size]:
    """The model's own `set_input_size`, on stand-ins of its parameters: zeros on the CPU that take no memory.

    What timm resamples is not used, its way differs, and before timm 1.0.30 it fails on any other device.

    Returns:
        {name: shape} of the parameters whose shape it changes.
    """
    device = next(iter(parameters.values())).device
    # With the objects themselves, lest a new one gets the id of one that is gone.
    there = {id(value): value for part in model.modules() for table in _tables(part) for value in table.values()}
    try:
        if device.type != "meta":
            for name, parameter in parameters.items():
                values = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                _put(model, name, nn.Parameter(values, parameter.requires_grad))
        model.set_input_size(img_size=(size, size))
        after = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
    finally:
        for name, parameter in parameters.items():
            _put(model, name, parameter)
    for part in model.modules():  # what was made beside the stand-ins
        for table in _tables(part):
            for name, value in table.items():
                if isinstance(value, torch.Tensor) and id(value) not in there and value.device != device:
                    table[name] = _like(value, value.detach().to(device))
    return {name: after[name] for name, parameter in parameters.items() if after[name] != parameter.shape}


def _tables(module):
    return module._parameters, module._buffers, vars(module)


def _put(model, name, parameter):
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter


def _replace(parameter, data):
    """Give a parameter values of another shape. It stays the same object: optimizers and hooks know it by identity."""
    parameter.grad = None
    # A graph that is still referenced (the last step's loss) keeps a gradient accumulator alive that expects the old
    # shape. PyTorch drops it when the type changes, and only then.
    parameter.data = data.to(torch.float16 if data.dtype != torch.float16 else torch.float32)
    parameter.data = data


def _drop_caches(model):
    """Some models (LeViT) keep their biases while in eval mode, and drop them on train()."""
    modes = [(part, part.training) for part in model.modules()]
    model.train()
    for part, training in modes:
        part.training = training


def _on_meta(model):
    return any(parameter.is_meta for parameter in model.parameters())


def _present_size(model):
    """Pixels per side that the model is for now; None if it does not say."""
    size = getattr(model, "input_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    return _pair(size)[0]


def _graft(model: nn.Module, was: nn.Module, new: nn.Module) -> dict[str, torch.Size]:
    """Give `model` what differs between two fresh models, one of its present size and one of the new.

    Returns:
        {name: shape} of the parameters whose shape differs between the two.
    """
    parts, old_parts = dict(model.named_modules()), dict(was.named_modules())
    like = next(model.parameters())
    for path, part in new.named_modules():
        live, old = parts.get(path), old_parts.get(path)
        if type(old) is not type(part):
            raise ValueError(f"its layer {path} is another at this size")
        if type(live) is not type(part):
            continue  # a layer that was replaced since, such as another head
        for name, value in vars(part).items():
            if name in _TORCH_OWN:
                continue
            if isinstance(value, torch.Tensor):
                setattr(live, name, _follow(getattr(live, name), getattr(old, name), value, like))
            elif _is_plain(value) and value != vars(old).get(name):
                setattr(live, name, value)
        for name, value in part._buffers.items():
            live._buffers[name] = _follow(live._buffers[name], old._buffers[name], value, like)
    old_shapes = {name: parameter.shape for name, parameter in was.named_parameters()}
    new_shapes = {name: parameter.shape for name, parameter in new.named_parameters()}
    if old_shapes.keys() != new_shapes.keys():
        others = ", ".join(sorted(old_shapes.keys() ^ new_shapes.keys())[:3])
        raise ValueError(f"it has other parameters at this size: {others}")
    return {name: shape for name, shape in new_shapes.items() if shape != old_shapes[name]}


def _is_plain(value):
    """Numbers, strings, and tuples and lists of them: what sizes are kept in."""
    return isinstance(value, _PLAIN) and (not isinstance(value, (tuple, list)) or all(map(_is_plain, value)))


def _follow(live, old, new, like):
    """A buffer's value at the new size: the live one (running statistics, say) unless construction makes it another."""
    same = old is None if new is None else old is not None and old.shape == new.shape
    if same and (new is None or new.is_meta or torch.equal(old, new)):
        return live
    return None if new is None else new.to(like.device, new.dtype if live is None else live.dtype)
