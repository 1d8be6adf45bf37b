"""CSWin Transformer (Dong et al., CVPR 2022, arXiv 2107.00652), tiny to large, for timm's registry.

Parameter names and shapes are those of the authors' checkpoints, so their files load without renaming.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .pyramid import Mlp, Pyramid, config, init_linear


class StripeAttention(nn.Module):
    """Self-attention inside rectangular windows plus a depthwise convolution of the values (LePE, equation 7)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor, window: tuple[int, int]) -> Tensor:
        """qkv (B, H, W, 3, C) with H, W multiples of the window's (height, width) -> (B, H, W, C)."""
        B, H, W, _, C = qkv.shape
        h, w = window
        grid = (B, H // h, W // w)
        qkv = qkv.view(B, H // h, h, W // w, w, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3).unbind(0)
        # The convolution sees one window at a time: the papers' models pad with zeros at the window's edge.
        position = self.get_v(v.transpose(-1, -2).reshape(-1, C, h, w))
        position = position.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(-1, -2)
        x = F.scaled_dot_product_attention(q, k, v) + position
        return x.view(*grid, self.num_heads, h, w, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, C)


class Block(nn.Module):
    """One CSWin block: half of the heads in vertical and half in horizontal stripes, or all in one window."""

    def __init__(self, dim: int, num_heads: int, stripe: int | str, drop_path: float):
        super().__init__()
        self.stripe = stripe
        branches = 1 if stripe == "whole" else 2
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm1 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.attns = nn.ModuleList(StripeAttention(dim // branches, num_heads // branches) for _ in range(branches))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = Mlp(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim)

    def windows(self, height: int, width: int) -> list[tuple[int, int]]:
        """The window (height, width) of each branch on a map of this size."""
        if self.stripe == "whole":
            return [(height, width)]
        if self.stripe == "half":
            return [(height, width // 2), (height // 2, width)]
        return [(height, self.stripe), (self.stripe, width)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape."""
        B, H, W, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, H, W, 3, C)
        parts = qkv.chunk(len(self.attns), dim=-1)
        mixed = [attn(part, window) for attn, part, window in zip(self.attns, parts, self.windows(H, W))]
        x = x + self.drop_path(self.proj(torch.cat(mixed, dim=-1)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Merge(nn.Module):
    """Halve the map and change its width: a 3 x 3 convolution of stride 2 and a norm. NCHW -> NHWC."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class ToChannelsLast(nn.Module):
    """NCHW -> NHWC; it keeps the index of the stem's norm what it is in the authors' checkpoints."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class CSWin(Pyramid):
    """CSWin Transformer: images (B, 3, H, W), H and W multiples of 32 -> logits (B, num_classes).

    The stripes are 1 and 2 wide in the first two stages; in the third they are half the map (S / 32 pixels of
    a map of S / 16, 7 at 224) and in the last the window is the whole map. No parameter depends on the input
    size and the stripes follow the map, so one model takes any multiple of 32 at any time.
    """

    pools = ("avg", "")
    stripes = (1, 2, "half", "whole")
    layer_decay_layers = 20

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dim: int = 64,
        depths: tuple[int, ...] = (1, 2, 21, 1),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = tuple(embed_dim * 2**i for i in range(4))
        super().__init__(num_classes, dims, global_pool, drop_rate, img_size)
        self.in_chans = in_chans
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stem = nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2)
        self.stage1_conv_embed = nn.Sequential(stem, ToChannelsLast(), nn.LayerNorm(embed_dim))
        for i, dim in enumerate(dims):
            blocks = (Block(dim, num_heads[i], self.stripes[i], next(rates)) for _ in range(depths[i]))
            setattr(self, f"stage{i + 1}", nn.Sequential(*blocks))
            if i < 3:
                setattr(self, f"merge{i + 1}", Merge(dim, 2 * dim))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = self.make_head()
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stage{i + 1}"} for i, dim in enumerate(dims)
        ]
        self.apply(init_linear)

    def parts(self, index: int) -> list[str]:
        return [f"merge{index}", f"stage{index + 1}"] if index else ["stage1_conv_embed", "stage1"]

    def stage(self, index: int, x: Tensor) -> Tensor:
        embed, blocks = (getattr(self, name) for name in self.parts(index))
        x = embed(x)
        for block in blocks:
            x = self.run(block, x)
        return x.permute(0, 3, 1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, H / 32, W / 32, C), normed."""
        self.check_size(x.shape[-2:])
        for index in range(4):
            x = self.stage(index, x)
        return self.norm(x.permute(0, 2, 3, 1))

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(dim=(1, 2)) if self.global_pool else x

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Record the nominal input size; nothing else depends on it. ValueError unless a multiple of 32."""
        self.img_size = self.check_size(img_size)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        by_block = [(r"^stage(\d+)\.(\d+)", None), (r"^merge(\d+)\.", (99999,)), (r"^norm\.", (99999,))]
        return {"stem": r"^stage1_conv_embed", "blocks": r"^(?:stage|merge)(\d+)\." if coarse else by_block}

    def layer_id(self, name: str) -> int:
        """The layer, 0 to 21, that layer-wise learning rate decay counts a parameter to (authors' fine-tuning).

        Pairs of blocks make a layer; merges belong to the layer after them; layers 15 to 19 stay empty in the
        models whose third stage has 21 blocks, so that the last stage has the same rate in all of them.
        """
        part, *rest = name.split(".")
        start = {"stage1": 1, "stage2": 2, "stage3": 4, "stage4": 20}
        fixed = {"stage1_conv_embed": 0, "merge1": 2, "merge2": 4, "merge3": 20}
        if part in start:
            return start[part] + int(rest[0]) // 2
        return fixed.get(part, self.layer_decay_layers + 1)


_sizes = {  # embed_dim, depths, num_heads
    "cswin_tiny": (64, (1, 2, 21, 1), (2, 4, 8, 16)),
    "cswin_small": (64, (2, 4, 32, 2), (2, 4, 8, 16)),
    "cswin_base": (96, (2, 4, 32, 2), (4, 8, 16, 32)),
    "cswin_large": (144, (2, 4, 32, 2), (6, 12, 24, 24)),
}
default_cfgs = generate_default_cfgs(
    {name: config(384 if name.endswith("384") else 224, first_conv="stage1_conv_embed.0")
     for name in [*_sizes, "cswin_base_384", "cswin_large_384"]}
)  # fmt: skip


def _build(variant: str, pretrained: bool, **kwargs) -> CSWin:
    embed_dim, depths, num_heads = _sizes[variant.removesuffix("_384")]
    arguments = {
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "img_size": 384 if variant.endswith("_384") else 224,
    }
    return build_model_with_cfg(
        CSWin,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**arguments, **kwargs},
    )


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs) -> CSWin:
    """22.3 M parameters, 4.3 G multiply-adds at 224."""
    return _build("cswin_tiny", pretrained, **kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs) -> CSWin:
    """34.6 M parameters, 6.8 G multiply-adds at 224."""
    return _build("cswin_small", pretrained, **kwargs)


@register_model
def cswin_base(pretrained: bool = False, **kwargs) -> CSWin:
    """77.4 M parameters, 15.0 G multiply-adds at 224."""
    return _build("cswin_base", pretrained, **kwargs)


@register_model
def cswin_base_384(pretrained: bool = False, **kwargs) -> CSWin:
    """cswin_base made for 384: 47.0 G multiply-adds."""
    return _build("cswin_base_384", pretrained, **kwargs)


@register_model
def cswin_large(pretrained: bool = False, **kwargs) -> CSWin:
    """173.3 M parameters, 33.1 G multiply-adds at 224."""
    return _build("cswin_large", pretrained, **kwargs)


@register_model
def cswin_large_384(pretrained: bool = False, **kwargs) -> CSWin:
    """cswin_large made for 384: 101.9 G multiply-adds."""
    return _build("cswin_large_384", pretrained, **kwargs)
