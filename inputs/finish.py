"""What happens to a batch on the device: normalising, erasing, the spectrum crop, mixing."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from curriculum.operators import low_frequency_crop, low_pass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Finish:
    """Turns uint8 batches into what the model takes, on whatever device they lie.

    Order: normalise; under the operator ``fourier`` erase at the base size and then crop the spectrum, else erase at B;
    low-pass filter where the curriculum says so; then mixup or cutmix. Erasing (per-pixel noise) and mixing (one lambda
    and box per group) are timm's. They act on groups of consecutive images and are seeded by the group, so they depend
    neither on how many groups a forward pass takes nor on the state of any global generator, which is left as it was
    found.

    Args:
        num_classes: of the soft targets.
        mean, std: per channel, for pixels in [0, 1].
        operator: the curriculum's; only ``fourier`` matters here.
        base_size: the size of incoming images under ``fourier``.
        erasing: probability per image. mixup, cutmix: their alphas, 0 is off; both 0: no mixing, integer targets.
        mixup_prob: probability that a group is mixed. switch_prob: of cutmix, where both are on.
        smoothing: label smoothing of the soft targets. Integer targets are smoothed by the loss instead.
        channels_last: the memory format of the images that are returned.
    """

    def __init__(
        self,
        num_classes: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        operator: str = "lanczos",
        base_size: int = 224,
        erasing: float = 0.25,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mixup_prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.1,
        channels_last: bool = False,
    ):
        for setting, value in {
            "--reprob": erasing,
            "--mixup_prob": mixup_prob,
            "--mixup_switch_prob": switch_prob,
            "--smoothing": smoothing,
        }.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{setting} is {value}: it lies in [0, 1]")
        for setting, value in {"--mixup": mixup, "--cutmix": cutmix}.items():
            if value < 0:
                raise ValueError(f"{setting} is {value}: an alpha is at least 0 (0 is off)")
        self.fourier = operator == "fourier"
        self.base_size = base_size
        self.erasing = erasing
        self.mean = tuple(255 * value for value in mean)
        self.scale = tuple(1 / (255 * value) for value in std)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._constants = {}
        self.alphas = (mixup, cutmix)
        self._mixup = partial(
            Mixup,
            prob=mixup_prob,
            switch_prob=switch_prob,
            mode="batch",
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def train(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        size: int,
        seeds: Sequence[int],
        group_size: int,
        radius: float | None = None,
        mixing: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Finishes a training batch of ``len(seeds)`` groups.

        Args:
            images: uint8 (N, 3, S, S), S the base size under ``fourier``, else ``size``. targets: int64 (N,), or
                float (N, classes) of images with several labels, which are mixed as they are (no smoothing).
            size: input size B. seeds: one per group. group_size: images per group.
            radius: of the disc that is kept of the spectrum, cycles per image side; None keeps all of it.
            mixing: factor on both alphas; 0: no mixing.
        Returns:
            float32 images (N, 3, size, size), and soft targets (N, num_classes), or those given without mixing.
        Raises:
            ValueError: N is not len(seeds) * group_size, groups are odd while images are mixed, or S is not as said.
        """
        if len(images) != len(seeds) * group_size:
            raise ValueError(f"{len(images)} images are not {len(seeds)} groups of {group_size}")
        alphas = [mixing * alpha for alpha in self.alphas]
        mixup = self._mixup(*alphas) if any(alphas) else None
        if mixup and group_size % 2:
            raise ValueError(
                f"--micro_batch gives groups of {group_size} images: mixup and cutmix pair them, so it must be even "
                "(or set --mixup 0 --cutmix 0)"
            )
        self._check_size(images, size)
        images = self.normalise(images)
        with restored_generators(images.device):
            if self.erasing > 0:
                erase = RandomErasing(self.erasing, mode="pixel", max_count=1, device=images.device)
                for group, seed in zip(images.split(group_size), seeds):
                    random.seed(seed)
                    torch.manual_seed(seed)
                    erase(group)
            if self.fourier:
                images = self._crop_spectrum(images, size)
            if radius is not None:
                images = self._low_pass(images, radius)
            if mixup:
                mixed = []
                for group, labels, seed in zip(images.split(group_size), targets.split(group_size), seeds):
                    np.random.seed(seed % 2**32)
                    if labels.is_floating_point():
                        share = mixup._mix_batch(group)
                        mixed.append(share * labels + (1 - share) * labels.flip(0))
                    else:
                        mixed.append(mixup(group, labels)[1])  # the images are mixed in place
                targets = torch.cat(mixed)
        return images, targets

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of the normalization: float (N, 3, S, S) -> uint8, clipped, for people to look at."""
        shape = (1, -1, 1, 1)
        mean, scale = (images.new_tensor(values).view(shape) for values in (self.mean, self.scale))
        return (images / scale + mean).round().clamp(0, 255).to(torch.uint8)

    def evaluate(self, images: torch.Tensor, size: int, radius: float | None = None) -> torch.Tensor:
        """uint8 (N, 3, S, S) -> float32 (N, 3, size, size): normalised, reduced under ``fourier``, filtered.

        Args:
            radius: of the low-pass filter, as in :meth:`train`.

        Raises:
            ValueError: S is neither ``size`` nor, under ``fourier``, the base size.
        """
        if images.shape[-2:] != (size, size):
            self._check_size(images, size)
        images = self.normalise(images)
        images = self._crop_spectrum(images, size) if self.fourier else images
        return images if radius is None else self._low_pass(images, radius)

    def _crop_spectrum(self, images: torch.Tensor, size: int) -> torch.Tensor:
        return low_frequency_crop(images, size).contiguous(memory_format=self.memory_format)

    def _low_pass(self, images: torch.Tensor, radius: float) -> torch.Tensor:
        return low_pass(images, radius).contiguous(memory_format=self.memory_format)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, S, S) -> float32 of mean 0 and deviation 1 over the data set, per channel."""
        if images.device not in self._constants:
            shape = (1, 3, 1, 1)
            self._constants[images.device] = tuple(
                torch.tensor(values, dtype=torch.float32, device=images.device).view(shape)
                for values in (self.mean, self.scale)
            )
        mean, scale = self._constants[images.device]
        return images.to(torch.float32, memory_format=self.memory_format).sub_(mean).mul_(scale)

    def _check_size(self, images: torch.Tensor, size: int) -> None:
        expected = self.base_size if self.fourier else size
        if images.shape[-2:] != (expected, expected):
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]}: input size {size} needs {expected}x{expected} here"
            )


@contextmanager
def restored_generators(device: torch.device) -> Iterator[None]:
    """Puts back the states of Python's, numpy's and torch's global generators (the CPU's and ``device``'s).

    timm draws from these. `torch.manual_seed` also seeds other devices of this process, which a training process with
    one device does not use.
    """
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module = getattr(torch, device.type) if device.type != "cpu" else None
    on_device = None
    if device.type == "cuda":
        on_device = module.get_rng_state(device)
    elif module is not None and hasattr(module, "get_rng_state"):
        on_device = module.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if device.type == "cuda":
            module.set_rng_state(on_device, device)
        elif on_device is not None:
            module.set_rng_state(on_device)
