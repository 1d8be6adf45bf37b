"""Bodies of detectors and segmenters: any model that gives feature maps, on images of any height and width."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from curriculum.skeleton import Skeleton
from models import ALIASES, create_model, load_weights
from models.layer_decay import layer_ids
from models.weights import Report

STRIDES = (4, 8, 16, 32)


class Body(nn.Module):
    """The feature maps of a model: images (N, 3, H, W), normalised, of any size -> one (N, C, h, w) per level.

    Made by :func:`make_body`. A pyramid gives the maps after its stages, each with a LayerNorm of its own, as the
    detection papers' Swin and ConvNeXt; models with BatchNorm have none there, and their statistics never train, as
    in mmdetection. A plain ViT gives the tokens after four evenly spaced blocks, all at the stride of its patches;
    with ``pyramid``, the last of them at four strides (Li et al. 2022, "ViTDet").

    Attributes:
        model: the model without its classifier and final norm, under its own names.
        channels, strides: of each level.
    """

    def __init__(self, model: nn.Module, strides: Sequence[int], pyramid: bool) -> None:
        super().__init__()
        info, plain = _feature_info(model), isinstance(model, VisionTransformer)
        if plain:
            patch = model.patch_embed.patch_size[0]
            if pyramid and any(patch % stride and stride % patch for stride in strides):
                raise ValueError(f"patches of {patch} pixels make no pyramid of strides {', '.join(map(str, strides))}")
            self.indices = [len(model.blocks) * (i + 1) // 4 - 1 for i in range(4)]
            self.strides = tuple(strides) if pyramid else (patch,) * 4
            self.channels = (model.embed_dim,) * len(self.strides)
            self.multiple = 1 if model.patch_embed.dynamic_img_pad else patch
        else:
            found = {stage["reduction"]: (place, stage["num_chs"]) for place, stage in enumerate(info)}
            if missing := [stride for stride in strides if stride not in found]:
                have = ", ".join(map(str, found)) or "none"
                raise ValueError(f"its feature maps have strides {have}, but {missing[0]} is needed too")
            self.indices, self.channels = zip(*(found[stride] for stride in strides))
            self.indices, self.strides = list(self.indices), tuple(strides)
            needed = math.lcm(getattr(model, "size_multiple", 1), max(found))
            self.multiple = 4 if isinstance(model, SwinTransformer) else needed
        model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        if isinstance(getattr(getattr(model, "head", None), "norm", None), nn.Module):
            model.head.norm = nn.Identity()  # which timm leaves in before 1.0.31
        self.model = model
        batch_norm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
        eps = next((part.eps for part in model.modules() if isinstance(part, nn.LayerNorm)), 1e-6)
        norm = nn.Identity if plain or batch_norm else partial(LayerNorm2d, eps=eps)
        # By stage, as the papers' code: a detector that takes three of four maps has norms 1 to 3.
        self.norms = nn.ModuleDict({str(STRIDES.index(s)): norm(c) for s, c in zip(strides, self.channels)})
        self.scales = nn.ModuleList(_scale(model.embed_dim, patch, s) for s in strides) if plain and pyramid else None

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        maps = self.model.forward_intermediates(images, self.indices, intermediates_only=True)
        if self.scales is not None:
            return [scale(maps[-1]) for scale in self.scales]
        return [norm(x) for norm, x in zip(self.norms.values(), maps)]

    def train(self, mode: bool = True) -> Body:
        super().train(mode)
        for part in self.model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def load(self, source: str | Path, key: str | None = None) -> Report:
        """Load the weights of a classifier, of any format and input size that ``models.load_weights`` reads.

        Its head and final norm are not used. The levels' norms keep their initial values: no classifier has them.
        """
        whole = self.rebuild()
        report = load_weights(whole, source, key=key)
        own, state = self.model.state_dict(), whole.state_dict()
        report.dropped += [name for name in report.loaded if name not in own]
        report.loaded = [name for name in report.loaded if name in own]
        report.random = [name for name in report.random if name in own]
        self.model.load_state_dict({name: state[name] for name in own})
        return report

    def no_weight_decay(self) -> set[str]:
        """Position embeddings, class tokens and bias tables."""
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in names}

    def layer_ids(self) -> dict[str, int]:
        """The layer of every parameter of the model, 0 at the image, without gaps, and that of what comes after it."""
        ids = layer_ids(self.model)
        order = {layer: place for place, layer in enumerate(sorted(set(ids.values())))}
        ids = {f"model.{name}": order[layer] for name, layer in ids.items()}
        return {**ids, "": len(order)}


class OnBody(nn.Module):
    """A body with something on it: what the optimizer's parameter groups ask of a model, and who loads weights."""

    sync_batch_norm = True  # over the devices that share a batch
    class_names: str  # pattern of the layers that predict classes

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def no_weight_decay(self) -> set[str]:
        return {f"body.{name}" for name in self.body.no_weight_decay()}

    def layer_id(self, name: str) -> int:
        """The layer of a parameter, 0 at the image; what is not the body's model is the last."""
        return self._layer_ids.get(name.removeprefix("body."), max(self._layer_ids.values()))

    def class_layers(self) -> set[str]:
        """The layers whose outputs are as many as there are classes, or a multiple of it."""
        return {name for name, _ in self.named_modules() if re.fullmatch(self.class_names, name)}

    @cached_property
    def _layer_ids(self) -> dict[str, int]:
        return self.body.layer_ids()


