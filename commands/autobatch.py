"""``--micro_batch auto``: the largest groups and forward passes that a device's memory holds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import Config, UsageError
from config.checks import DENSE_TASKS
from curriculum import CurriculumSampler, Plan, RandAugment
from curriculum.device_augment import encode
from curriculum.sampler import group_sizes
from engine import finished, forward_loss
from inputs.transfer import to_device
from training.build import blank_targets, make_augment, make_training, mixes, place
from training.scenes import blank_scenes
from utils import Topology, all_min, most_processes

CUDA_SHARE = 0.92  # of a GPU's memory; the rest is for fragments and what grows in a long run
HOST_SHARE = 0.5  # of the free main memory, which loader workers and the page cache want too

Call = Callable[[nn.Module, int], Any]


def find(
    config: Config, plan: Plan, build: Callable[[int], nn.Module], topology: Topology
) -> tuple[int, dict[int, int]]:
    """Groups (``--micro_batch``) at the base size, and forward passes (``--forward_batch``) at every size of the plan.

    On CUDA every size is tried with a real forward and backward pass and an optimizer step; elsewhere it is computed
    from what a forward pass of two images keeps for its backward pass. All processes agree on what fits each of them.

    Args:
        build: input size -> a fresh model.

    Raises:
        UsageError: not even the smallest group fits.
    """
    if topology.device.type == "cuda":
        fits = Trial(config, plan, build, topology).fits
    else:
        call = dense_call(config, plan) if config.task in DENSE_TASKS else call_classifier
        fits = Reckoning(build, topology, call).fits
    # Mixing pairs images; UperNet's BatchNorm needs two.
    return search(plan, most_processes(topology), mixes(config) or config.task == "segmentation", fits)


def search(plan: Plan, world_size: int, even: bool, fits: Callable[[int, int], bool]) -> tuple[int, dict[int, int]]:
    """The search itself; ``fits(input_size, images)`` says whether a device holds a forward pass of so many."""
    groups = group_sizes(plan.batch_size, world_size, 2 if even else 1)
    micro_batch = next((n for n in groups if fits(plan.base_size, n)), None)
    if micro_batch is None:
        raise UsageError(
            f"--micro_batch auto: not even {groups[-1] if groups else 2} images of {plan.base_size} pixels fit on a "
            "device; choose a smaller model or smaller images"
        )
    forward_batch = {plan.base_size: micro_batch}
    for stage in plan.stages:
        if stage.input_size == plan.base_size:
            continue
        count = -(-stage.batch_size // micro_batch // world_size)  # groups that a device has to take
        # As few passes as possible, each as even as can be.
        sizes = sorted({-(-count // passes) for passes in range(1, count + 1)}, reverse=True)
        most = next((n for n in sizes if n == 1 or fits(stage.input_size, n * micro_batch)), 1)
        forward_batch[stage.input_size] = most * micro_batch
    return micro_batch, forward_batch


class Trial:
    """Asks the GPU: trains two steps on blank images with a model of its own, and sees whether memory lasts."""

    def __init__(self, config: Config, plan: Plan, build: Callable[[int], nn.Module], topology: Topology) -> None:
        self.config, self.plan, self.build, self.topology = config, plan, build, topology

    def fits(self, size: int, images: int) -> bool:
        device = self.topology.device
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(CUDA_SHARE, device)
        try:
            self.train(size, images)
            held = True
        except RuntimeError as error:
            if not ran_out(error):
                raise
            held = False
        finally:
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, device)
                torch.cuda.empty_cache()
        return bool(all_min(torch.tensor(float(held), device=device)))

    def train(self, size: int, images: int) -> None:
        """The run's own forward pass, loss and optimizer, twice: the optimizer's moments are made in the first step."""
        blank = Blank(self.config, self.plan, self.build(size), images, images, self.topology)
        for _ in range(2):
            blank.forward_and_backward()
            blank.update()
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)  # an error of memory may come late


def ran_out(error: RuntimeError) -> bool:
    """Whether an error is a lack of device memory, be it PyTorch's, cuDNN's or cuBLAS's way to say so."""
    libraries = r"out of memory|CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR)|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(libraries, str(error)))


