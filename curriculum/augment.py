"""RandAugment whose magnitude is given per sample and whose randomness comes from the sample's own generator."""

import random
from collections.abc import Sequence

from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_choices

# An operation with its final numeric arguments: ("Rotate", (-21.3,)). Names are timm's.
Operation = tuple[str, tuple[float, ...]]

MAX_LEVEL = 10.0
TRANSLATE_FRACTION = 0.45
# What timm's tables do with a random sign, as (span at level 10, offset): arguments are offset +- span * level / 10.
# timm draws that sign from the global generator, so these operations cannot go through its functions; the others do.
SIGNED = {
    "Rotate": (30.0, 0.0),
    "ShearX": (0.3, 0.0),
    "ShearY": (0.3, 0.0),
    "TranslateXRel": (TRANSLATE_FRACTION, 0.0),
    "TranslateYRel": (TRANSLATE_FRACTION, 0.0),
    "ColorIncreasing": (0.9, 1.0),
    "ContrastIncreasing": (0.9, 1.0),
    "BrightnessIncreasing": (0.9, 1.0),
    "SharpnessIncreasing": (0.9, 1.0),
}
SMALLEST_ENHANCE = 0.1


class RandAugment:
    """RandAugment with timm's 15 "increasing" operations (Cubuk et al., 2020; ``rand-m{M}-mstd0.5-inc1`` in timm).

    ``num_ops`` operations are drawn with replacement; each is applied with probability ``prob`` at a level drawn from
    N(magnitude, magnitude_std), clipped to [0, 10]. Magnitude 0 is not "no augmentation": AutoContrast, Equalize and
    Invert have no level, and Posterize keeps only 4 bits at level 0. Geometric operations fill with ``fill`` (RGB,
    0-255; the default is the ImageNet mean) and interpolate bicubically.

    >>> from PIL import Image
    >>> augment = RandAugment()
    >>> augment(Image.new("RGB", (64, 64)), 4.5, random.Random(0)).size
    (64, 64)
    """

    def __init__(
        self,
        num_ops: int = 2,
        prob: float = 0.5,
        magnitude_std: float = 0.5,
        fill: Sequence[int] = (124, 116, 104),
    ):
        if num_ops < 0:
            raise ValueError(f"num_ops is {num_ops}: RandAugment needs a number of operations of at least 0")
        if not 0 <= prob <= 1:
            raise ValueError(f"prob is {prob}: a probability lies in [0, 1]")
        if magnitude_std < 0:
            raise ValueError(f"magnitude_std is {magnitude_std}: a standard deviation is at least 0")
        self.num_ops = num_ops
        self.prob = prob
        self.magnitude_std = magnitude_std
        self.fill = tuple(int(value) for value in fill)
        self.names = tuple(rand_augment_choices("inc1", increasing=True))

    def draw(self, magnitude: float, rng: random.Random) -> list[Operation]:
        """Returns the operations for one image, at most ``num_ops``; ``rng`` is the only source of randomness.

        Raises:
            ValueError: if ``magnitude`` lies outside [0, 10].
        """
        if not 0 <= magnitude <= MAX_LEVEL:
            raise ValueError(f"magnitude is {magnitude}: RandAugment's magnitude lies in [0, 10]")
        operations = []
        for _ in range(self.num_ops):
            name = rng.choice(self.names)
            if rng.random() < self.prob:
                level = rng.gauss(magnitude, self.magnitude_std)
                operations.append((name, arguments(name, min(max(level, 0.0), MAX_LEVEL), rng)))
        return operations

    def apply(self, image: Image.Image, operations: Sequence[Operation]) -> Image.Image:
        """Returns ``image`` (RGB) after ``operations``, which are timm's own functions on PIL images."""
        for name, args in operations:
            if name == "PosterizeIncreasing" and args[0] < 1:
                # Older Pillow makes the image black at 0 bits, Pillow 13 raises: about 1 image in 700 at magnitude 9.
                image = Image.new(image.mode, image.size)
            else:
                image = NAME_TO_OP[name](image, *args, fillcolor=self.fill, resample=Image.Resampling.BICUBIC)
        return image

    def __call__(self, image: Image.Image, magnitude: float, rng: random.Random) -> Image.Image:
        """Returns ``image`` (PIL, RGB) augmented at ``magnitude`` (0-10) with draws from ``rng``."""
        return self.apply(image, self.draw(magnitude, rng))


def arguments(name: str, level: float, rng: random.Random) -> tuple[float, ...]:
    """Returns the numeric arguments of timm's operation ``name`` at ``level`` in [0, 10]; ``rng`` draws the sign."""
    if name in SIGNED:
        span, offset = SIGNED[name]
        value = level / MAX_LEVEL * span
        value = offset + (-value if rng.random() < 0.5 else value)
        return (max(SMALLEST_ENHANCE, value) if offset else value,)
    to_arguments = LEVEL_TO_ARG[name]
    return () if to_arguments is None else tuple(to_arguments(level, {}))
