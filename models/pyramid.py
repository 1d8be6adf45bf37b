"""What CSWin and PVT share: timm's conventions for a four-stage backbone."""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Pyramid(nn.Module):
    """A backbone of four stages at strides 4, 8, 16 and 32, with the methods timm expects of one.

    A subclass defines `stage(index, x)`, which turns the (B, C, H, W) image or map into the stage's
    output of the same layout, `parts(index)`, the names of the attributes that make that stage,
    `forward_features` and `pool`, and sets `head`, `norm`, `num_features` and `feature_info`.
    """

    size_multiple = 32  # what height and width of the input must be divisible by
    pools: tuple[str, ...] = ()

    def __init__(self, num_classes: int, embed_dims: tuple[int, ...], global_pool: str, drop_rate: float, img_size):
        super().__init__()
        if global_pool not in self.pools:
            raise ValueError(f"global_pool={global_pool!r}: {type(self).__name__} pools by one of {self.pools}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.num_stages = len(embed_dims)
        self.head_drop = nn.Dropout(drop_rate)
        self.img_size = self.check_size(img_size)

    def check_size(self, size) -> tuple[int, int]:
        """Return `size` as (height, width); ValueError if either is not a multiple of `size_multiple`."""
        height, width = (size, size) if isinstance(size, int) else size
        m = self.size_multiple
        if height % m or width % m or min(height, width) < m:
            near = max(m, round(height / m) * m), max(m, round(width / m) * m)
            raise ValueError(
                f"input size {height} x {width}: {type(self).__name__} needs multiples of {m}, "
                f"for example {near[0]} x {near[1]}"
            )
        return height, width

    def run(self, block: nn.Module, x: Tensor, *args) -> Tensor:
        """Call a block, storing only its input for the backward pass when checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *args, use_reentrant=False)
        return block(x, *args)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0 classes leave the pooled features."""
        if global_pool is not None:
            if global_pool not in self.pools:
                raise ValueError(f"global_pool={global_pool!r}: {type(self).__name__} pools by one of {self.pools}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self.make_head().to(device=like.device, dtype=like.dtype).train(self.training)

    def make_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        head = nn.Linear(self.num_features, self.num_classes)
        init_linear(head)
        return head

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Feature maps of the chosen stages, (B, C, H / stride, W / stride) each; see timm.

        Args:
            x: images (B, 3, H, W).
            indices: the stages, as timm: None all, an int the last so many, a list those.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run the stages after the last one asked for.
            output_fmt: only NCHW.
            intermediates_only: skip the first of the two results, the last map.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only NCHW")
        self.check_size(x.shape[-2:])
        take, last = feature_take_indices(self.num_stages, indices)
        maps = []
        for index in range(last + 1 if stop_early else self.num_stages):
            x = self.stage(index, x)
            if index in take:
                final = norm and index == self.num_stages - 1
                maps.append(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if final else x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Delete the stages, norm and head that the chosen feature maps do not need; see timm."""
        take, last = feature_take_indices(self.num_stages, indices)
        shortened = last < self.num_stages - 1
        for index in range(last + 1, self.num_stages):
            for name in self.parts(index):
                delattr(self, name)
        if shortened:
            self.num_stages = last + 1
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0)
        return take


def init_linear(module: nn.Module) -> None:
    """The initial values of both papers: linear weights from N(0, 0.02) cut at 2, biases 0; others torch's own."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def config(size: int = 224, **kwargs) -> dict:
    """A timm pretrained_cfg at `size` pixels; at 384 the image is squashed, not cropped (the papers' protocol)."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size < 384 else 1.0,
        "crop_mode": "center" if size < 384 else "squash",
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **kwargs,
    }
