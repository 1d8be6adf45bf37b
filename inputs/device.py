"""The loader's share of RandAugment on the device: workers decode, crop and draw, `curriculum.device_augment` does the
rest."""

import torch
from PIL import Image

from curriculum.device_augment import encode
from inputs.transforms import TrainTransform, as_batch


class DeviceTransform:
    """The loader's share of ``transform``: called like it, returns (uint8 (3, S, S), float64 choices)."""

    def __init__(self, transform: TrainTransform):
        self.transform = transform
        self.slots = 3 * bool(transform.color_jitter) + (transform.randaugment.num_ops if transform.randaugment else 0)

    def __call__(
        self, data: bytes | Image.Image, size: int, magnitude: float | None, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, flip, operations = self.transform.crop(data, size, magnitude, seed)
        return as_batch(pixels)[0], torch.from_numpy(encode(flip, operations, self.slots))
