"""The parameter names of other code bases: recognised by the names themselves, translated to timm's and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match], str]]


@dataclass(frozen=True)
class Layout:
    """How one code base names the tensors of one family of models.

    Attributes:
        name: as reports print it.
        marks: names that only this layout has, all of them.
        to_timm: substitutions that lead to timm's names, in order.
        drop: pattern of the names that timm's models have no place for.
        timm_marks, from_timm: the same for the way back, of the layouts that `to_official` writes.
    """

    name: str
    marks: frozenset[str]
    to_timm: tuple[Rule, ...] = ()
    drop: str = "(?!)"
    timm_marks: frozenset[str] = frozenset()
    from_timm: tuple[Rule, ...] = ()


def _shift(pattern: str, by: int) -> Rule:
    """A rule that adds `by` to the number in the middle of (prefix)(number)(rest)."""
    return pattern, lambda match: f"{match[1]}{int(match[2]) + by}{match[3]}"


def _stage(template: str, divisor: int = 2, offset: int = 0) -> Callable[[re.Match], str]:
    """torchvision numbers stages and downsamplings in one sequence: 0 stem, 1 stage, 2 downsampling, 3 stage, ..."""
    return lambda match: template.format((int(match[1]) + offset) // divisor, *match.groups()[1:])


# Buffers that a model makes itself, and the counter of torch's AveragedModel.
BOOKKEEPING = re.compile(r"(.*\.)?(relative_position_index|attn_mask|relative_coords_table|n_averaged)$")

CONVNEXT = Layout(
    "ConvNeXt (authors')",
    frozenset({"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"}),
    (
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
    ),
    timm_marks=frozenset({"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"}),
    from_timm=(
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc([12])\.", r".pwconv\1."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ),
)
CONVNEXT_ISOTROPIC = Layout(
    "isotropic ConvNeXt (authors')",
    frozenset({"stem.weight", "blocks.0.dwconv.weight"}),
    ((r"\.dwconv\.", ".conv_dw."), (r"\.pwconv([12])\.", r".mlp.fc\1.")),
    timm_marks=frozenset({"stem.weight", "blocks.0.conv_dw.weight"}),
    from_timm=((r"\.conv_dw\.", ".dwconv."), (r"\.mlp\.fc([12])\.", r".pwconv\1.")),
)
SWIN = Layout(
    "Swin (authors')",
    frozenset({"layers.0.downsample.reduction.weight", "patch_embed.proj.weight"}),
    (_shift(r"^(layers\.)(\d+)(\.downsample\.)", 1), (r"^head\.", "head.fc.")),
    timm_marks=frozenset(
        {"layers.1.downsample.reduction.weight", "layers.0.blocks.0.attn.relative_position_bias_table"}
    ),
    from_timm=(_shift(r"^(layers\.)(\d+)(\.downsample\.)", -1), (r"^head\.fc\.", "head.")),
)
METAFORMER = Layout(
    "MetaFormer (authors')",
    frozenset({"downsample_layers.0.conv.weight", "stages.0.0.norm1.weight"}),
    (
        (r"^downsample_layers\.0\.post_norm\.", "stem.norm."),
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.pre_norm\.", r"stages.\1.downsample.norm."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
    ),
    timm_marks=frozenset({"stem.conv.weight", "stages.0.blocks.0.norm1.weight"}),
    from_timm=(
        (r"^stem\.norm\.", "downsample_layers.0.post_norm."),
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.norm\.", r"downsample_layers.\1.pre_norm."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ),
)
TORCHVISION_CONVNEXT = Layout(
    "ConvNeXt (torchvision)",
    frozenset({"features.0.0.weight", "features.1.0.layer_scale"}),
    (
        (r"^features\.0\.", "stem."),
        (r"^features\.(\d+)\.(\d+)\.(block|layer_scale)", _stage("stages.{}.blocks.{}.{}")),
        (r"^features\.(\d+)\.", _stage("stages.{}.downsample.")),
        (r"\.block\.0\.", ".conv_dw."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".mlp.fc1."),
        (r"\.block\.5\.", ".mlp.fc2."),
        (r"\.layer_scale$", ".gamma"),
        (r"^classifier\.0\.", "head.norm."),
        (r"^classifier\.2\.", "head.fc."),
    ),
)
TORCHVISION_SWIN = Layout(
    "Swin (torchvision)",
    frozenset({"features.0.0.weight", "features.2.reduction.weight"}),
    (
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.(\d+)\.(\d+)\.", _stage("layers.{}.blocks.{}.")),
        (r"^features\.(\d+)\.", _stage("layers.{}.downsample.")),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ),
)
TORCHVISION_VIT = Layout(
    "ViT (torchvision)",
    frozenset({"class_token", "encoder.pos_embedding"}),
    (
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
    ),
)
MAE = Layout(
    "MAE pre-training (authors')",
    frozenset({"mask_token", "decoder_embed.weight", "patch_embed.proj.weight"}),
    drop=r"mask_token$|decoder_",
)
# These are named alike by their authors, by timm or this project, and by the EfficientTrain release.
SHARED = [
    Layout("CSWin", frozenset({"stage1_conv_embed.0.weight", "merge1.conv.weight"})),
    Layout("PVT", frozenset({"pos_embed1", "patch_embed1.proj.weight", "block1.0.attn.q.weight"})),
    Layout("ViT (DeiT, MAE, timm)", frozenset({"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"})),
    Layout("ResNet (torchvision, timm)", frozenset({"conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"})),
]
_OFFICIAL = [CONVNEXT, CONVNEXT_ISOTROPIC, SWIN, METAFORMER, *SHARED]
LAYOUTS = [TORCHVISION_CONVNEXT, TORCHVISION_SWIN, TORCHVISION_VIT, MAE, *_OFFICIAL]
TIMM = Layout("timm's", frozenset())


def is_timms(layout: Layout) -> bool:
    """Whether the names of this layout may be timm's own."""
    return layout is TIMM or layout.name.endswith("timm)")


