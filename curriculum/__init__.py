"""The method as a library: the plan, what an epoch shows of each image, and how a model follows the input size."""

from curriculum.augment import RandAugment
from curriculum.operators import downsample, high_pass, low_frequency_crop, low_pass

__all__ = [
    "RandAugment",
    "downsample",
    "high_pass",
    "low_frequency_crop",
    "low_pass",
]
