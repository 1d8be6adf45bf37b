"""Masked autoencoders (He et al. 2022, "MAE") around timm's Vision Transformers, for self-supervised pre-training.

Parameters are named as in the authors' code: their checkpoints and ours load into timm's models the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from curriculum.skeleton import Skeleton

from .hog import BINS, CELL, hog, hog_picture
from .registry import create_model

TARGETS = ("pixels", "hog")


def create_mae(
    name: str,
    input_size: int = 224,
    drop_path: float = 0.0,
    target: str = "pixels",
    mask_ratio: float = 0.75,
    decoder: Sequence[int] = (8, 512, 16),
    **kwargs: Any,
) -> MaskedAutoencoder:
    """Build a masked autoencoder with random weights, for square images.

    Args:
        name, input_size, drop_path, kwargs: of the encoder, as `create_model` takes them.
        target: what is predicted of the masked patches: `pixels`, normalised within each patch, or `hog`.
        mask_ratio: share of the patches that the encoder does not see, in (0, 1).
        decoder: blocks, width and heads of the decoder.

    Returns:
        The model, with the attributes that `create_model` gives (and no classes).

    Raises:
        ValueError: the encoder is no plain Vision Transformer, or a setting cannot work with it.
    """
    on_meta = torch.get_default_device().type == "meta"
    encoder = create_model(name, 0, input_size, drop_path, **kwargs)
    _refuse_others(name, encoder)
    with Skeleton() if on_meta else nullcontext():
        model = MaskedAutoencoder(encoder, target, mask_ratio, decoder)
    if not on_meta:
        model.initialise()
    options = {"drop_path": drop_path, "target": target, "mask_ratio": mask_ratio, "decoder": decoder, **kwargs}
    model.rebuild = partial(create_mae, name, **options)
    model.input_size, model.takes_size, model.size_multiple = input_size, True, encoder.size_multiple
    return model


class MaskedAutoencoder(nn.Module):
    """The encoder sees a random part of the patches; a small decoder predicts the others from what it makes of them.

    Position embeddings are fixed, sines and cosines of a patch's column and row; `set_input_size` computes those of
    another size anew. They are buffers: nothing trains, resamples or decays them.

    Args:
        encoder: a plain Vision Transformer of timm's. Its parts are taken over.
        target, mask_ratio, decoder: as in `create_mae`.

    Raises:
        ValueError: settings out of range, or cells of HOG that do not fit into patches.
    """

    def __init__(self, encoder: VisionTransformer, target: str, mask_ratio: float, decoder: Sequence[int]) -> None:
        super().__init__()
        depth, width, heads = decoder
        self.patch_side = side = encoder.patch_embed.patch_size[0]
        if target not in TARGETS:
            raise ValueError(f"--mae_target {target!r} is unknown; choose one of {', '.join(TARGETS)}")
        if target == "hog" and side % CELL:
            raise ValueError(f"--mae_target hog: patches of {side} pixels are not made of cells of {CELL} pixels")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"--mask_ratio is {mask_ratio}; it must be above 0 and below 1")
        if min(decoder) < 1 or width % heads or width % 4:
            raise ValueError(
                f"--decoder is {list(decoder)}: blocks, width and heads are positive, and the width is a multiple of "
                "the heads and of 4"
            )
        self.target, self.mask_ratio = target, mask_ratio
        self.in_chans, self.num_classes = encoder.in_chans, 0
        # Targets are images of so many channels, cut into patches of so many pixels a side.
        self.target_shape = (self.in_chans, side) if target == "pixels" else (self.in_chans * BINS, side // CELL)
        self.patch_embed, self.blocks, self.cls_token = encoder.patch_embed, encoder.blocks, encoder.cls_token
        # Models that classify by an average have their last norm behind it.
        self.norm = encoder.fc_norm if isinstance(encoder.norm, nn.Identity) else encoder.norm
        self.prefix = encoder.num_prefix_tokens
        self.embedded_prefix = encoder.pos_embed.shape[1] - self.patch_embed.num_patches  # of position 0
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, self.target_shape[0] * self.target_shape[1] ** 2)
        self.register_buffer("pos_embed", torch.empty(1, 0, encoder.embed_dim))
        self.register_buffer("decoder_pos_embed", torch.empty(1, 0, width))
        self._place()

    def initialise(self) -> None:
        """Draw the weights as MAE does: Xavier's uniform for linear layers and patches, 0.02 for the tokens."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Make the model ready for images of (H, W) pixels; no parameter changes."""
        self.patch_embed.set_input_size(img_size=img_size)
        self._place()

    def _place(self) -> None:
        """Position embeddings for the present size."""
        patches = self.patch_embed.num_patches
        if not 0 < self.visible < patches:
            raise ValueError(f"--mask_ratio {self.mask_ratio} of {patches} patches leaves {self.visible} visible")
        for name, prefix in (("pos_embed", self.embedded_prefix), ("decoder_pos_embed", self.prefix)):
            old = getattr(self, name)
            setattr(self, name, position_embedding(old.shape[-1], self.patch_embed.grid_size, prefix).to(old))

    @property
    def visible(self) -> int:
        """Patches of an image that the encoder sees."""
        return int(self.patch_embed.num_patches * (1 - self.mask_ratio) + 1e-9)

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The mean squared error of what is predicted of each image's masked patches: float (N,).

        Args:
            images: float (N, C, S, S).
            noise: float (N, patches): the patches of the least noise are those that are seen. None: drawn at random.
        """
        if noise is None:
            noise = torch.rand(len(images), self.patch_embed.num_patches, device=images.device)
        predicted, masked = self.predict(images, noise)
        error = (predicted.float() - self.targets(images)).square().mean(-1)
        return (error * masked).sum(1) / masked.sum(1)

    def predict(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the decoder predicts of every patch, (N, patches, numbers), and which are masked, bool."""
        order = noise.argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        # Models for dynamic sizes leave the patches in rows and columns.
        tokens = self.patch_embed(images).flatten(1, -2) + self.pos_embed[:, self.embedded_prefix :]
        tokens = _take(tokens, order[:, : self.visible])
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.decoder_embed(self.norm(self.blocks(tokens)))
        hidden = self.mask_token.expand(len(tokens), order.shape[1] - self.visible, -1)
        patches = _take(torch.cat([tokens[:, self.prefix :], hidden], 1), back)
        tokens = torch.cat([tokens[:, : self.prefix], patches], 1) + self.decoder_pos_embed
        tokens = self.decoder_norm(self.decoder_blocks(tokens))
        return self.decoder_pred(tokens[:, self.prefix :]), back >= self.visible

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """What is to be predicted of every patch: float (N, patches, numbers)."""
        side = self.target_shape[1]
        if self.target == "hog":
            return to_patches(hog(images).flatten(1, 2), side)
        patches = to_patches(images, side)
        return (patches - patches.mean(-1, keepdim=True)) / _deviation(patches)

    @torch.no_grad()
    def picture(
        self, images: torch.Tensor, noise: torch.Tensor, pixels: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Images, what the encoder sees of them and what is predicted, as the rows of one picture.

        Predicted pixels get the mean and deviation of the patch that they are for, which the model does not know.
        Predicted HOG comes below that of the images.

        Args:
            images, noise: as in `forward`.
            pixels: makes uint8 images of such as the model takes.

        Returns:
            uint8 (3, rows * S, N * S).
        """
        predicted, masked = self.predict(images, noise)
        predicted, masked, side = predicted.float(), masked[..., None], self.patch_side
        patches = to_patches(images, side)
        rows = [images, from_patches(patches.masked_fill(masked, 0.0), side)]
        if self.target == "pixels":
            guess = predicted * _deviation(patches) + patches.mean(-1, keepdim=True)
            rows.append(from_patches(torch.where(masked, guess, patches), side))
        drawn = [pixels(row) for row in rows]
        if self.target == "hog":
            guess = from_patches(predicted, self.target_shape[1]).unflatten(1, (self.in_chans, BINS))
            drawn += [hog_picture(hog(images)), hog_picture(guess)]
        return torch.cat([torch.cat(list(row), 2) for row in drawn], 1)


def position_embedding(dim: int, grid: Sequence[int], prefix: int = 0) -> torch.Tensor:
    """The authors' fixed position embedding, float (1, prefix + rows * columns, dim); of the prefix it is zero.

    The first half of a patch's numbers are of its column k, the second of its row: sin(k w) and cos(k w) for
    w = 10000^(-4 i / dim), i = 0 ... dim / 4 - 1.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    return torch.cat([table.new_zeros(prefix, dim), table])[None].float()


def to_patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """(N, C, H, W) -> (N, patches, side * side * C): patches row by row, in each one the channels last."""
    patches = images.unfold(2, side, side).unfold(3, side, side)  # (N, C, rows, columns, side, side)
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def from_patches(patches: torch.Tensor, side: int) -> torch.Tensor:
    """The inverse of `to_patches`, for square images."""
    rows = math.isqrt(patches.shape[1])
    parts = patches.unflatten(2, (side, side, -1)).unflatten(1, (rows, rows))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _deviation(patches: torch.Tensor) -> torch.Tensor:
    """Of the numbers of each patch, never 0."""
    return (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def _take(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The tokens (N, T, D) at ``places`` (N, K) -> (N, K, D)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def _refuse_others(name: str, encoder: nn.Module) -> None:
    """Raises ValueError for an encoder whose tokens are more than embedded patches, their positions and a class."""
    plain = (
        isinstance(encoder, VisionTransformer)
        and type(encoder.patch_embed) is PatchEmbed
        and not encoder.patch_embed.dynamic_img_pad
        and encoder.pos_embed is not None
        and encoder.num_prefix_tokens <= 1
        and encoder.embed_dim % 4 == 0
        and all(isinstance(part, nn.Identity) for part in (encoder.norm_pre, encoder.patch_drop))
        and not encoder.pos_drop.p
    )
    if not plain:
        raise ValueError(
            f"--task mae: {name} ({type(encoder).__name__}) is no plain Vision Transformer (patches, positions, at "
            "most a class token, no dropout of these); choose vit_small_patch16_224, vit_base_patch16_224, ..."
        )
