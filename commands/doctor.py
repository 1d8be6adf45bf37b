"""``--doctor true``: what a run's bottleneck will be at each input size, measured on this machine in under a minute."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commands import autobatch
from commands.autobatch import Blank
from config import Config
from config.checks import DENSE_TASKS
from curriculum import CurriculumSampler, Plan, Stage
from datasets import Source
from engine import train_epoch
from inputs.remote import RemoteShards
from inputs.shards import remote_parts
from inputs.transfer import to_device
from training.build import (
    evaluated_passes,
    make_batches,
    make_model,
    make_plan,
    make_sampler,
    make_train_set,
    make_training,
    number_of_classes,
    open_sources,
    place,
)
from training.scenes import blank_scenes
from utils import Topology, duration_text, write_text

SECONDS = 1.5  # spent on each measurement of the host; a training step gets as much after a first one
UNSTEADY = 3  # first steps of a loop, which wait for the loader to begin
IMAGES = 64  # different images that are read again and again: what lies in the page cache, as in later epochs
VARIANTS = {"--pipeline fast": {"pipeline": "fast"}, "--augment_on device": {"augment_on": "device"}}


def diagnose(config: Config, topology: Topology) -> int:
    """Measures this machine for the run that the settings describe; trains nothing, keeps nothing."""
    source, validation = open_sources(config)
    classes = number_of_classes(config, source)
    plan = make_plan(config, len(source), classes)
    build = partial(make_model, config, classes)
    if config.micro_batch == "auto":
        micro_batch, forward_batch = autobatch.find(config, plan, build, topology)
        config = replace(config, micro_batch=micro_batch, forward_batch=forward_batch)
    sampler = make_sampler(config, plan, topology.world_size, topology.rank)
    return examine(config, plan, sampler, source, len(validation), build, topology)


def examine(
    config: Config,
    plan: Plan,
    sampler: CurriculumSampler,
    source: Source,
    scored: int,
    build: Callable[[int], nn.Module],
    topology: Topology,
) -> int:
    """Measures, prints the table and the advice, and writes ``speeds.json`` (for ``--plan table --speeds``).

    Measured at each of the plan's sizes: a training step on this device, copying a batch to it, and what one loader
    worker brings (with the settings as they are; for a classifier, with the fast pipeline, and with RandAugment on the
    device, too). Where both share the cores, the run's own loop with its loader is timed besides, for the whole run.

    Args:
        scored: images of an evaluation.
        build: input size -> a fresh model.
    """
    cores, device = usable_cores(), topology.device
    rows = []
    for size in sorted({stage.input_size for stage in plan.stages}):
        stage = next(stage for stage in plan.stages if stage.input_size == size)
        record = next(record for record in plan if record.input_size == size)
        passes = sampler.forward_passes(record)
        images = max(map(len, passes)) * sampler.micro_batch
        forward, update = step_seconds(config, plan, build(size), images, sampler.micro_batch, topology)
        share = max(sampler.shares(record)) * sampler.micro_batch
        row = {
            "input_size": size,
            "replay": stage.replay,
            "step": share / (forward / images * share + update),
            "copy": copy_speed(config, plan, size, images, device),
        }
        if device.type == "cpu" and config.num_workers > 0:
            row["whole"] = loop_speed(config, plan, sampler, source, build(size), stage, topology)
        variants = {} if config.task in DENSE_TASKS else VARIANTS
        for name, change in {"as set": {}, **variants}.items():
            row[name] = loader_speed(replace(config, **change), plan, source, size)
        rows.append(row)
        print(describe(row, config.num_workers, cores), flush=True)
    for line in advice(rows, config.num_workers, cores):
        print(line)
    for shards in remote_parts(source):
        print(describe_cache(shards, network_speed(shards, len(source))))
    seconds = predict(rows, sampler, config, scored, topology, cores)
    hours = seconds * topology.world_size / 3600
    kind = "process" if device.type == "cpu" else "GPU"
    print(f"the whole run: {duration_text(seconds)}, {hours:,.2f} {kind}-hours, evaluations included")
    if config.output_dir:
        path = Path(config.output_dir) / "speeds.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"images_per_s": {str(row["input_size"]): row["step"] for row in rows}}) + "\n")
        print(f"measured speeds: {path} (--plan table --speeds {path} tells what other plans would take)")
    return 0


def predict(
    rows: list[dict[str, Any]], sampler: CurriculumSampler, config: Config, scored: int, topology: Topology, cores: int
) -> float:
    """Seconds of the whole run: of each stage what takes longest, or as it was measured, and the evaluations."""
    by_size = {row["input_size"]: row for row in rows}
    plan, on_cpu = sampler.plan, topology.device.type == "cpu"
    total = 0.0
    for stage in plan.stages:
        row = by_size[stage.input_size]
        images = stage.steps * max(sampler.shares(stage)) * sampler.micro_batch
        if row.get("whole"):
            total += images / row["whole"]
            continue
        total += busiest(images / row["step"], images / stage.replay / row["as set"], config.num_workers, cores, on_cpu)
    for index in evaluated_passes(plan, config.eval_interval):
        size = plan.base_size if plan.records[index].stage == len(plan.stages) - 1 else plan.records[index].input_size
        row, images = by_size[size], scored / topology.world_size * (1 + config.model_ema)
        # A forward pass takes a third of a training step.
        total += busiest(images / row["step"] / 3, images / row["as set"], config.num_workers, cores, on_cpu)
    return total


def busiest(training: float, loading: float, workers: int, cores: int, on_cpu: bool) -> float:
    """Seconds that ``training`` takes while ``workers`` share ``loading`` (seconds of one core) among them.

    Where training, too, computes on the ``cores``, both share them.
    """
    if workers == 0:
        return training + loading
    side_by_side = max(training, loading / min(workers, cores))
    if not on_cpu:
        return side_by_side
    return max(side_by_side, (training * torch.get_num_threads() + loading) / cores)


def workers_needed(row: dict[str, Any], variant: str = "as set") -> int:
    """Loader workers whose images keep one device busy."""
    return max(1, math.ceil(row["step"] / row["replay"] / row[variant]))


def describe(row: dict[str, Any], workers: int, cores: int) -> str:
    """One size: the speeds, and which of them holds back the others with ``workers`` workers on ``cores`` cores."""
    speeds = {
        "the training step": row["step"],
        "copying to the device": row["copy"],
        "loading": row["as set"] * max(1, min(workers, cores)) * row["replay"],
    }
    slowest = min(speeds, key=speeds.get)
    copied = "-" if row["copy"] == math.inf else f"{row['copy']:,.0f}"
    return (
        f"B {row['input_size']:>4}: training step {row['step']:,.0f} images/s, copy {copied}, one worker "
        f"{row['as set']:,.0f}; bottleneck with {workers} workers: {slowest}; workers needed: {workers_needed(row)}"
    )


def advice(rows: list[dict[str, Any]], workers: int, cores: int) -> list[str]:
    """What would help, in words; one line if nothing needs to."""
    needed = max(workers_needed(row) for row in rows)
    usable = max(1, min(workers, cores))
    if needed <= usable:
        return [
            f"loading keeps up at every size with --num_workers {workers}: the training step is what takes the time"
        ]
    lines = []
    if needed <= cores:
        return [f"set --num_workers {needed} (for each process): {cores} cores are there, and then loading keeps up"]
    lines.append(f"loading would need {needed} workers at its worst size; a process has {cores} cores here:")
    for variant in (name for name in VARIANTS if name in rows[0]):
        then = max(workers_needed(row, variant) for row in rows)
        lines.append(f"  {variant}: {then} workers ({'enough' if then <= cores else 'still too many'})")
    if len(lines) == 1:  # of scenes
        return [*lines, "  smaller images, or fewer of them at a time, take less"]
    factors = [max(1, math.ceil(row["step"] / (row["as set"] * cores))) for row in rows]
    lines.append(f"  --replay '{json.dumps(factors)}': {cores} workers are enough (a loaded image is used that often)")
    return lines


def step_seconds(
    config: Config, plan: Plan, model: nn.Module, images: int, group: int, topology: Topology
) -> tuple[float, float]:
    """Seconds of a forward pass of ``images`` blank images with its gradients, and of the optimizer's update."""
    blank, device = Blank(config, plan, model, images, group, topology), topology.device
    for _ in range(2):  # makes the optimizer's state, and lets libraries choose their algorithms
        blank.forward_and_backward()
        blank.update()
    forward = 1 / repeat(blank.forward_and_backward, device)
    return forward, 1 / repeat(lambda: (blank.forward_and_backward(), blank.update()), device) - forward


