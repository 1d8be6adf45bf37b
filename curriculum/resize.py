"""Change the input size of a live model: the same object trains on, with its optimizer's moments and its EMA."""

import copy
import math
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn

from curriculum.skeleton import Skeleton

_TORCH_OWN = frozenset(vars(nn.Module()))  # attributes of every module: parameters, buffers, hooks, training, ...
_TRIES = 8  # sizes that are looked at on either side of one that does not work
_PLAIN = (int, float, str, bool, tuple, list, type(None))


def set_input_size(model, size, optimizer=None, ema=None):
    """Make `model` ready for square images of `size` pixels, in place; parameters keep their identity.

    Three ways, tried in order: nothing to do for a model that does not depend on the size; the model's own (timm's)
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
    """
    _refuse_wrapped(model)
    if size == _present_size(model):
        return False
    check_input_sizes(model, [size])
    changed = _resize(model, size)
    for parameter, old_shape, new_shape, scale in changed if optimizer is not None else ():
        _resize_state(optimizer.state, parameter, old_shape, new_shape, scale)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    if ema is not None:
        averaged = getattr(ema, "module", ema)
        _refuse_wrapped(averaged)
        _resize(averaged, size)
    return bool(changed)


def check_input_sizes(model, sizes):
    """See that a model takes every one of `sizes`: a copy without values makes a forward pass; nothing changes.

    Raises:
        ValueError: naming the size, the reason, the multiple that sizes should be of, and the nearest sizes that work.
    """
    _refuse_wrapped(model)
    for size in sizes:
        reason = _refusal(model, size)
        if reason is None:
            continue
        near = " and ".join(str(near) for near in nearest_sizes(model, size))
        multiple = getattr(model, "size_multiple", 16)
        hint = f"the nearest that work: {near}" if near else "nor any size near it"
        name = type(model).__name__
        raise ValueError(f"input size {size}: {name} (size multiple {multiple}) cannot take it ({reason}); {hint}")


