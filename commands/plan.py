"""``--plan``: what a run would do and cost, as a table, JSON or a picture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from config import Config, UsageError, as_usage
from config.checks import DENSE_TASKS
from config.files import read_text
from curriculum import CurriculumSampler, Plan, summarize, table
from datasets import build_source
from dense.cost import DETECTION, SEGMENTATION, count
from models.flops import count_flops
from training.advice import advice
from training.build import describe_replay, make_model, make_plan, make_sampler, number_of_classes
from training.report import plan_picture
from training.scenes import open_dense
from utils import write_text


def show_plan(config: Config, warnings: Sequence[str] = ()) -> int:
    """Prints the plan, and warnings about it on standard error. Needs data or --num_images."""
    num_images, classes = config.num_images, config.num_classes or 1000
    if num_images is None:
        source = open_dense(config, train=True) if config.task in DENSE_TASKS else build_source(config, train=True)
        num_images, classes = len(source), number_of_classes(config, source)
    plan = make_plan(config, num_images, classes)
    sampler = None
    if config.micro_batch != "auto":  # which is found when training starts
        devices = config.devices or int(os.environ.get("WORLD_SIZE", 1))
        sampler = make_sampler(config, plan, world_size=devices)
    speeds = load_speeds(config.speeds) if config.speeds else None
    summary = make_summary(config, plan, classes, sampler, speeds)
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    for line in (*warnings, *advice(config, plan)):
        print(line, file=sys.stderr)
    if config.plan == "picture":
        path = Path(config.output_dir or ".") / "plan.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, plan_picture(plan))
        print(path)
    else:
        lines = [table(summary, baseline(config, plan)), *describe_replay(config, plan)]
        print(json.dumps(summary) if config.plan == "json" else "\n".join(lines))
    return 0


def make_summary(
    config: Config,
    plan: Plan,
    classes: int,
    sampler: CurriculumSampler | None,
    images_per_s: dict[int, float] | None = None,
) -> dict[str, Any]:
    """What the plan does and costs, with the model's parameters and FLOPs counted without computing anything."""
    sizes = sorted({stage.input_size for stage in plan.stages} | {plan.base_size})
    if config.task in DENSE_TASKS:  # at the sizes of the papers' tables, and in proportion at those of other stages
        height, width = DETECTION if config.task == "detection" else SEGMENTATION
        cost = count(partial(make_model, config, classes, plan.base_size), height, width)
        flops, params = {size: cost.flops * (size / plan.base_size) ** 2 for size in sizes}, cost.params
    else:
        flops, params = count_flops(lambda size: make_model(config, classes, size), sizes)
    with as_usage():
        return summarize(plan, baseline(config, plan), flops, params, sampler, images_per_s)


def baseline(config: Config, plan: Plan) -> float:
    """Ordinary epochs that speed-ups compare with: the run's own, unless a recipe or the user says otherwise."""
    return config.baseline_epochs or plan.epochs


def load_speeds(path: str) -> dict[int, float]:
    """The file of measured speeds: images that one device trains per second, by input size. Raises UsageError."""
    try:
        speeds = json.loads(read_text(path, 1 << 20))["images_per_s"]
        return {int(size): float(speed) for size, speed in speeds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f'--speeds {path} must be a file like {{"images_per_s": {{"96": 2500.0, "224": 480.0}}}}'
        ) from None
