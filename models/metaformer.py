"""MetaFormers (Yu et al., TPAMI 2024, arXiv 2210.13452) that timm lacks, and their authors' head for those it has.

IdentityFormer mixes no tokens at all, RandFormer by a fixed random matrix; both are baselines of that paper.
"""

from __future__ import annotations

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.metaformer import GroupNorm1NoBias, MetaFormer, MlpHead
from torch import Tensor, nn

from .pyramid import config

_sizes = {  # depths, dims
    "s12": ([2, 2, 6, 2], [64, 128, 320, 512]),
    "s24": ([4, 4, 12, 4], [64, 128, 320, 512]),
    "s36": ([6, 6, 18, 6], [64, 128, 320, 512]),
    "m36": ([6, 6, 18, 6], [96, 192, 384, 768]),
    "m48": ([8, 8, 24, 8], [96, 192, 384, 768]),
}


class Nothing(nn.Identity):
    """A token mixer that mixes none."""

    def __init__(self, dim: int, **_):
        super().__init__()


class RandomMixing(nn.Module):
    """Mixes the positions of a map (B, C, H, W) by a random matrix that does not train."""

    tokens = 14 * 14  # of the third stage at 224 pixels

    def __init__(self, dim: int, **_):
        super().__init__()
        tokens = self.tokens
        self.random_matrix = nn.Parameter(torch.softmax(torch.rand(tokens, tokens), dim=-1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] * x.shape[-1] != len(self.random_matrix):
            raise ValueError(f"RandFormer mixes {len(self.random_matrix)} positions: it takes 224 x 224 pixels only")
        return torch.einsum("mn,bcn->bcm", self.random_matrix, x.flatten(2)).view_as(x)


class LastRandomMixing(RandomMixing):
    """The same in the fourth stage."""

    tokens = 7 * 7


_MIXERS = {
    "identityformer": [Nothing] * 4,
    "randformer": [Nothing, Nothing, RandomMixing, LastRandomMixing],
}
default_cfgs = generate_default_cfgs(
    {f"{kind}_{size}": config(first_conv="stem.conv", classifier="head.fc") for kind in _MIXERS for size in _sizes}
)


def _register(kind: str, size: str) -> None:
    def build(pretrained: bool = False, **kwargs) -> MetaFormer:
        depths, dims = _sizes[size]
        options = {"depths": depths, "dims": dims, "token_mixers": _MIXERS[kind], "norm_layers": GroupNorm1NoBias}
        return build_model_with_cfg(
            MetaFormer,
            f"{kind}_{size}",
            pretrained,
            feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
            **{**options, "use_mlp_head": False, **kwargs},
        )

    build.__name__, build.__module__ = f"{kind}_{size}", __name__
    globals()[build.__name__] = register_model(build)


for _kind in _MIXERS:
    for _size in _sizes:
        _register(_kind, _size)


def use_authors_head(model: nn.Module) -> None:
    """Of a ConvFormer or CAFormer: dropout acts inside the MLP head, behind its norm, whose epsilon is 1e-5.

    timm drops features in front of that head, and has 1e-6.
    """
    head = getattr(model, "head", None)
    if isinstance(model, MetaFormer) and isinstance(head.fc, MlpHead):
        head.fc.norm.eps = 1e-5
        head.fc.head_drop.p, head.drop.p = head.drop.p, 0.0