def recognise(names: Mapping[str, Tensor]) -> Layout:
    """The layout that has these names; timm's if no other does."""
    return next((layout for layout in LAYOUTS if layout.marks <= names.keys()), TIMM)


def timm_name(layout: Layout, name: str) -> str | None:
    """timm's name of a tensor; None for what timm's models have no place for."""
    if BOOKKEEPING.match(name) or re.match(layout.drop, name):
        return None
    return _substitute(layout.to_timm, name)


def to_timm(state: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """Rename a state dict of any known layout to timm's names, in timm's shapes."""
    layout = recognise(state)
    renamed = {}
    for name, tensor in state.items():
        if (target := timm_name(layout, name)) is None:
            continue
        if layout is TORCHVISION_CONVNEXT and target.endswith("gamma"):
            tensor = tensor.flatten()
        block = re.match(r"stages\.\d+\.\d+\.", name)
        if layout is METAFORMER and block and f"{block[0]}token_mixer.dwconv.weight" in state and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # timm's convolutional blocks have 1 x 1 convolutions for linear layers
        renamed[target] = tensor
    return layout, renamed


def to_official(state: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """Rename a state dict in timm's names to those of the model's authors.

    Swin's gets the index and mask buffers that its authors' code keeps in the state dict, for an input of 32 windows.
    Linear layers that timm writes as 1 x 1 convolutions become matrices again.

    Returns:
        The layout and the state dict.

    Raises:
        ValueError: no layout of authors is known for this model.
    """
    layout = next((x for x in _OFFICIAL if (x.timm_marks or x.marks) <= state.keys()), None)
    if layout is None:
        raise ValueError("no official layout is known for this model: use --format timm")
    official = {}
    for name, tensor in state.items():
        if layout in (CONVNEXT, METAFORMER) and re.search(r"\.(fc[12]|pwconv[12])\.weight$", name):
            tensor = tensor.flatten(1)
        official[_substitute(layout.from_timm, name)] = tensor
        if layout is SWIN and name.endswith("relative_position_bias_table"):
            official.update(_swin_buffers(name, tensor))
    return layout, official


def _substitute(rules: tuple[Rule, ...], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _swin_buffers(table_name: str, table: Tensor) -> dict[str, Tensor]:
    """The index of a block's bias table and, in blocks that shift their windows, the mask of their attention."""
    stage, block = (int(x) for x in re.findall(r"\d+", table_name)[:2])
    window = (round(table.shape[0] ** 0.5) + 1) // 2
    rows, columns = (torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window))
    offsets = [x[:, None] - x[None, :] + window - 1 for x in (rows, columns)]
    prefix = f"layers.{stage}.blocks.{block}."
    buffers = {f"{prefix}attn.relative_position_index": offsets[0] * (2 * window - 1) + offsets[1]}
    per_side = 8 >> stage  # windows: a map of 8 windows' width, halved at each stage
    shift = window // 2
    if block % 2 and shift and per_side > 1:
        # Attention stays within the part of the unshifted image that a token of the shifted window came from.
        part = torch.zeros(per_side * window, dtype=torch.long)
        part[-window:-shift], part[-shift:] = 1, 2
        parts = (3 * part[:, None] + part[None, :]).view(per_side, window, per_side, window)
        parts = parts.transpose(1, 2).reshape(per_side**2, 1, window**2)
        buffers[f"{prefix}attn_mask"] = torch.where(parts == parts.transpose(1, 2), 0.0, -100.0)
    return buffers
