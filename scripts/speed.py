"""What bench.py train and gpu_check.py measure with: the project's loop, a bare one beside it, and whole plans."""

import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config
from curriculum import Plan, set_input_size
from engine import Training, autocast, train_epoch, unwrap
from inputs.transfer import to_device
from models.flops import count_flops
from training.build import make_batches, make_model, make_plan, make_sampler, make_training, place
from utils import Topology, release_memory, wrap

CLASSES = 100
WARM_UP = 2  # repetitions that are not counted: libraries choose their algorithms


class Photos:
    """A data set in memory: a few smooth random pictures as JPEG files, of the size of ImageNet's, again and again."""

    def __init__(self, count: int, sides: tuple[int, int] = (375, 500), different: int = 64) -> None:
        rng = np.random.default_rng(0)
        self.classes, self.count, self.files = [str(k) for k in range(CLASSES)], count, []
        for _ in range(different):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize(sides[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        return self.files[index % len(self.files)]

    def label(self, index: int) -> int:
        return index % CLASSES

    def name(self, index: int) -> str:
        return f"{index}.jpg"


def synthetic(plan: Plan, training: Training) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Uint8 batches that lie in (page-locked) memory, so that loading costs nothing, for all passes of the plan."""
    generator, pin = torch.Generator().manual_seed(0), training.device.type == "cuda"
    made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # once: random numbers take longer than a step
    for record in plan:
        passes, side = training.sampler.forward_passes(record), plan.loaded_size(record.input_size)
        for _ in range(record.steps):
            for groups in passes:
                images = len(groups) * training.sampler.micro_batch
                if (images, side) not in made:
                    pixels = torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
                    labels = torch.randint(0, CLASSES, (images,), generator=generator)
                    made[images, side] = (pixels.pin_memory(), labels.pin_memory()) if pin else (pixels, labels)
                yield made[images, side]


def build(config: Config, num_images: int, device: torch.device) -> tuple[Plan, Training]:
    """The plan and all that trains by it, at the size of its first stage; compiled if the settings say so."""
    plan = make_plan(config, num_images, CLASSES)
    sampler = make_sampler(config, plan, 1)
    model = place(make_model(config, CLASSES, plan.records[0].input_size), device, config.channels_last)
    training = make_training(config, plan, sampler, model, CLASSES)
    training.model = wrap(model, Topology(0, 1, device), config.compile)
    return plan, training


def run_plan(config: Config, num_images: int, device: torch.device, source: Photos | None = None) -> dict:
    """Trains a whole plan; with ``source`` its images are loaded.

    Returns:
        ``seconds`` in all, ``rates`` (images/s) by input size, ``switches``: seconds of each change of size with the
        first step after it, for which libraries choose their algorithms; on CUDA ``spare`` by input size: the most
        memory that was reserved over the most that was in use.
    """
    plan, training = build(config, num_images, device)
    batches = make_batches(config, plan, training.sampler, source, device) if source else synthetic(plan, training)
    spent: dict[int, list[float]] = {}
    spare: dict[int, float] = {}
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    switches, began = [], clock(device)
    for record in plan:
        started = clock(device)
        model = unwrap(training.model)
        switched = model.input_size != record.input_size
        if switched:
            training.model = None
            set_input_size(model, record.input_size, training.optimizer, training.ema)
            release_memory(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            training.model = wrap(model, Topology(0, 1, device), config.compile)
            train_epoch(training, record, batches, lambda lr, images: True)
            switches.append(clock(device) - started)
        train_epoch(training, record, batches, lambda lr, images: False)
        images, seconds = spent.get(record.input_size, (0, 0.0))
        spent[record.input_size] = (images + record.steps * record.batch_size, seconds + clock(device) - started)
        if device.type == "cuda":
            spare[record.input_size] = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()
    seconds = clock(device) - began
    batches.close()
    rates = {size: images / taken for size, (images, taken) in spent.items()}
    return {"seconds": seconds, "rates": rates, "switches": switches, "spare": spare}


def compute_of(config: Config, num_images: int) -> float:
    """FLOPs of the forward passes of a whole plan."""
    plan = make_plan(config, num_images, CLASSES)
    flops, _ = count_flops(lambda size: make_model(config, CLASSES, size), sorted({s.input_size for s in plan.stages}))
    return sum(stage.steps * stage.batch_size * flops[stage.input_size] for stage in plan.stages)


def our_loop(config: Config, device: torch.device, steps: int, calls: int) -> Callable[[], None]:
    """A pass of ``steps`` optimizer steps of the project's loop on uint8 images; it can be called ``calls`` times."""
    config = replace(config, curriculum="none", epochs=calls, warmup_epochs=0, schedule="cosine", lr_steps=None)
    plan, training = build(config, config.batch_size * steps, device)
    batches, records = synthetic(plan, training), iter(plan)
    return lambda: train_epoch(training, next(records), batches, lambda lr, images: False)


def bare_loop(config: Config, device: torch.device, steps: int) -> Callable[[], None]:
    """As many steps of nothing but model, loss and optimizer, on float images that lie on the device."""
    config = replace(config, curriculum="none", warmup_epochs=0, schedule="cosine", lr_steps=None, model_ema=False)
    plan, training = build(config, config.batch_size, device)
    model, group = training.model.train(), training.sampler.micro_batch
    passes = training.sampler.forward_passes(plan.records[0])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, targets = (to_device(tensor, device) for tensor in next(synthetic(plan, training)))
    images, targets = training.finish.train(images, targets, plan.base_size, [0] * (len(images) // group), group)

    def run() -> None:
        for _ in range(steps):
            for _ in passes:
                with autocast(device, config.amp):
                    loss = nn.functional.cross_entropy(model(images).float(), targets)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def loop_and_bare(config: Config, size: int, device: torch.device, steps: int, repetitions: int) -> tuple[float, float]:
    """Images/s of the project's loop on synthetic uint8 images, and of a bare loop on float ones on the device."""
    config = replace(config, input_size=size)
    loops = {"ours": our_loop(config, device, steps, repetitions + WARM_UP), "bare": bare_loop(config, device, steps)}
    seconds = in_turn(loops, repetitions, device)
    return tuple(config.batch_size * steps / statistics.median(seconds[name]) for name in loops)


def in_turn(
    variants: dict[str, Callable[[], object]], repetitions: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each variant, run one after the other in each repetition, so that a disturbance meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + WARM_UP):
        for name, variant in variants.items():
            start = clock(device)
            variant()
            if repetition >= WARM_UP:
                seconds[name].append(clock(device) - start)
    return seconds


def clock(device: torch.device | None = None) -> float:
    """Seconds, once the device has done what it was given."""
    if device is not None and device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()
