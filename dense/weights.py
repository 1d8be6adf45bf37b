"""Weights of detectors and segmenters: ours, and those in the layouts of mmdetection and of the bodies' authors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from models.formats import BOOKKEEPING, Layout, to_official, to_timm
from models.normalisation import normalisation
from models.reading import class_names, read_weights
from models.weights import Report, choose_weights, fit

from .backbones import OnBody

# (their prefix, our prefix) of names, # being a number; the first that fits counts. These are the modules' names in
# mmdetection 2 and 3, mmsegmentation, and the detection code of Swin and ConvNeXt, which is built on mmdetection.
Table = Sequence[tuple[str, str]]
DETECTORS: Table = (
    ("neck.lateral_convs.#.conv.", "fpn.inner_blocks.#.0."),
    ("neck.fpn_convs.#.conv.", "fpn.layer_blocks.#.0."),
    ("rpn_head.rpn_conv.", "rpn.head.conv.0.0."),
    ("rpn_head.rpn_cls.", "rpn.head.cls_logits."),
    ("rpn_head.rpn_reg.", "rpn.head.bbox_pred."),
)
CASCADE: Table = (
    *DETECTORS,
    ("roi_head.bbox_head.#.shared_convs.#.conv.", "roi_heads.box_heads.#.#.0."),
    ("roi_head.bbox_head.#.shared_convs.#.bn.", "roi_heads.box_heads.#.#.1."),
    ("roi_head.bbox_head.#.shared_fcs.0.", "roi_heads.box_heads.#.5."),
    ("roi_head.bbox_head.#.fc_cls.", "roi_heads.predictors.#.cls_score."),
    ("roi_head.bbox_head.#.fc_reg.", "roi_heads.predictors.#.bbox_pred."),
    ("roi_head.mask_head.#.convs.#.conv.", "roi_heads.mask_heads.#.#.0."),
    ("roi_head.mask_head.#.upsample.", "roi_heads.mask_predictors.#.conv5_mask."),
    ("roi_head.mask_head.#.conv_logits.", "roi_heads.mask_predictors.#.mask_fcn_logits."),
)
MASK_RCNN: Table = (
    *DETECTORS,
    ("roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_heads.0.fc6."),
    ("roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_heads.0.fc7."),
    ("roi_head.bbox_head.fc_cls.", "roi_heads.predictors.0.cls_score."),
    ("roi_head.bbox_head.fc_reg.", "roi_heads.predictors.0.bbox_pred."),
    ("roi_head.mask_head.convs.#.conv.", "roi_heads.mask_heads.0.#.0."),
    ("roi_head.mask_head.upsample.", "roi_heads.mask_predictors.0.conv5_mask."),
    ("roi_head.mask_head.conv_logits.", "roi_heads.mask_predictors.0.mask_fcn_logits."),
)
RETINANET: Table = (
    ("neck.fpn_convs.3.conv.", "fpn.extra_blocks.p6."),
    ("neck.fpn_convs.4.conv.", "fpn.extra_blocks.p7."),
    *DETECTORS[:2],
    ("bbox_head.cls_convs.#.conv.", "head.classification_head.conv.#.0."),
    ("bbox_head.reg_convs.#.conv.", "head.regression_head.conv.#.0."),
    ("bbox_head.retina_cls.", "head.classification_head.cls_logits."),
    ("bbox_head.retina_reg.", "head.regression_head.bbox_reg."),
)
UPERNET: Table = (
    ("decode_head.psp_modules.#.1.conv.", "head.pools.#.1.0."),
    ("decode_head.psp_modules.#.1.bn.", "head.pools.#.1.1."),
    ("decode_head.bottleneck.conv.", "head.bottleneck.0."),
    ("decode_head.bottleneck.bn.", "head.bottleneck.1."),
    ("decode_head.lateral_convs.#.conv.", "head.laterals.#.0."),
    ("decode_head.lateral_convs.#.bn.", "head.laterals.#.1."),
    ("decode_head.fpn_convs.#.conv.", "head.smooth.#.0."),
    ("decode_head.fpn_convs.#.bn.", "head.smooth.#.1."),
    ("decode_head.fpn_bottleneck.conv.", "head.fuse.0."),
    ("decode_head.fpn_bottleneck.bn.", "head.fuse.1."),
    ("decode_head.conv_seg.", "classifier.1."),
    ("auxiliary_head.convs.0.conv.", "auxiliary_head.0."),
    ("auxiliary_head.convs.0.bn.", "auxiliary_head.1."),
    ("auxiliary_head.conv_seg.", "auxiliary_classifier.1."),
)
_MARKS = {
    "roi_head.bbox_head.0.fc_cls.weight": CASCADE,
    "roi_head.bbox_head.fc_cls.weight": MASK_RCNN,
    "bbox_head.retina_cls.weight": RETINANET,
    "decode_head.conv_seg.weight": UPERNET,
}
# mmdetection's and mmsegmentation's own bodies; their prefix is "backbone.", ours "body.model.".
SWIN: Table = (
    ("patch_embed.projection.", "patch_embed.proj."),
    ("stages.#.blocks.#.attn.w_msa.", "layers.#.blocks.#.attn."),
    ("stages.#.blocks.#.ffn.layers.0.0.", "layers.#.blocks.#.mlp.fc1."),
    ("stages.#.blocks.#.ffn.layers.1.", "layers.#.blocks.#.mlp.fc2."),
    ("stages.#.blocks.#.", "layers.#.blocks.#."),
    ("stages.0.downsample.", "layers.1.downsample."),  # mmdetection has it at a stage's end, timm at its beginning
    ("stages.1.downsample.", "layers.2.downsample."),
    ("stages.2.downsample.", "layers.3.downsample."),
)
VIT: Table = (
    ("patch_embed.projection.", "patch_embed.proj."),
    ("layers.#.ln1.", "blocks.#.norm1."),
    ("layers.#.ln2.", "blocks.#.norm2."),
    ("layers.#.attn.attn.in_proj_", "blocks.#.attn.qkv."),
    ("layers.#.attn.attn.out_proj.", "blocks.#.attn.proj."),
    ("layers.#.ffn.layers.0.0.", "blocks.#.mlp.fc1."),
    ("layers.#.ffn.layers.1.", "blocks.#.mlp.fc2."),
)
CONVNEXT: Table = (
    ("downsample_layers.0.", "stem."),
    ("downsample_layers.#.", "stages.#.downsample."),
    ("stages.#.#.depthwise_conv.", "stages.#.blocks.#.conv_dw."),
    ("stages.#.#.pointwise_conv1.", "stages.#.blocks.#.mlp.fc1."),
    ("stages.#.#.pointwise_conv2.", "stages.#.blocks.#.mlp.fc2."),
    ("stages.#.#.", "stages.#.blocks.#."),
)
_BODY_MARKS = {
    "stages.0.blocks.0.attn.w_msa.qkv.weight": SWIN,
    "layers.0.attn.attn.in_proj_weight": VIT,
    "stages.0.0.depthwise_conv.weight": CONVNEXT,
}
_THEIRS, _OURS, _NORM = "backbone.", "body.model.", re.compile(r"norm(\d)\.")


def load_dense(
    model: OnBody, source: str | Path, key: str | None = None, classes: Sequence[str] | None = None
) -> Report:
    """Load a whole detector or segmenter, or a classifier into its body.

    Whole ones are of this project or of mmdetection's, mmsegmentation's, Swin's or ConvNeXt's code; classifiers are of
    any format that ``models.load_weights`` reads. Where the file's classes are others, by their names or in number, the
    layers that predict them stay random. Nothing is changed if anything else does not fit.

    Args:
        model: without wrappers.
        source: a path, a URL, ``hf_hub:owner/name`` or ``hf_hub:owner/name/file``.
        key: which weights of a checkpoint: ``model`` (by default), ``model_ema`` or another entry's name.
        classes: names of the model's, to compare with those that the file may state; None: they are not.

    Raises:
        ValueError: the file cannot be read safely, or does not fit; the message names the tensors.
    """
    content = read_weights(source)
    report, state = choose_weights(content, source, key)
    if not any(name.startswith((_THEIRS, _OURS)) for name in state):
        report = model.body.load(source, key)
        report.random += [name for name in model.state_dict() if not name.startswith(_OURS) and _trained(name)]
        return report
    report.layout, state = to_ours(state)
    own, new, faults = model.state_dict(), {}, []
    layers, theirs = model.class_layers(), class_names(content)
    others = classes is not None and theirs is not None and theirs != list(classes)
    for name, tensor in state.items():
        fitted = fit(name, tensor, own[name]) if name in own else None
        of_class = name in own and name.rpartition(".")[0] in layers
        if fitted is not None and not (others and of_class):
            new[name] = fitted
            if fitted.numel() != tensor.numel():
                report.resized[name] = tuple(tensor.shape), tuple(fitted.shape)
        elif of_class:
            report.dropped.append(name)
        elif not BOOKKEEPING.match(name):
            wanted = f"not {tuple(own[name].shape)}" if name in own else "which the model lacks"
            faults.append(f"{name} {tuple(tensor.shape)}, {wanted}")
    if any(name in report.dropped for name in own):  # all of these layers or none: their classes are the same
        new = {name: tensor for name, tensor in new.items() if name.rpartition(".")[0] not in layers}
        report.random = [name for name in own if name.rpartition(".")[0] in layers]
    faults += [f"{name} missing" for name in own if name not in {*new, *report.random} and _trained(name)]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(
            f"{source} does not fit this {type(model).__name__} (its weights have {report.layout} names): "
            f"{', '.join(faults[:4])}{more}; --head and --model must be those of the file"
        )
    model.load_state_dict(new, strict=False)
    report.loaded = list(new)
    if others:
        report.head = f" (new class layers: {Path(source).name} knows other classes than these {len(classes)})"
    layout = Layout(report.layout, frozenset())
    report.mean, report.std, report.why = normalisation(model, content, str(source), layout, state)
    return report


def to_ours(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Rename a state dict of any known layout: (the layout's name, the tensors under our names and in our shapes)."""
    if any(name.startswith(_OURS) for name in state):
        return "this project's", dict(state)
    table = next((table for mark, table in _MARKS.items() if mark in state), ())
    found, body = {}, {}
    for name, tensor in state.items():
        inside = name.removeprefix(_THEIRS)
        if inside == name:
            found[_renamed(name, table)] = tensor
        elif norm := _NORM.match(inside):
            found[f"body.norms.{norm[1]}.{inside[norm.end() :]}"] = tensor
        else:
            body[inside] = tensor
    own = next((table for mark, table in _BODY_MARKS.items() if mark in body), None)
    if own is None:
        layout, body = to_timm(body)
        name = f"mmdetection's, {layout.name}"
    else:
        body = {_renamed(name, own): tensor for name, tensor in body.items() if not BOOKKEEPING.match(name)}
        name = "mmdetection's"
    for inside, tensor in body.items():
        found[_OURS + inside] = _unfold_order(inside, tensor, ours=True) if own is SWIN else tensor
    return name, found


