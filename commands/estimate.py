"""How long a run would take on this machine: a few steps and a few images are timed."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from config import Config
from curriculum import Plan
from datasets import Source
from engine import autocast
from inputs.decode import BadImage
from training.build import blank_targets, make_model, make_optimizer, make_task, make_train_set

TIMED = 16  # images of a timed step, and images loaded


def run_minutes(config: Config, plan: Plan, source: Source) -> float:
    """Minutes of training on one device, without evaluations.

    Timed at each of the plan's sizes: an optimizer step of at most TIMED images, and one loader worker's reading and
    augmenting of as many. Loading and training overlap, but where the network runs on the CPU they share its cores.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    device, workers = torch.device(chosen), max(1, min(config.num_workers, os.cpu_count() or 1))
    by_size = {}
    for size in {stage.input_size for stage in plan.stages}:
        training, loading = (
            step_seconds(config, size, len(source.classes), device),
            load_seconds(config, plan, source, size),
        )
        by_size[size] = training, loading / workers
    total = 0.0
    for stage in plan.stages:
        training, loading = by_size[stage.input_size]
        loading /= stage.replay
        each = training + loading if device.type == "cpu" else max(training, loading)
        total += each * stage.steps * stage.batch_size
    return total / 60


def step_seconds(config: Config, size: int, classes: int, device: torch.device) -> float:
    """Seconds that one image takes in training: the faster of two steps after a first one."""
    images = min(TIMED, config.batch_size)
    model = make_model(config, config.num_classes or classes, size).to(device).train()
    optimizer, task = make_optimizer(config, model), make_task(config, model, classes)
    batch = torch.zeros(images, 3, size, size, device=device)
    targets = blank_targets(config, images, classes).to(device)
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        with autocast(device, config.amp):
            loss = task.loss(model, batch, targets, [0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - started)
    return min(spent[1:]) / images


def load_seconds(config: Config, plan: Plan, source: Source, size: int) -> float:
    """Seconds in which one worker reads and augments an image, at the plan's highest magnitude."""
    data = make_train_set(replace(config, output_dir=None, max_bad=1.0), plan, source)  # nothing of this is a run's
    magnitude = None if plan.records[-1].magnitude is None else plan.max_magnitude
    places = np.random.default_rng(0).integers(len(source), size=TIMED).tolist()
    started = time.perf_counter()
    for seed, place in enumerate(places):
        with suppress(BadImage):
            data[place, size, magnitude, seed]
    return (time.perf_counter() - started) / TIMED
