"""Pyramid Vision Transformer v1 (Wang et al., ICCV 2021, arXiv 2102.12122), tiny to large, for timm's registry.

Parameter names and shapes are those of the authors' checkpoints, so their files load without renaming.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .pyramid import Mlp, Pyramid, config, init_linear


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map reduced `reduction` times in each direction."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        self.reduction = reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of `size` (with a class token in front only where reduction is 1) -> same shape."""
        B, N, C = x.shape
        q = self.q(x).view(B, N, self.num_heads, -1).transpose(1, 2)
        if self.reduction > 1:
            x = self.sr(x.transpose(1, 2).reshape(B, C, *size))
            x = self.norm(x.flatten(2).transpose(1, 2))
        k, v = self.kv(x).view(B, x.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """Pre-norm transformer block over the tokens (B, N, C) of a map of `size`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, reduction: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, reduction)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cut an NCHW map into patches: a convolution of that size and stride, and a norm -> tokens (B, N, C)."""

    def __init__(self, dim: int, dim_out: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, patch, stride=patch)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PVT(Pyramid):
    """PVT v1: images (B, 3, H, W), H and W multiples of 32 -> logits (B, num_classes).

    The position embeddings `pos_embed1` to `pos_embed4`, (1, N, C) with the class token's in front in the
    last, belong to the grid of `img_size`. Other sizes are taken too: the embeddings are then interpolated
    in the forward pass (bilinear, as the authors do); `set_input_size` moves the parameters themselves.
    """

    pools = ("token", "avg", "")

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[int, ...] = (8, 8, 4, 4),
        reductions: tuple[int, ...] = (8, 4, 2, 1),
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(num_classes, embed_dims, global_pool, drop_rate, img_size)
        self.in_chans = in_chans
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.feature_info = []
        for i, dim in enumerate(embed_dims):
            embed = PatchEmbed(embed_dims[i - 1] if i else in_chans, dim, 2 if i else 4)
            rows, columns = self.grid(i)
            blocks = (Block(dim, num_heads[i], mlp_ratios[i], reductions[i], next(rates)) for _ in range(depths[i]))
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, rows * columns + (i == 3), dim)))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"block{i + 1}"})
        self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims[-1]))
        self.head = self.make_head()
        self.apply(init_linear)
        for table in (self.pos_embed1, self.pos_embed2, self.pos_embed3, self.pos_embed4, self.cls_token):
            trunc_normal_(table, std=0.02)

    def grid(self, index: int) -> tuple[int, int]:
        """Rows and columns of the stage's map at `img_size`."""
        return self.img_size[0] // (4 * 2**index), self.img_size[1] // (4 * 2**index)

    def parts(self, index: int) -> list[str]:
        return [f"patch_embed{index + 1}", f"pos_embed{index + 1}", f"block{index + 1}"]

    def tokens(self, index: int, x: Tensor) -> Tensor:
        """NCHW map -> the stage's output tokens (B, N, C), with the class token in front in the last stage."""
        embed, position, blocks = (getattr(self, name) for name in self.parts(index))
        size = x.shape[-2] // embed.proj.stride[0], x.shape[-1] // embed.proj.stride[1]
        x = embed(x)
        if index == 3:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + resize_position(position, self.grid(index), size)
        for block in blocks:
            x = self.run(block, x, size)
        return x

    def stage(self, index: int, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        stride = 2 if index else 4
        x = self.tokens(index, x)[:, int(index == 3) :]
        return x.transpose(1, 2).reshape(len(x), -1, height // stride, width // stride)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> normed tokens (B, 1 + H W / 1024, C), the class token first."""
        self.check_size(x.shape[-2:])
        for index in range(3):
            x = self.stage(index, x)
        return self.norm(self.tokens(3, x))

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return x[:, 0]
        return x[:, 1:].mean(dim=1) if self.global_pool else x

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Move the position embeddings to the grid of another input size; as in timm they are new parameters."""
        new = self.check_size(img_size)
        if new == self.img_size:
            return
        old = [self.grid(i) for i in range(4)]
        self.img_size = new
        for i in range(4):
            name = f"pos_embed{i + 1}"
            table = getattr(self, name)
            moved = resize_position(table.detach(), old[i], self.grid(i))
            setattr(self, name, nn.Parameter(moved, requires_grad=table.requires_grad))

    def no_weight_decay(self) -> set[str]:
        """The class token only: the authors decay the position embeddings."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        by_block = [
            (r"^(?:patch_embed|pos_embed)([2-4])", (0,)),
            (r"^block(\d+)\.(\d+)", None),
            (r"^(?:cls_token|norm\.)", (99999,)),
        ]
        by_stage = r"^(?:patch_embed|pos_embed|block)(\d+)"
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": by_stage if coarse else by_block}


def resize_position(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample the grid part of a position embedding (1, prefix + rows columns, C), bilinear, not antialiased.

    The source is the authors' `_get_pos_embed`; tokens in front of the grid are kept as they are.
    """
    if old == new:
        return table
    prefix = table.shape[1] - old[0] * old[1]
    grid = table[:, prefix:].transpose(1, 2).reshape(1, -1, *old)
    grid = F.interpolate(grid.float(), size=new, mode="bilinear", align_corners=False).to(table.dtype)
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


_depths = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}
default_cfgs = generate_default_cfgs({name: config(first_conv="patch_embed1.proj") for name in _depths})


def _build(variant: str, pretrained: bool, **kwargs) -> PVT:
    return build_model_with_cfg(
        PVT,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{"depths": _depths[variant], **kwargs},
    )


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> PVT:
    """13.2 M parameters, 1.9 G multiply-adds at 224."""
    return _build("pvt_tiny", pretrained, **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> PVT:
    """24.5 M parameters, 3.8 G multiply-adds at 224."""
    return _build("pvt_small", pretrained, **kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs) -> PVT:
    """44.2 M parameters, 6.7 G multiply-adds at 224."""
    return _build("pvt_medium", pretrained, **kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs) -> PVT:
    """61.4 M parameters, 9.8 G multiply-adds at 224."""
    return _build("pvt_large", pretrained, **kwargs)
