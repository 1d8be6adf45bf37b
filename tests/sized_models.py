"""Small models that are built for one input size, as a user's own: ``create_model("tests.sized_models:volo")``."""

from functools import partial

import torch
from timm.models.crossvit import CrossVit
from timm.models.gcvit import GlobalContextVit
from timm.models.levit import Levit
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import nn


def volo(num_classes, img_size=224):
    """Position embedding (1, H, W, C)."""
    settings = {"embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2), "stem_hidden_dim": 8}
    return VOLO((1, 1, 1, 1), img_size, num_classes=num_classes, **settings)


nest = partial(Nest, embed_dims=(8, 16, 16), num_heads=(1, 2, 2), depths=(1, 1, 1))  # one embedding for each block
mixer = partial(MlpMixer, num_blocks=1, embed_dim=16, patch_size=32)  # weights that mix positions
gcvit = partial(GlobalContextVit, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))  # bias tables
levit = partial(  # attention biases, cached in eval mode; BatchNorm
    Levit, embed_dim=(16, 16), depth=(1, 1), num_heads=(2, 2), key_dim=8, stem_backbone=None
)
crossvit = partial(  # two branches, whose patches fit together at few sizes
    CrossVit, img_scale=(1.0, 224 / 240), patch_size=(12, 16), embed_dim=(16, 16), num_heads=(1, 1), depth=((1, 1, 0),)
)


def mvit(num_classes, img_size=224):
    """One bias table for each axis."""
    cfg = MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=8)
    return MultiScaleVit(cfg, (img_size, img_size), num_classes=num_classes)


def ignorant(num_classes):
    """Takes no size and does not depend on it."""
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


class Picky(nn.Linear):
    def forward(self, x):
        assert x.shape[-1] in (32, 64)
        return super().forward(x.mean((2, 3)))


def picky(num_classes):
    """Takes two sizes, and does not say why."""
    return Picky(3, num_classes)


class Masked(nn.Module):
    """Depends on the size by plain attributes, a tensor that is no buffer, and a buffer that is not always there."""

    def __init__(self, num_classes, img_size):
        super().__init__()
        self.side = img_size
        self.scale = torch.full((1,), 1.0 / img_size)
        self.register_buffer("mask", torch.ones(img_size) if img_size > 64 else None)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, num_classes)

    def forward(self, x):
        assert x.shape[-1] == self.side
        x = self.norm(x) if self.mask is None else self.norm(x) * self.mask
        return self.head((x * self.scale).sum((2, 3)))


def masked(num_classes, img_size=64):
    return Masked(num_classes, img_size)
