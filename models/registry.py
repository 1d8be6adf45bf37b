"""Models by name: the papers' names, any timm name, or one's own 'package.module:function'."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models.metaformer import MetaFormer
from torch import nn

from curriculum.skeleton import Skeleton

from .metaformer import use_authors_head

# The papers' and their authors' names that are not timm's own. CSWin, PVT, isotropic ConvNeXt, IdentityFormer and
# RandFormer register under theirs in this package.
ALIASES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
    "CSWin_64_12211_tiny_224": "cswin_tiny",
    "CSWin_64_24322_small_224": "cswin_small",
    "CSWin_96_24322_base_224": "cswin_base",
    "CSWin_96_24322_base_384": "cswin_base_384",
    "CSWin_144_24322_large_224": "cswin_large",
    "CSWin_144_24322_large_384": "cswin_large_384",
    **{
        f"{k}_{s}_384": f"{k}_{s}.sail_in1k_384"
        for k in ("caformer", "convformer")
        for s in ("s18", "s36", "m36", "b36")
    },
    **{
        f"{kind}_b36{theirs}": f"{kind}_b36.sail_{tag}"
        for kind in ("caformer", "convformer")
        for theirs, tag in (("_in21k", "in22k"), ("_in21ft1k", "in22k_ft_in1k"), ("_384_in21ft1k", "in22k_ft_in1k_384"))
    },
}
# The papers trained torchvision's ResNet, whose last BatchNorm of each block starts at 1; timm's starts at 0. Left as
# in timm: DeiT's class token starts at a spread of 1e-6, the papers' code had 0.02. All else starts alike.
PAPER_SETTINGS = {"resnet18": {"zero_init_last": False}, "resnet50": {"zero_init_last": False}}


def create_model(
    name: str, num_classes: int = 1000, input_size: int = 224, drop_path: float = 0.0, **kwargs: Any
) -> nn.Module:
    """Build a classifier for square images, with random weights.

    Args:
        name: a paper's name (``ALIASES``, resnet50, convnext_tiny, caformer_s18, ...), any timm name,
            `hf_hub:owner/name`, or ``package.module:function``, looked up from the working directory too. Such
            a function takes ``num_classes``, and ``img_size`` and ``drop_path_rate`` if it can.
        num_classes: outputs of the head.
        input_size: pixels per side.
        drop_path: stochastic depth rate of the last block, in [0, 1).
        kwargs: the model's own settings (ls_init_value, drop_rate, ...).

    Returns:
        nn.Module with four attributes more: ``input_size``, the present size; ``takes_size``, whether it is built for
        one size; ``size_multiple``, what input sizes should be a multiple of; and ``rebuild``, which takes an input
        size and returns a fresh model of the same construction.

    Raises:
        ValueError: for an unknown name, a setting the model does not have, and an input size it cannot be built for.
    """
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path {drop_path}: it must be at least 0 and below 1")
    factory = _factory(name)
    options = {**PAPER_SETTINGS.get(name, {}), **kwargs, "num_classes": num_classes, "drop_path_rate": drop_path}
    rebuild = partial(_build, name, factory, options)
    model = rebuild(input_size)
    is_timm = hasattr(model, "pretrained_cfg")
    if drop_path > 0 and is_timm and not any(getattr(module, "drop_prob", 0) for module in model.modules()):
        raise ValueError(f"--drop_path {drop_path}: {name} has none; use --drop_path 0")
    if not hasattr(model, "num_classes"):
        model.num_classes = num_classes
    model.rebuild = rebuild
    model.size_multiple = _size_multiple(model)
    return model


def check_name_from_file(name: Any, arguments: Any, source: str) -> None:
    """See that a model that a file asks for can do nothing but compute: a file may come from anyone.

    Raises:
        ValueError: a function or a hub's model, which only the command line may name; arguments that fetch files, or
            are no plain values of ordinary size.
    """
    if not isinstance(name, str) or ":" in name or "/" in name:
        said = " ".join(str(name).split())[:100]
        raise ValueError(
            f"{source} asks for the model {said!r}, which is code from outside this project and may do anything; if "
            f"you trust it, name it yourself: --model {said}"
        )
    for key, value in (arguments or {}).items():
        if key in _FETCHING or not _is_modest(value):
            said = " ".join(f"{key} {value}".split())[:100]
            raise ValueError(f"{source} gives the model an argument that no file may set: {said}")


def build_from_file(
    name: str,
    classes: int,
    input_size: int,
    arguments: dict[str, Any] | None,
    state: dict[str, torch.Tensor],
    source: str,
) -> nn.Module:
    """The model whose weights ``state`` a file holds, built with bounded work: from a file that may come from anyone.

    Raises:
        ValueError: it cannot be built, or is far larger than the weights; names the file.
    """
    if not 1 <= input_size <= MAX_SIZE:
        raise ValueError(
            f"{source} asks for input size {input_size}; if that is meant, name it: --input_size, --eval_size"
        )
    return build_bounded(lambda: create_model(name, classes, input_size, **(arguments or {})), name, state, source)


def build_bounded(build: Callable[[], nn.Module], name: str, state: dict[str, torch.Tensor], source: str) -> nn.Module:
    """``build()``, but for a model that is far larger than ``state``, which the file ``source`` holds of it.

    Raises:
        ValueError: that, or that it cannot be built; names the file.
    """
    try:
        with torch.device("meta"), Skeleton():
            probe = build()
        needed = sum(tensor.numel() for tensor in probe.state_dict().values())
        held = sum(tensor.numel() for tensor in state.values())
        if needed > 2 * held + 1_000_000:
            raise ValueError(f"it would have {needed:,} numbers, and the file holds {held:,}")
        return build()
    except Exception as error:  # arguments of another type or size fail wherever a constructor meets them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{source}: its model {name} cannot be built: {reason}") from None


MAX_SIZE = 2048  # pixels a side that a file may ask for
# timm.create_model's own arguments: they load files, from anywhere, or say where.
_FETCHING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only")


def _is_modest(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < 4 and len(value) <= 64 and all(_is_modest(item, depth + 1) for item in value)
    if isinstance(value, int | float):
        return abs(value) <= 1 << 15
    return value is None or (isinstance(value, str) and len(value) <= 100)


def _factory(name: str) -> Callable[..., nn.Module]:
    """The function that builds `name`."""
    hub = re.match(r"(hf[-_]hub:|timm/)", name)
    if ":" in name and not hub:
        return _own_function(name)
    timm_name = ALIASES.get(name, name)
    if not (timm.is_model(timm_name.removeprefix("timm/")) or (hub and ":" in name)):
        known = sorted({*ALIASES, *timm.list_models()})
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise ValueError(f"--model {name}: no such model{hint}. Your own is written package.module:function")
    return partial(timm.create_model, timm_name.removeprefix("timm/"))


def _own_function(name: str) -> Callable[..., nn.Module]:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--model {name}: cannot import {module_name} from {os.getcwd()} ({error})") from error
    finally:
        sys.path.remove(os.getcwd())
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--model {name}: {module_name} has no function {function_name!r}")
    return function


def _build(name: str, factory: Callable[..., nn.Module], options: dict[str, Any], input_size: int) -> nn.Module:
    """A fresh model for `input_size`; what `model.rebuild` is made of."""
    options = {**options, "img_size": input_size}
    try:
        with torch.device("meta"), Skeleton():
            model, options = _call(name, factory, options)
    except Exception:  # it needs values to be built, or cannot be built at all: then the real call below says so
        model = None
    windowed = model is not None and any(hasattr(part, "window_size") for part in model.modules())
    # Constructors keep the window of the native size, and pad; the model's method keeps its share of the image: 7 of
    # 224, 3 of 96.
    scale_windows = windowed and "img_size" in options and hasattr(model, "set_input_size")
    if scale_windows:
        del options["img_size"]
    if model is None or scale_windows or torch.get_default_device().type != "meta":
        model, options = _call(name, factory, options)
    if scale_windows:
        _scale_windows(model, input_size)
    use_authors_head(model)
    model.input_size = input_size
    # Before 1.0.31 timm's MetaFormer takes any setting, and ignores those that it does not know.
    model.takes_size = scale_windows or ("img_size" in options and not isinstance(model, MetaFormer))
    return model


def _scale_windows(model: nn.Module, input_size: int) -> None:
    """Set a fresh model's size by its own method, and draw anew what that resampled: resampling narrows the spread."""
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm's interpolation
        model.set_input_size(img_size=(input_size, input_size))
    for name, parameter in model.named_parameters():
        values = before[name]
        if parameter.shape != values.shape and not parameter.is_meta and values.std() > 0:
            nn.init.trunc_normal_(parameter, std=values.std().item())