class Blank:
    """Trains on one blank, page-locked batch as the run would: in its groups, augmented and finished where it does it.

    Args:
        model: at its input size; it is used up.
        images: of a forward pass. group: images per group.
    """

    def __init__(
        self, config: Config, plan: Plan, model: nn.Module, images: int, group: int, topology: Topology
    ) -> None:
        self.device, self.several = topology.device, topology.world_size > 1
        self.record = replace(plan.records[0], input_size=model.input_size)
        sampler = CurriculumSampler(plan)
        sampler.micro_batch = group
        model = place(model, self.device, config.channels_last)
        self.training = make_training(config, plan, sampler, model.train(), model.num_classes)
        self.augment = make_augment(config, plan)
        self.groups = range(images // group)
        if config.task in DENSE_TASKS:
            self.batch = blank_scenes(config, plan, images, model.input_size)
        else:
            side = plan.loaded_size(model.input_size)
            if self.augment is not None and config.pipeline == "exact":
                side = plan.base_size
            targets = blank_targets(config, images, model.num_classes)
            self.batch = torch.zeros(images, 3, side, side, dtype=torch.uint8), targets
        if self.device.type == "cuda":
            self.batch = tuple(tensor.pin_memory() for tensor in self.batch)
        slots = RandAugment().num_ops
        costly = encode(True, [("Rotate", (30.0,))] * slots, slots)
        self.choices = torch.from_numpy(costly).expand(images, -1)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The blank batch, as the loader brings it."""
        images, targets = self.batch
        if self.augment is not None:
            images = self.augment(to_device(images, self.device), self.choices, self.record.input_size)
        yield images, targets

    def forward_and_backward(self) -> None:
        """One forward pass and its gradients."""
        t, seeds = self.training, [*self.groups]
        images, targets = t.side.prepare(partial(finished, t, self.batches(), self.record, seeds))
        t.scaler.scale(forward_loss(t, images, targets, 0, self.groups, seeds)).backward()

    def update(self) -> None:
        """What ends an optimizer step."""
        t = self.training
        t.scaler.step(t.optimizer)
        t.scaler.update()
        # Data-parallel training keeps its buckets, which are the gradients, through the next forward pass.
        t.optimizer.zero_grad(set_to_none=not self.several)
        if t.ema is not None:
            t.ema.update(t.model)


def call_classifier(model: nn.Module, images: int) -> torch.Tensor:
    return model(torch.zeros(images, 3, model.input_size, model.input_size))


def dense_call(config: Config, plan: Plan) -> Callable[[nn.Module, int], list[torch.Tensor]]:
    """As :func:`call_classifier`, of a detector or segmenter: its losses of the largest scenes."""

    def call(model: nn.Module, images: int) -> list[torch.Tensor]:
        blank, scenes = blank_scenes(config, plan, images, model.input_size)
        return list(model(blank.float(), scenes.sizes, scenes.targets).values())

    return call


class Reckoning:
    """Where running out of memory cannot be survived: parameters four times over, and what each image keeps.

    Args:
        build: input size -> a fresh model. call: see :func:`kept_bytes`.
    """

    def __init__(self, build: Callable[[int], nn.Module], topology: Topology, call: Call = call_classifier) -> None:
        self.build, self.topology, self.call = build, topology, call
        self.free = free_memory(topology.device) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.known: dict[int, tuple[float, float]] = {}

    def fits(self, size: int, images: int) -> bool:
        if size not in self.known:
            self.known[size] = kept_bytes(self.build(size), self.call)
        fixed, per_image = self.known[size]
        held = fixed + images * per_image <= self.free
        return bool(all_min(torch.tensor(float(held), device=self.topology.device)))


def kept_bytes(model: nn.Module, call: Call = call_classifier, images: int = 2) -> tuple[float, float]:
    """Bytes that training holds of the model itself, and for each image (what autograd saves).

    Args:
        call: runs a model on so many blank images, and returns what gradients are taken of.
    """
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(model.train(), images)
    del result
    torch.set_rng_state(state)
    fixed = 4.0 * sum(parameter.nbytes for parameter in model.parameters())  # with gradients and Adam's moments
    return fixed, sum(seen.values()) / images


def free_memory(device: torch.device) -> float:
    """Bytes that may be used: a share of the free main memory, or what MPS recommends."""
    if device.type == "mps":
        return HOST_SHARE * torch.mps.recommended_max_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return HOST_SHARE * available
