"""The loops: train one pass, evaluate. They take what they need and know nothing of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from curriculum import CurriculumSampler, Pass, Plan
from curriculum.sampler import FORWARD, GROUP, derive_seed
from inputs.finish import Finish
from inputs.transfer import SideStream, to_device
from utils import all_sum, no_sync, unwrap, world_size

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Task(Protocol):
    """What the engine's loops ask of a task. ``model`` is as called, under autocast; images are finished."""

    metrics: tuple[str, ...]  # scores of an evaluation, for the log
    score: str | None  # the metric whose largest value is the best; None: none says which weights are

    def loss(self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """Mean loss of a batch of ``len(seeds)`` groups; beyond the model's own, all randomness is the seeds'."""

    def begin(self, data: Dataset, device: torch.device) -> Scores:
        """What collects an evaluation's results on this data set."""

    def findings(self, scores: dict[str, Any], source: Any) -> dict[str, Any] | None:
        """What the report shows of these scores of a data set, as plain types; None: nothing."""

    def describe(self, result: dict[str, Any]) -> str:
        """An evaluation's log record in words."""

    def answers(
        self, model: nn.Module, data: Dataset, places: Sequence[int], finish: Finish, device: torch.device, size: int
    ) -> torch.Tensor | None:
        """uint8 (3, H, W): how the model answers the images of these places, for people to look at; None: nothing."""


class Scores(Protocol):
    """What an evaluation comes to: each process adds its batches, and all of them get the scores of all images."""

    def add(self, model: nn.Module, images: torch.Tensor, targets: Any, indices: torch.Tensor) -> None:
        """Takes a batch, under autocast; ``indices`` are the images' places in the data set."""

    def scores(self) -> dict[str, Any]:
        """The task's metrics, whatever else it gives, and ``images``, the number of distinct images scored.

        Raises:
            RuntimeError: an image of the data set was skipped or scored twice.
        """


class PerImage:
    """Scores made of a few numbers for each image.

    Args:
        measured: their names. count: images of the data set.
        measure: (model, images, targets, indices) -> (len(measured), N).
        summarize: from the numbers of all images, by name, to the scores.
    """

    def __init__(
        self,
        measured: Sequence[str],
        measure: Callable[..., torch.Tensor],
        summarize: Callable[[dict[str, torch.Tensor]], dict[str, Any]],
        count: int,
        device: torch.device,
    ) -> None:
        self.measured, self.measure, self.summarize = measured, measure, summarize
        # Of each image, in its place: how often it was scored, and what was measured.
        self.table = torch.zeros(1 + len(measured), count, device=device)

    def add(self, model: nn.Module, images: torch.Tensor, targets: Any, indices: torch.Tensor) -> None:
        measures = self.measure(model, images, targets, indices)
        indices = to_device(indices, self.table.device)
        self.table[0, indices] += 1
        self.table[1:, indices] = measures.float()

    def scores(self) -> dict[str, Any]:
        scored, *columns = all_sum(self.table) if self.table.device.type == "mps" else all_sum(self.table).double()
        if not bool((scored == 1).all()):
            raise RuntimeError(f"evaluation scored {int(scored.sum())} images, but the data set has {len(scored)}")
        return {**self.summarize(dict(zip(self.measured, columns))), "images": len(scored)}


class Meter(Protocol):
    """What the training loop tells of every forward pass and optimizer step; nothing here waits for the device."""

    def add(self, loss: torch.Tensor, images: int, step: int) -> None:
        """The mean loss of ``images`` images of optimizer step ``step``."""

    def add_gradient(self, norm: torch.Tensor, step: int) -> None:
        """The gradient's norm at optimizer step ``step``, the same on all processes."""


@dataclass
class Training:
    """What an optimizer step works on. ``model`` is as called (wrapped), ``step`` the optimizer steps done."""

    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    finish: Finish
    plan: Plan
    sampler: CurriculumSampler
    device: torch.device
    task: Task
    loss: Meter
    amp: str = "none"
    clip_grad: float | None = None
    skip_nonfinite: bool = False  # skip optimizer steps whose gradient is not finite; needs an enabled scaler
    step: int = 0
    watch: Callable[[torch.Tensor], None] | None = None  # is shown the images of a forward pass as the model sees them
    side: SideStream = field(init=False)  # prepares the next batch

    def __post_init__(self) -> None:
        self.side = SideStream(self.device)


def train_epoch(training: Training, epoch: Pass, batches: Iterator, after_step: Callable[[float, int], bool]) -> bool:
    """Trains the optimizer steps of ``epoch`` that are still to do.

    Args:
        training: advanced in place.
        epoch: a record of the plan.
        batches: pairs of uint8 images (N, 3, S, S) and targets (N,), of several labels (N, classes), one per forward
            pass, in the sampler's order.
        after_step: called with (learning rate, images of this step) after every optimizer step; True stops the epoch.

    Returns:
        Whether ``after_step`` stopped it.
    """
    t = training
    t.model.train()
    passes = t.sampler.forward_passes(epoch)
    share = epoch.batch_size / t.sampler.world_size  # gradients are averaged over the processes, whatever each has done
    for step in range(t.step, epoch.first_step + epoch.steps):
        lr = t.plan.lr_at(step)
        set_hyperparameters(t.optimizer, lr, t.plan.weight_decay_at(step))
        buffers = [(buffer, buffer.clone()) for buffer in unwrap(t.model).buffers()] if t.skip_nonfinite else []
        for groups in passes:
            seeds = [derive_seed(t.sampler.seed, GROUP, step, group) for group in groups]
            images, targets = t.side.prepare(partial(finished, t, batches, epoch, seeds))
            if t.watch is not None:
                t.watch(images)
            with nullcontext() if groups is passes[-1] else no_sync(t.model):
                loss = forward_loss(t, images, targets, step, groups, seeds)
                t.scaler.scale(loss * (len(images) / share)).backward()
            t.loss.add(loss, len(images), step)
        t.scaler.unscale_(t.optimizer)  # does nothing where there is no scaler
        norm = gradient_norm(t.model, t.clip_grad)
        t.loss.add_gradient(norm, step)
        restore(buffers, norm)
        t.scaler.step(t.optimizer)
        t.scaler.update(1.0 if t.amp != "fp16" and t.skip_nonfinite else None)
        t.optimizer.zero_grad(set_to_none=True)
        if t.ema is not None:
            t.ema.update(unwrap(t.model))
        t.step = step + 1
        if after_step(lr, epoch.batch_size):
            return True
    return False


def gradient_norm(model: nn.Module, clip: float | None) -> torch.Tensor:
    """The gradient's global norm, before it is scaled down to ``clip``, if that is less."""
    with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if clip is not None:
        return nn.utils.clip_grad_norm_(with_gradient, clip)
    return total_norm([parameter.grad for parameter in with_gradient])


@torch.no_grad()
def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all numbers of these tensors, which lie on one device: each is read once, in a few kernels."""
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]))


def finished(t: Training, batches: Iterator, epoch: Pass, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next forward pass's images and targets as the model takes them; ``seeds`` are its groups'."""
    images, targets = (to_device(tensor, t.device) for tensor in next(batches))
    return t.finish.train(images, targets, epoch.input_size, seeds, t.sampler.micro_batch, epoch.radius, epoch.mixing)


def forward_loss(
    t: Training, images: torch.Tensor, targets: torch.Tensor, step: int, groups: range, seeds: list[int]
) -> torch.Tensor:
    """Mean loss of one forward pass over ``groups`` of ``step``; (run seed, step, group) seed all its randomness."""
    seed_generators(t.device, derive_seed(t.sampler.seed, FORWARD, step, groups.start))  # drop path and dropout
    with autocast(t.device, t.amp):
        return t.task.loss(t.model, images, targets, seeds)


def seed_generators(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for the CPU and this device alone, in microseconds: that one also looks for other devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def restore(buffers: list[tuple[torch.Tensor, torch.Tensor]], norm: torch.Tensor) -> None:
    """Puts back (buffer, its content before the step) where the gradient's norm is not finite: BatchNorm's statistics
    would else keep what the optimizer skips."""
    finite = torch.isfinite(norm)
    for buffer, before in buffers:
        buffer.copy_(torch.where(finite, buffer, before))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    finish: Finish,
    size: int,
    device: torch.device,
    task: Task,
    amp: str = "none",
    stop: Callable[[], bool | None] = lambda: False,
    radius: float | None = None,
) -> dict[str, Any] | None:
    """Scores every image of ``loader``'s data set once, over all processes.

    Args:
        model: unwrapped, at input size ``size``.
        loader: batches of uint8 images (N, 3, S, S), targets and indices (N,): this process's share.
        task: what to measure.
        stop: called equally often by every process, after each batch; True on all of them ends the evaluation.
        radius: of the low-pass filter that the images go through, None for none.

    Returns:
        The task's scores, and ``images``, the number of distinct images scored. None if it was stopped.

    Raises:
        RuntimeError: an image of the data set was skipped or scored twice.
    """
    model.eval()
    scores = task.begin(loader.dataset, device)
    with many_shapes(getattr(model, "any_size", False)):
        for images, targets, indices in loader:
            images, targets = to_device(images, device), to_device(targets, device)
            with autocast(device, amp):
                scores.add(model, finish.evaluate(images, size, radius), targets, indices)
            if stop():
                return None
    most = -(-len(loader.dataset) // (world_size() * loader.batch_size))  # batches of the process that has most
    if any(stop() for _ in range(most - len(loader))):
        return None
    return scores.scores()


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets what the plan says for this step; groups keep their ``lr_scale``, and those without decay have none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay


@contextmanager
def many_shapes(many: bool = True) -> Iterator[None]:
    """Keeps cuDNN from trying its algorithms at every new shape, which takes seconds, where ``many`` sizes come."""
    tries = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = tries and not many
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tries


def autocast(device: torch.device, amp: str):
    dtype = AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