def loop_speed(
    config: Config,
    plan: Plan,
    sampler: CurriculumSampler,
    source: Source,
    model: nn.Module,
    stage: Stage,
    topology: Topology,
) -> float | None:
    """Images per second that this process trains on at a stage's beginning while its loader works beside it.

    Where both compute on the same cores, a layer that is shared by several threads waits for the slowest of them, which
    no sum of both tells. None: the stage has too few steps.
    """
    sampler = copy(sampler)
    sampler.start_step = stage.first_step
    model = place(model, topology.device, config.channels_last)
    training = make_training(config, plan, sampler, model, model.num_classes)
    training.step = stage.first_step
    batches = make_batches(config, plan, sampler, source, topology.device)
    ends: list[float] = []

    def after_step(lr: float, images: int) -> bool:
        ends.append(time.perf_counter())
        return len(ends) > 2 * UNSTEADY and ends[-1] - ends[UNSTEADY - 1] > 2 * SECONDS

    try:
        for record in plan:
            within = stage.first_step < record.first_step + record.steps <= stage.first_step + stage.steps
            if within and train_epoch(training, record, batches, after_step):
                break
    finally:
        batches.close()
    if len(ends) <= UNSTEADY:
        return None
    steps, seconds = len(ends) - UNSTEADY, ends[-1] - ends[UNSTEADY - 1]
    return steps * max(sampler.shares(stage)) * sampler.micro_batch / seconds