def nearest_sizes(model, size):
    """The nearest input sizes below and above `size` that the model takes; those that could be found, so 0 to 2."""
    multiple, present = getattr(model, "size_multiple", 16), _present_size(model) or size
    candidates = {multiple * k for k in range(1, 2 * size // multiple + _TRIES)}
    candidates |= {present * k // 8 for k in range(2, 17)}
    found = []
    for direction in (-1, 1):
        near = sorted((c for c in candidates if (c - size) * direction > 0), key=lambda c: abs(c - size))[:_TRIES]
        found += [next((c for c in near if _refusal(model, c) is None), None)]
    return [c for c in found if c is not None]


# The check


def _refusal(model, size):
    """Why the model cannot take the size, or None."""
    if not isinstance(size, int) or size < 1:
        return "sizes are positive whole numbers of pixels"
    patch = getattr(model, "patch_embed", None)
    if isinstance(patch, PatchEmbed) and not patch.dynamic_img_pad and size % patch.patch_size[0]:
        side = patch.patch_size[0]
        return f"its patches of {side} pixels would leave {size % side} out"
    if hasattr(model, "set_input_size") and any(hasattr(part, "window_size") for part in model.modules()):
        multiple = getattr(model, "size_multiple", 1)
        if size % multiple:
            return "its windows would need padding"
    reason = _attempt(model, size, "meta")
    if reason is not None:
        present = _present_size(model)
        # A few models compute with values in forward, which meta tensors lack at any size: only a real pass tells.
        if present in (None, size) or _attempt(model, present, "meta") is not None:
            reason = _attempt(model, size, "cpu")
    return reason


def _attempt(model, size, device):
    """Resize a copy on the device and run it. Why that failed, or None."""
    try:
        if device == "cpu" and _on_meta(model):
            clone = model.rebuild(_present_size(model)).eval()
        else:
            clone = _copy_on(model, device).eval()
        _resize(clone, size)
        dtype = next((p.dtype for p in clone.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad(), _fork_rng():
            clone(torch.zeros(2, getattr(model, "in_chans", 3), size, size, dtype=dtype, device=device))
    except Exception as error:
        if str(error).strip():
            return str(error).strip().splitlines()[0]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in Path(f.filename).parts]
        return f"{type(error).__name__} at {frames[-1].line}"  # an assertion without a message: what it asserts


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


def _resize(model, size):
    """Change structure and values. Returns [(parameter, old shape, new shape, new size / old size)] of the changed."""
    old_size = _present_size(model)
    if size == old_size:
        return []
    before = dict(model.named_parameters(remove_duplicate=False))
    with _fork_rng():
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(size, size))
            after = dict(model.named_parameters(remove_duplicate=False))
        elif getattr(model, "takes_size", False):
            with torch.device("meta") if _on_meta(model) else nullcontext(), Skeleton():
                fresh = model.rebuild(old_size), model.rebuild(size)
            after = _graft(model, *fresh)
        else:
            after = before
    if after.keys() != before.keys():
        raise ValueError(f"its parameters are others at {size}: {', '.join(sorted(after.keys() ^ before.keys())[:3])}")
    changed = {}
    for name, parameter in before.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        shape = tuple(after[name].shape)
        if tuple(parameter.shape) != shape and parameter not in changed:
            if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
                raise ValueError(f"{name} mixes positions and cannot be resampled to {shape}")
            change = (tuple(parameter.shape), shape, size / old_size if old_size else None)
            _replace(parameter, resample(parameter.data, *change))
            changed[parameter] = change
        owner._parameters[leaf] = parameter
    model.input_size = size
    _drop_caches(model)
    return [(parameter, *change) for parameter, change in changed.items()]


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


def _graft(model, was, new):
    """Give `model` what differs between two fresh models, of its present size and the new. Returns new's parameters."""
    parts, old_parts = dict(model.named_modules()), dict(was.named_modules())
    for path, part in new.named_modules():
        live, old = parts.get(path), old_parts.get(path)
        if type(live) is not type(part) or type(old) is not type(part):
            raise ValueError(f"its layer {path} is another at this size")
        for name, value in vars(part).items():
            if name in _TORCH_OWN:
                continue
            if isinstance(value, torch.Tensor):
                setattr(live, name, _follow(getattr(live, name), getattr(old, name), value))
            elif isinstance(value, _PLAIN) and value != vars(old).get(name):
                setattr(live, name, value)
        for name, value in part._buffers.items():
            live._buffers[name] = _follow(live._buffers[name], old._buffers[name], value)
    return dict(new.named_parameters(remove_duplicate=False))


def _follow(live, old, new):
    """A buffer's value at the new size: the live one (running statistics, say) unless construction makes it another."""
    if new is None or (old.shape == new.shape and (new.is_meta or torch.equal(old, new))):
        return live
    return new.to(device=live.device, dtype=live.dtype)


# Values


def resample(tensor, old_shape, new_shape, scale=None):
    """Resample a tensor of position embeddings or biases from one grid to another.

    Layouts, told apart by which axes differ: (1, P + g^2, D) with P class or register tokens in front, which are kept;
    (r^2 + E, heads), a bias table whose last E rows (BEiT's class tokens) are kept; (..., g^2, ...); (..., g, g, ...);
    (2 g - 1, D), one axis of a decomposed bias table. A length that can be read in several ways is read as the one that
    follows `scale`.

    Args:
        tensor: of shape `old_shape`.
        new_shape: as many axes, other lengths on one axis or on two neighbouring ones.
        scale: new input size / old input size.

    Returns:
        Tensor of `new_shape` and the same dtype: bilinear (linear on one axis), align_corners=False, not antialiased.
    """
    axes = [axis for axis, (old, new) in enumerate(zip(old_shape, new_shape, strict=True)) if old != new]
    if len(axes) == 2 and axes[1] == axes[0] + 1:
        old_grid, new_grid, kept = [old_shape[a] for a in axes], [new_shape[a] for a in axes], 0
    elif len(axes) == 1:
        old_grid, new_grid, kept = _grids(old_shape[axes[0]], new_shape[axes[0]], scale)
    else:
        raise ValueError(f"no rule resamples {tuple(old_shape)} to {tuple(new_shape)}")
    axis = axes[0]
    lead = tensor.shape[:axis]
    flat = tensor.reshape(*lead, -1, *tensor.shape[axes[-1] + 1 :])
    length = flat.shape[axis]
    in_front = len(old_shape) >= 3  # class tokens come first in an embedding, last in a table
    head = flat.narrow(axis, 0, kept if in_front else 0)
    tail = flat.narrow(axis, length - kept if not in_front else length, 0 if in_front else kept)
    body = flat.narrow(axis, kept if in_front else 0, length - kept).movedim(axis, -1)
    planes = body.reshape(1, -1, *old_grid).float()
    mode = "bilinear" if len(new_grid) == 2 else "linear"
    planes = F.interpolate(planes, size=tuple(new_grid), mode=mode, align_corners=False)
    body = planes.reshape(*body.shape[:-1], -1).movedim(-1, axis).to(tensor.dtype)
    return torch.cat([head, body, tail], dim=axis).reshape(new_shape).contiguous()


def _grids(old, new, scale):
    """Read two lengths of one axis as grids: (old grid, new grid, entries that are no positions)."""
    readings = [([old], [new], 0)]
    for kept in range(9):
        sides = math.isqrt(max(old - kept, 0)), math.isqrt(max(new - kept, 0))
        if min(sides) > 0 and sides[0] ** 2 + kept == old and sides[1] ** 2 + kept == new:
            readings.append(([sides[0]] * 2, [sides[1]] * 2, kept))
    if scale is None:
        return readings[min(1, len(readings) - 1)]

    def misfit(reading):
        (a, *_), (b, *_), _ = reading  # a grid of g grows with the image, a bias table of 2 g - 1 is one short of it
        return min(abs(math.log(b / a / scale)), abs(math.log((b + 1) / (a + 1) / scale)))

    return min(readings, key=misfit)


def _resize_state(state, parameter, old_shape, new_shape, scale):
    """Let an optimizer's state of one parameter follow it."""
    entries = state.get(parameter, {})
    tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    if any(tuple(value.shape) != old_shape for value in tensors.values()):
        state.pop(parameter)  # factored moments and the like: the optimizer starts them anew
        return
    for key, value in tensors.items():
        entries[key] = resample(value, old_shape, new_shape, scale)
