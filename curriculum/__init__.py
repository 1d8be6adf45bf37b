"""The method as a library: the plan, what an epoch shows of each image, and how a model follows the input size."""

from curriculum.augment import RandAugment
from curriculum.device_augment import DeviceRandAugment
from curriculum.durations import parse_duration
from curriculum.live import LiveCurriculum
from curriculum.operators import downsample, high_pass, low_frequency_crop, low_pass
from curriculum.plan import Plan, build_plan
from curriculum.presets import PRESETS, Curriculum, Segment
from curriculum.records import Pass, Stage
from curriculum.resize import check_input_sizes, set_input_size
from curriculum.sampler import CurriculumSampler, IndexSampler
from curriculum.summary import summarize, table

__version__ = "0.1.0"

Epoch = Pass  # its name in version 0.1.0

__all__ = [
    "PRESETS",
    "Curriculum",
    "CurriculumSampler",
    "DeviceRandAugment",
    "Epoch",
    "IndexSampler",
    "LiveCurriculum",
    "Pass",
    "Plan",
    "RandAugment",
    "Segment",
    "Stage",
    "build_plan",
    "check_input_sizes",
    "downsample",
    "high_pass",
    "low_frequency_crop",
    "low_pass",
    "parse_duration",
    "set_input_size",
    "summarize",
    "table",
]
