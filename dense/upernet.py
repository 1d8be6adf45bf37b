"""UperNet (Xiao et al. 2018) on a body, as mmsegmentation configures it: the model, and segmenting whole images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from .backbones import Body, OnBody

IGNORED = 255
AUXILIARY_WEIGHT = 0.4
MOST = 1 << 28  # class probabilities of an image that are made at a time
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of a multi-scale test


class UperHead(nn.Module):
    """Pyramid pooling on the last map, a feature pyramid, all levels fused at the finest: maps -> (N, width, h, w).

    Args:
        channels: of each map, finest first.
        width: of the head.
        pools: cells a side of the pooled maps.
    """

    def __init__(self, channels: Sequence[int], width: int = 512, pools: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), _conv(channels[-1], width, 1)) for n in pools)
        self.bottleneck = _conv(channels[-1] + len(pools) * width, width, 3)
        self.laterals = nn.ModuleList(_conv(n, width, 1) for n in channels[:-1])
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in channels[:-1])
        self.fuse = _conv(len(channels) * width, width, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        pooled = [resize(pool(last), last.shape[-2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps)] + [
            self.bottleneck(torch.cat([last, *pooled], 1))
        ]
        for place in range(len(levels) - 1, 0, -1):
            levels[place - 1] = levels[place - 1] + resize(levels[place], levels[place - 1].shape[-2:])
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels)] + levels[-1:]
        return self.fuse(torch.cat([resize(x, levels[0].shape[-2:]) for x in levels], 1))


class UperNet(OnBody):
    """Images in; logits of the classes at the finest level's stride, or losses.

    The auxiliary head, a convolution on one map, is there for training only.

    Args:
        body: of four levels.
        num_classes: of the labels.
        width, auxiliary_width: of the two heads.
        auxiliary: which of the body's maps the auxiliary head sees.
        dropout: of whole channels, before each classifier.
    """

    class_names = r"(auxiliary_)?classifier\.1"

    def __init__(
        self,
        body: Body,
        num_classes: int,
        width: int = 512,
        auxiliary_width: int = 256,
        auxiliary: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(body)
        self.num_classes, self.auxiliary = num_classes, auxiliary
        self.head = UperHead(body.channels, width)
        self.classifier = _classifier(width, num_classes, dropout)
        self.auxiliary_head = _conv(body.channels[auxiliary], auxiliary_width, 3)
        self.auxiliary_classifier = _classifier(auxiliary_width, num_classes, dropout)

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Segment images of any size.

        Args:
            images: float (N, 3, H, W), normalised.
            sizes: not used: what lies beyond an image's size has the label 255.
            targets: int64 (N, H, W), 255 where it does not count.

        Returns:
            Logits (N, C, h, w) at the stride of the finest level, or with targets the losses, to be summed. As in
            mmsegmentation the mean is over all pixels, those that do not count included.
        """
        maps = self.body(images)
        logits = self.classifier(self.head(maps))
        if targets is None:
            return logits
        auxiliary = self.auxiliary_classifier(self.auxiliary_head(maps[self.auxiliary]))
        return {
            "seg": _loss(logits, targets, self.body.strides[0]),
            "aux": AUXILIARY_WEIGHT * _loss(auxiliary, targets, self.body.strides[self.auxiliary]),
        }


def upernet(body: Body, num_classes: int, width: int = 512, auxiliary_width: int = 256) -> UperNet:
    """UperNet; on a plain ViT, whose maps are all alike, the auxiliary head sees the last map, else the third."""
    alike = len(set(body.strides)) == 1
    return UperNet(body, num_classes, width, auxiliary_width, auxiliary=3 if alike else 2)


@torch.inference_mode()
def segment(
    model: UperNet,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    wanted: Sequence[tuple[int, int]],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> list[Tensor]:
    """Label maps of whole images, by the mean of the class probabilities over scales and mirror images.

    Each image goes through the model by itself and without its padding, so that they do not depend on the batch. Of a
    large original the probabilities are made in bands of rows, so that their memory is bounded.

    Args:
        images: float (N, 3, H, W), normalised.
        sizes: height and width of each image within the batch.
        wanted: height and width of each result: the original image's.
        scales: factors of the image's size.
        flip: with each image its mirror image.

    Returns:
        For each image int64 (height, width).
    """
    found = class_probabilities(model, images, sizes, wanted, scales, flip)
    return [torch.cat([band.argmax(0) for band in bands]) for bands in found]


def class_probabilities(
    model: UperNet,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    wanted: Sequence[tuple[int, int]],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Iterator[Iterator[Tensor]]:
    """What :func:`segment` takes the labels from: of each image float (C, some rows, width), from the top down."""
    for image, (height, width), out in zip(images, sizes, wanted):
        image = image[None, :, :height, :width]
        parts = []  # logits as the model gives them, the size that they are of, whether mirrored
        for scale in scales:
            side = (round(height * scale), round(width * scale))
            scaled = image if scale == 1 else F.interpolate(image, side, mode="bilinear", antialias=scale < 1)
            for mirrored in (False, True)[: 1 + flip]:
                logits = model(scaled.flip(-1) if mirrored else scaled).float()
                parts.append((logits, scaled.shape[-2:], mirrored))
        yield _bands(parts, out, model.body.strides[0])


def _bands(parts: list[tuple[Tensor, Sequence[int], bool]], out: tuple[int, int], stride: int) -> Iterator[Tensor]:
    rows = max(1, MOST // (parts[0][0].shape[1] * out[1]))
    for first in range(0, out[0], rows):
        total = torch.zeros((), device=parts[0][0].device)
        for logits, size, mirrored in parts:
            band = _resized_rows(spread(logits, stride, size), out, first, min(first + rows, out[0]))
            total = total + (band.flip(-1) if mirrored else band).softmax(1)[0]
        yield total / len(parts)


def _resized_rows(x: Tensor, size: tuple[int, int], first: int, stop: int) -> Tensor:
    """Rows ``first`` to ``stop`` of :func:`resize`: (N, C, h, w) -> (N, C, stop - first, width)."""
    if stop - first == size[0]:
        return resize(x, size)
    place = ((torch.arange(first, stop, device=x.device) + 0.5) * (x.shape[-2] / size[0]) - 0.5).clamp(min=0)
    above = place.long().clamp(max=x.shape[-2] - 1)
    below = (above + 1).clamp(max=x.shape[-2] - 1)
    rows = torch.lerp(x[..., above, :], x[..., below, :], (place - above)[:, None])
    return resize(rows, (stop - first, size[1]))


def _loss(logits: Tensor, targets: Tensor, stride: int) -> Tensor:
    logits = spread(logits.float(), stride, targets.shape[-2:])
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / targets.numel()


def _conv(channels: int, width: int, kernel: int) -> nn.Module:
    return Conv2dNormActivation(channels, width, kernel)


def _classifier(width: int, num_classes: int, dropout: float) -> nn.Module:
    layer = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout2d(dropout), layer)


def spread(x: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """A map (N, C, h, w) at a stride -> (N, C, height, width) of the image. Bodies pad images to whole cells, at the
    right and below, and the cells that lie beyond the image are cut off, not squeezed into it."""
    return resize(x, [cells * stride for cells in x.shape[-2:]])[..., : size[0], : size[1]]


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