def copy_speed(config: Config, plan: Plan, size: int, images: int, device: torch.device) -> float:
    """Images per second from main memory to the device; infinite on the CPU, where nothing is copied."""
    if device.type == "cpu":
        return math.inf
    if config.task in DENSE_TASKS:
        batch, _ = blank_scenes(config, plan, images, size)
    else:
        side = plan.base_size if config.augment_on == "device" else plan.loaded_size(size)
        batch = torch.zeros(images, 3, side, side, dtype=torch.uint8)
    batch = batch.pin_memory() if device.type == "cuda" else batch
    return images * repeat(lambda: to_device(batch, device), device)


def loader_speed(config: Config, plan: Plan, source: Source, size: int) -> float:
    """Images per second that one worker reads, decodes and augments at the highest magnitude of the plan's stages."""
    data = make_train_set(config, plan, source)
    magnitude = None if plan.records[-1].magnitude is None else plan.max_magnitude
    rng = random.Random(0)
    indices = [rng.randrange(len(source)) for _ in range(IMAGES)]
    samples = iter([(index, size, magnitude, seed) for seed in range(100_000 // IMAGES) for index in indices])
    for index in indices:  # into the page cache
        source.read(index)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        return repeat(lambda: data[next(samples)], torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


def network_speed(shards: RemoteShards, images: int) -> float:
    """Images per second that one worker reads at a URL, by ranges of the shards' mean size of an image."""
    rng = random.Random(0)
    mean = max(1, sum(size for size, _ in shards.stamps) // images)

    def fetch() -> None:
        k = rng.randrange(len(shards.names))
        start = rng.randrange(max(1, shards.stamps[k][0] - mean))
        shards.fetch(k, start, min(start + mean, shards.stamps[k][0]))

    fetch()  # connects
    return repeat(fetch, torch.device("cpu"))


def describe_cache(shards: RemoteShards, speed: float) -> str:
    """One line: what of the shards at a URL the cache can hold and holds, and what that means for every pass."""
    sizes = [size for size, _ in shards.stamps]
    total = sum(sizes)
    needed = f"--cache_size {math.ceil(1.1 * total / 1e9)}"
    start = (
        f"{len(sizes)} shards of {total / 1e9:,.2f} GB at {shards.root}, read there at {speed:,.0f} images/s a worker"
    )
    if shards.cache is None:
        return f"{start}, in every pass: set --cache_dir (a local folder) and {needed}, and only the first pass is"
    held = sum(size for size, here in zip(sizes, shards.cache.held(shards.keys)) if here)
    limit, free = shards.cache.limit, shutil.disk_usage(shards.cache.folder).free
    if min(limit, free + held) < total:
        share = min(limit, free + held) / total
        short = f"its disk has room for {share:.0%} of them" if free + held < limit else f"holds {share:.0%} of them"
        mend = "use a larger disk" if free + held < min(limit, total) else f"set {needed}"
        return f"{start}: the cache does not suffice, {short}, and the rest is read there in every pass; {mend}"
    return f"{start}: the cache suffices ({held / total:.0%} of them are in it), so that only the first pass is"


def repeat(action: Callable[[], Any], device: torch.device) -> float:
    """Times per second that ``action`` can be done, over SECONDS (at least once).

    The host waits for an accelerator at the end alone, as in a run: else its time to issue the work would count, too.
    """
    finish = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize
    finish()
    done, more, started = 0, 1, time.perf_counter()
    while True:
        for _ in range(more):
            action()
        finish()
        done, seconds = done + more, time.perf_counter() - started
        if seconds >= SECONDS:
            return done / seconds
        more = min(done, math.ceil(done * (SECONDS - seconds) / seconds))  # to the end at this speed, at most as many


def usable_cores() -> int:
    """Processor cores of this process's share of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