def to_theirs(state: Mapping[str, Tensor], names: str = "authors") -> dict[str, Tensor]:
    """Rename a state dict of ours for other code.

    Args:
        state: of a model of this package.
        names: of the body, those of its ``authors`` (the detection code of Swin and ConvNeXt) or of ``mmdetection``.
    """
    table = next((table for table in _MARKS.values() if _is_of(state, table)), None)
    if table is None:
        raise ValueError("no other code's names are known for this model")
    found, body = {}, {}
    for name, tensor in state.items():
        if name.startswith(_OURS):
            body[name.removeprefix(_OURS)] = tensor
        elif name.startswith("body.norms."):
            found[f"{_THEIRS}norm{name.removeprefix('body.norms.')}"] = tensor
        else:
            found[_renamed(name, [(ours, theirs) for theirs, ours in table])] = tensor
    own = next((t for t in (SWIN, VIT, CONVNEXT) if _is_of(body, t)), None) if names == "mmdetection" else None
    if own is None:
        _, body = to_official(body)
    for inside, tensor in body.items():
        if own is not None:
            tensor = _unfold_order(inside, tensor, ours=False) if own is SWIN else tensor
            inside = _renamed(inside, [(ours, theirs) for theirs, ours in own])
        if not inside.endswith("attn_mask"):  # which depends on the input size and is not kept in detection code
            found[_THEIRS + inside] = tensor
    return found


def _renamed(name: str, table: Table) -> str:
    for old, new in table:
        if match := re.match(re.escape(old).replace(r"\#", r"(\d+)"), name):
            for number in match.groups():
                new = new.replace("#", number, 1)
            return new + name[match.end() :]
    return name


def _is_of(state: Mapping[str, Tensor], table: Table) -> bool:
    """Whether every entry of a table has a tensor among our names."""
    patterns = [re.compile(re.escape(ours).replace(r"\#", r"\d+")) for _, ours in table]
    return all(any(pattern.match(name) for name in state) for pattern in patterns)


def _unfold_order(name: str, tensor: Tensor, ours: bool) -> Tensor:
    """Swin joins 2 x 2 tokens: mmdetection's in the order (channel, row, column), ours in (column, row, channel)."""
    if ".downsample." not in name:
        return tensor
    start = tensor.shape[:-1]
    if ours:
        return tensor.unflatten(-1, (-1, 2, 2)).movedim((-1, -2), (-3, -2)).reshape(*start, -1)
    return tensor.unflatten(-1, (2, 2, -1)).movedim((-3, -2), (-1, -2)).reshape(*start, -1)


def _trained(name: str) -> bool:
    return not name.endswith("num_batches_tracked")
