"""Isotropic ConvNeXt (Liu et al., CVPR 2022, arXiv 2201.03545, section 3.3), small to large, for timm's registry."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .pyramid import config


class ConvNeXtIsotropic(nn.Module):
    """A ConvNeXt of one stage behind 16 x 16 patches, as a ViT: images (B, 3, H, W) -> logits (B, num_classes).

    Nothing depends on the input size; pixels beyond the last whole patch are not seen. As the authors' it has no
    layer scale unless `ls_init_value` is given.
    """

    size_multiple = 16

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 384,
        depth: int = 18,
        global_pool: str = "avg",
        ls_init_value: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={global_pool!r}: ConvNeXtIsotropic pools by 'avg' or ''")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = dim
        self.grad_checkpointing = False
        self.stem = nn.Conv2d(in_chans, dim, 16, stride=16)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim, drop_path=r, ls_init_value=ls_init_value) for r in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [{"num_chs": dim, "reduction": 16, "module": "blocks"}]
        self.reset_classifier(num_classes)
        self.apply(_init)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, dim, H // 16, W // 16)."""
        x = self.stem(x)
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(dim=(2, 3)) if self.global_pool else x.permute(0, 2, 3, 1)
        x = self.head_drop(self.norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0 classes leave the pooled features."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = (
            head.apply(_init).to(device=self.stem.weight.device, dtype=self.stem.weight.dtype).train(self.training)
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        return set()


def _init(module: nn.Module) -> None:
    """As ConvNeXt's: weights of convolutions and linear layers from N(0, 0.02) cut at 2, biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_sizes = {  # dim, depth
    "convnext_isotropic_small": (384, 18),
    "convnext_isotropic_base": (768, 18),
    "convnext_isotropic_large": (1024, 36),
}
default_cfgs = generate_default_cfgs({name: config(first_conv="stem") for name in _sizes})


def _build(variant: str, pretrained: bool, **kwargs) -> ConvNeXtIsotropic:
    dim, depth = _sizes[variant]
    return build_model_with_cfg(ConvNeXtIsotropic, variant, pretrained, **{"dim": dim, "depth": depth, **kwargs})


@register_model
def convnext_isotropic_small(pretrained: bool = False, **kwargs) -> ConvNeXtIsotropic:
    """22.3 M parameters, 4.3 G multiply-adds at 224."""
    return _build("convnext_isotropic_small", pretrained, **kwargs)


@register_model
def convnext_isotropic_base(pretrained: bool = False, **kwargs) -> ConvNeXtIsotropic:
    """87.1 M parameters, 16.9 G multiply-adds at 224."""
    return _build("convnext_isotropic_base", pretrained, **kwargs)


@register_model
def convnext_isotropic_large(pretrained: bool = False, **kwargs) -> ConvNeXtIsotropic:
    """306 M parameters, 59.7 G multiply-adds at 224."""
    return _build("convnext_isotropic_large", pretrained, **kwargs)