def make_body(
    name: str,
    drop_path: float = 0.0,
    strides: Sequence[int] = STRIDES,
    input_size: int | None = None,
    pyramid: bool = False,
    **options: Any,
) -> Body:
    """Build a body with random weights.

    Swin keeps its windows (7 of 224 pixels) at every size and is made equal to the one of the detection papers: it
    partitions and shifts in every stage, and pads the map before it shifts it.

    Args:
        name: as `models.create_model` takes it. One's own model has ``feature_info`` (num_chs and reduction of each
            map), ``forward_intermediates`` and ``prune_intermediate_layers``, as timm's have.
        drop_path: stochastic depth rate of the last block, in [0, 1).
        strides: of the maps that are wanted.
        input_size: pixels a side that position embeddings are built for; by default, what the model is made for. They
            are resampled to each image.
        pyramid: of a plain ViT: make maps at these strides.
        options: the model's own settings.

    Raises:
        ValueError: no such model, or it has no maps at these strides.
    """
    config = timm.get_pretrained_cfg(ALIASES.get(name, name))
    size = input_size or (config.input_size[-1] if config else 224)
    with torch.device("meta"), Skeleton():
        kind = type(create_model(name, 1, size, **options))
    more: dict[str, Any] = {"dynamic_img_size": True, "dynamic_img_pad": True} if kind is VisionTransformer else {}
    rebuild = partial(create_model, name, 1, size, **options, **more)
    model = create_model(name, 1, size, drop_path, **options, **more)
    if isinstance(model, SwinTransformer):
        _as_in_detection(model)
    try:
        body = Body(model, strides, pyramid)
    except ValueError as error:
        raise ValueError(f"--model {name}: {error}") from None
    body.rebuild = rebuild
    return body


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    needed = ("feature_info", "forward_intermediates", "prune_intermediate_layers")
    if lacking := [name for name in needed if not hasattr(model, name)]:
        raise ValueError(f"{type(model).__name__} gives no feature maps: it lacks {', '.join(lacking)} (see timm's)")
    return list(model.feature_info)


def _as_in_detection(model: SwinTransformer) -> None:
    model.set_input_size(img_size=model.patch_embed.img_size, always_partition=True)
    model.patch_embed.strict_img_size = False
    for block in model.modules():
        if isinstance(block, SwinTransformerBlock):
            block.__class__ = ShiftedBlock
            block.attn_mask = None


class ShiftedBlock(SwinTransformerBlock):
    """Swin's block on a map of any size, as its authors' detection code has it: pad to whole windows, then shift.

    timm's shifts and then pads, so that windows hold other tokens wherever the map is not made of whole windows.
    """

    def _attn(self, x: Tensor) -> Tensor:
        (height, width), (rows, columns), (down, right) = x.shape[1:3], self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        H, W = x.shape[1:3]
        if down:
            x = x.roll((-down, -right), (1, 2))
        x = x.unflatten(2, (W // columns, columns)).unflatten(1, (H // rows, rows))
        x = x.transpose(2, 3)
        grid = x.shape[:3]
        x = self.attn(x.flatten(3, 4).flatten(0, 2), self._mask(H, W, x) if down else None)
        x = x.unflatten(0, grid).unflatten(3, (rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if down:
            x = x.roll((down, right), (1, 2))
        return x[:, :height, :width]

    def _mask(self, height: int, width: int, x: Tensor) -> Tensor:
        """(windows, area, area): -100 between tokens that only the shift brought side by side."""
        parts = []
        for side, window, shift in zip((height, width), self.window_size, self.shift_size):
            place = torch.arange(side, device=x.device)
            parts.append((place >= side - window).long() + (place >= side - shift).long())
        rows, columns = self.window_size
        part = 3 * parts[0][:, None] + parts[1]
        part = part.view(height // rows, rows, width // columns, columns).transpose(1, 2).reshape(-1, self.window_area)
        return (part[:, :, None] != part[:, None]).to(x.dtype) * -100.0


def _scale(width: int, patch: int, stride: int) -> nn.Module:
    """A map of a ViT's tokens at another stride, as ViTDet makes it: deconvolutions up, pooling down."""
    layers: list[nn.Module] = []
    while patch > stride:
        layers += [nn.ConvTranspose2d(width, width, 2, 2), LayerNorm2d(width), nn.GELU()]
        patch //= 2
    if stride > patch:
        layers.append(nn.MaxPool2d(stride // patch))
    return nn.Sequential(*layers, LayerNorm2d(width))