def _call(name: str, factory: Callable[..., nn.Module], options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Call `factory` without what it does not take of img_size and drop_path_rate. Returns (model, settings taken)."""
    options = dict(options)
    while True:
        try:
            return factory(**options), options
        except TypeError as error:
            refused = [key for key in options if re.search(rf"keyword argument.*\b{key}\b", str(error))]
            if not refused:
                raise
            for key in refused:
                value = options.pop(key)
                if key == "drop_path_rate" and value > 0:
                    raise ValueError(f"--drop_path {value}: {name} has none; use --drop_path 0") from error
                if key not in ("drop_path_rate", "img_size"):
                    raise ValueError(f"{name} does not let one set {key} ({error})") from error
        except (AssertionError, ArithmeticError, IndexError, RuntimeError) as error:
            size = options.get("img_size")
            raise ValueError(f"input size {size}: {name} cannot be built for it ({error})") from error


def _size_multiple(model: nn.Module) -> int:
    """What input sizes should be a multiple of: the total stride where the model is built for one size, else 16."""
    declared = getattr(model, "size_multiple", None)
    if declared is not None:
        return declared
    if not (model.takes_size or hasattr(model, "set_input_size")):
        return 16
    stages = getattr(model, "feature_info", None)
    if stages and isinstance(stages[-1], dict) and "reduction" in stages[-1]:
        stride = stages[-1]["reduction"]
        native = getattr(model, "pretrained_cfg", {}).get("input_size", (3, stride, stride))[-1]
        common = math.gcd(stride, native)  # some round up, LeViT's last map is 4 x 4 of 224 / 64
        return common if common >= 8 else 16
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 16)
    return patch[0] if isinstance(patch, tuple) else patch
