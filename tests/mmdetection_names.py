"""The modules of mmdetection's and mmsegmentation's models, as far as they give a state dict its names and shapes."""

from __future__ import annotations

import torch
from torch import nn


def tree(**parts) -> nn.Module:
    """A module that has these parts."""
    module = nn.Module()
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            module.register_buffer(name, part)
        else:
            setattr(module, name, part)
    return module


def conv_module(channels: int, width: int, kernel: int, norm: bool = False) -> nn.Module:
    parts = {"conv": nn.Conv2d(channels, width, kernel, bias=not norm)}
    return tree(**parts, **({"bn": nn.BatchNorm2d(width)} if norm else {}))


def swin_of_authors(width: int, depths, heads) -> nn.Module:
    stages = []
    for place, (depth, count) in enumerate(zip(depths, heads)):
        c = width * 2**place
        blocks = [
            tree(
                norm1=nn.LayerNorm(c),
                attn=tree(
                    relative_position_bias_table=nn.Parameter(torch.zeros(169, count)),
                    relative_position_index=torch.zeros(49, 49, dtype=torch.long),
                    qkv=nn.Linear(c, 3 * c),
                    proj=nn.Linear(c, c),
                ),
                norm2=nn.LayerNorm(c),
                mlp=tree(fc1=nn.Linear(c, 4 * c), fc2=nn.Linear(4 * c, c)),
            )
            for _ in range(depth)
        ]
        stage = {"blocks": nn.ModuleList(blocks)}
        if place < 3:
            stage["downsample"] = tree(reduction=nn.Linear(4 * c, 2 * c, bias=False), norm=nn.LayerNorm(4 * c))
        stages.append(tree(**stage))
    norms = {f"norm{place}": nn.LayerNorm(width * 2**place) for place in range(4)}
    embed = tree(proj=nn.Conv2d(3, width, 4, 4), norm=nn.LayerNorm(width))
    return tree(patch_embed=embed, layers=nn.ModuleList(stages), **norms)


def swin_of_mmdetection(width: int, depths, heads) -> nn.Module:
    stages = []
    for place, (depth, count) in enumerate(zip(depths, heads)):
        c = width * 2**place
        blocks = [
            tree(
                norm1=nn.LayerNorm(c),
                attn=tree(
                    w_msa=tree(
                        relative_position_bias_table=nn.Parameter(torch.zeros(169, count)),
                        relative_position_index=torch.zeros(49, 49, dtype=torch.long),
                        qkv=nn.Linear(c, 3 * c),
                        proj=nn.Linear(c, c),
                    )
                ),
                norm2=nn.LayerNorm(c),
                ffn=_ffn(c),
            )
            for _ in range(depth)
        ]
        stage = {"blocks": nn.ModuleList(blocks)}
        if place < 3:
            stage["downsample"] = tree(norm=nn.LayerNorm(4 * c), reduction=nn.Linear(4 * c, 2 * c, bias=False))
        stages.append(tree(**stage))
    norms = {f"norm{place}": nn.LayerNorm(width * 2**place) for place in range(4)}
    embed = tree(projection=nn.Conv2d(3, width, 4, 4), norm=nn.LayerNorm(width))
    return tree(patch_embed=embed, stages=nn.ModuleList(stages), **norms)


def vit_of_mmsegmentation(width: int, depth: int, tokens: int) -> nn.Module:
    layers = [
        tree(
            ln1=nn.LayerNorm(width),
            attn=tree(attn=nn.MultiheadAttention(width, 1)),
            ln2=nn.LayerNorm(width),
            ffn=_ffn(width),
        )
        for _ in range(depth)
    ]
    return tree(
        cls_token=nn.Parameter(torch.zeros(1, 1, width)),
        pos_embed=nn.Parameter(torch.zeros(1, tokens, width)),
        patch_embed=tree(projection=nn.Conv2d(3, width, 16, 16)),
        layers=nn.ModuleList(layers),
    )


def _ffn(width: int) -> nn.Module:
    first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout())
    return tree(layers=nn.Sequential(first, nn.Linear(4 * width, width), nn.Dropout()))


def neck(channels, width: int, extra: int = 0) -> nn.Module:
    outer = [conv_module(width, width, 3) for _ in channels]
    outer += [conv_module(channels[-1] if not place else width, width, 3) for place in range(extra)]
    lateral = [conv_module(c, width, 1) for c in channels]
    return tree(lateral_convs=nn.ModuleList(lateral), fpn_convs=nn.ModuleList(outer))


def two_stage(backbone: nn.Module, channels, classes: int, cascade: bool) -> nn.Module:
    width = 256
    rpn = tree(rpn_conv=nn.Conv2d(width, width, 3), rpn_cls=nn.Conv2d(width, 3, 1), rpn_reg=nn.Conv2d(width, 12, 1))

    def box_head() -> nn.Module:
        convs, inside = (
            ([conv_module(width, width, 3, norm=True) for _ in range(4)], 49 * width) if cascade else ([], 0)
        )
        shared = [nn.Linear(inside or 49 * width, 1024)] + ([] if cascade else [nn.Linear(1024, 1024)])
        return tree(
            fc_cls=nn.Linear(1024, classes + 1),
            fc_reg=nn.Linear(1024, 4 * classes),
            shared_convs=nn.ModuleList(convs),
            shared_fcs=nn.ModuleList(shared),
        )

    def mask_head() -> nn.Module:
        return tree(
            convs=nn.ModuleList(conv_module(width, width, 3) for _ in range(4)),
            upsample=nn.ConvTranspose2d(width, width, 2, 2),
            conv_logits=nn.Conv2d(width, classes, 1),
        )

    boxes, masks = (box_head(), mask_head())
    if cascade:
        boxes, masks = (nn.ModuleList(make() for _ in range(3)) for make in (box_head, mask_head))
    roi_head = tree(bbox_head=boxes, mask_head=masks)
    return tree(backbone=backbone, neck=neck(channels, width), rpn_head=rpn, roi_head=roi_head)


def retinanet(backbone: nn.Module, channels, classes: int) -> nn.Module:
    convs = {f"{name}_convs": nn.ModuleList(conv_module(256, 256, 3) for _ in range(4)) for name in ("cls", "reg")}
    head = tree(**convs, retina_cls=nn.Conv2d(256, 9 * classes, 3), retina_reg=nn.Conv2d(256, 36, 3))
    return tree(backbone=backbone, neck=neck(channels, 256, extra=2), bbox_head=head)


def upernet(backbone: nn.Module, channels, classes: int, auxiliary: int) -> nn.Module:
    width = 512
    decode = tree(
        conv_seg=nn.Conv2d(width, classes, 1),
        psp_modules=nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), conv_module(channels[-1], width, 1, norm=True)) for n in (1, 2, 3, 6)
        ),
        bottleneck=conv_module(channels[-1] + 4 * width, width, 3, norm=True),
        lateral_convs=nn.ModuleList(conv_module(c, width, 1, norm=True) for c in channels[:-1]),
        fpn_convs=nn.ModuleList(conv_module(width, width, 3, norm=True) for _ in channels[:-1]),
        fpn_bottleneck=conv_module(4 * width, width, 3, norm=True),
    )
    convs = nn.Sequential(conv_module(channels[auxiliary], 256, 3, norm=True))
    aux = tree(conv_seg=nn.Conv2d(256, classes, 1), convs=convs)
    return tree(backbone=backbone, decode_head=decode, auxiliary_head=aux)
