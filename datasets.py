"""Data sets and loaders: what a run asks for. What they are made of is in inputs/."""

from __future__ import annotations

import copy
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from functools import cache
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from config import Config, as_usage
from config.checks import parse_share
from config.urls import is_url
from curriculum import CurriculumSampler
from curriculum.device_augment import DeviceAugment
from curriculum.sampler import REPLAY, derive_seed
from inputs.bad_files import BadFiles, load
from inputs.device import DeviceTransform
from inputs.published import PUBLISHED, open_published
from inputs.readers import open_source
from inputs.replay import ReplayBuffer, refill_from, replay_capacity
from inputs.splits import find_split
from inputs.summary import describe
from inputs.tables import read_table
from inputs.transfer import to_device
from inputs.transforms import EvalTransform, TrainTransform, collate
from inputs.views import Source, hold_out, in_order, map_classes, targets
from utils import STOP_SIGNALS

PREFETCH = 2e9  # bytes of batches that a process's loader workers hold ready, unless one batch of each is more


def build_source(config: Config, train: bool, classes: Sequence[str] | None = None) -> Source:
    """The training or the validation set that the settings name.

    Args:
        classes: order of the classes, where the data set has exactly these: a checkpoint's.

    Raises:
        UsageError: data that is not there, or a validation class that is not in training; names the setting.
    """
    with as_usage():
        return _build_source(config, train, classes)


def _build_source(config: Config, train: bool, classes: Sequence[str] | None) -> Source:
    hub = config.data_set.startswith("hfds/")
    if config.data_path is None and not hub:
        raise ValueError("--data_path is not set: name the folder that holds the data set")
    if config.data_path is not None and hub:
        raise ValueError(
            f"--data_path {config.data_path} has no use with --data_set {config.data_set}, which is read from where it "
            "lies; --cache_dir keeps what is read"
        )
    if holds_out(config):
        whole = _open(config, config.train_split, "train")
        share = None if config.val_share is None else parse_share(config.val_share)
        source = hold_out(whole, config.val_per_class, share)[0 if train else 1]
    elif train:
        source = _open(config, config.train_split, "train")
    else:
        # Labels are those of training, so validation may lack a class but not bring one of its own.
        alone = config.data_set in PUBLISHED
        if config.data_set == "folder" and config.labels is None and not is_url(config.data_path):
            folders = [find_split(config.data_path, name, "train") for name in config.train_split.split("+")]
            alone = None in folders
        known = None if alone else _open(config, config.train_split, "train").classes
        source = _open(config, config.val_split, "val", known)
    source = map_classes(source, config.class_map) if config.class_map else source
    if not len(source):
        part = "training" if train else "validation"
        raise ValueError(f"--class_map {config.class_map}: the classes that it lists have no {part} images")
    return in_order(source, classes)


def describe_data(config: Config, sources: tuple[Source, Source]) -> list[str]:
    """What was read, in one line, and a warning if validation images cannot be used."""
    if holds_out(config):
        amount = f"--val_share {config.val_share}" if config.val_share else f"--val_per_class {config.val_per_class}"
        how = f"held out by a hash of their paths, {amount}"
    else:
        how = f"--val_split {config.val_split}"
    return [describe(*sources, how), *dropped_line(sources[1])]


def dropped_line(source: Source) -> list[str]:
    """A line that names the validation images that cannot be used; none if there are none."""
    dropped = getattr(source, "dropped", ())
    if not dropped:
        return []
    return [
        f"warning: validation images that cannot be used are skipped in every evaluation "
        f"({len(dropped)} of {len(dropped) + len(source)}): {'; '.join(dropped)}"
    ]


def holds_out(config: Config) -> bool:
    """Whether validation images are a part of the training split."""
    return config.val_per_class is not None or config.val_share is not None


def _open(config: Config, split: str, part: str, classes: list[str] | None = None) -> Source:
    if config.data_set in PUBLISHED:
        return open_published(config.data_set, config.data_path, split)
    several, table = config.task == "multilabel", None
    if config.labels:
        table = read_table(config.labels, config.label_columns, config.label_separator, several)
    return open_source(
        config.data_set,
        config.data_path,
        split,
        classes,
        part,
        table,
        config.label_key,
        several,
        cache_dir=config.cache_dir,
        cache_size=int(config.cache_size * 1e9),
    )


class TrainSet(Dataset):
    """Items are asked for by the sampler's ``(index, size, magnitude, seed)`` and depend on nothing else.

    An item is (uint8 image, target), and under augmentation on the device (image, target, its random choices); targets
    are those of `inputs.views.targets`.
    """

    def __init__(self, source: Source, transform: TrainTransform | DeviceTransform, bad_files: BadFiles) -> None:
        self.source, self.transform, self.bad_files = source, transform, bad_files

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: tuple[int, int, float | None, int]) -> tuple[Any, ...]:
        index, size, magnitude, seed = sample
        result, label = self.bad_files.load(
            self.source, index, seed, lambda data: self.transform(data, size, magnitude, seed)
        )
        target = targets(label, len(self.source.classes))
        return (result[0], target, result[1]) if isinstance(result, tuple) else (result, target)


class EvalSet(Dataset):
    """Items are (uint8 image (3, S, S), target, index). An image that cannot be used is an error, never replaced."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int | np.ndarray, int]:
        target = targets(self.source.label(index), len(self.source.classes))
        return load(self.source, index, self.transform), target, index


def training_batches(
    data: TrainSet,
    sampler: CurriculumSampler,
    device: torch.device,
    workers: int,
    augment: DeviceAugment | None = None,
    replay_memory: float = 0.0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches for the rest of the run: uint8 images (N, 3, S, S) and targets (N,) or (N, classes), one a forward pass.

    One loader serves it all: workers start once and prefetch across epochs, stages and evaluations.

    Args:
        augment: RandAugment and flips on the device; ``data``'s transform must then be a DeviceTransform.
        replay_memory: bytes of the replay buffer, for plans with replay. After a resume it is first filled again by
            loading, without training, what it held.
    """
    plan, reading = sampler.plan, copy.copy(sampler)
    buffer = None
    if any(stage.replay > 1 for stage in plan.stages):
        buffer = ReplayBuffer(replay_memory, pin=device.type == "cuda")
        if sampler.start_step < plan.total_steps and (epoch := plan.locate(sampler.start_step)[0]).replay > 1:
            side = plan.loaded_size(epoch.input_size)
            fresh = sampler.shares(epoch)[sampler.rank] * sampler.micro_batch // epoch.replay
            capacity = replay_capacity(replay_memory, side)
            reading.start_step = refill_from(plan, sampler.start_step, capacity, fresh)
    batch_bytes = max(
        len(groups) * sampler.micro_batch // epoch.replay * 3 * side**2
        for epoch in plan
        for groups in sampler.forward_passes(epoch)
        for side in [plan.base_size if augment is not None else plan.loaded_size(epoch.input_size)]
    )
    options = loader_options(workers, device.type == "cuda", batch_bytes)
    loader = iter(DataLoader(data, batch_sampler=reading, collate_fn=collate, **options))
    for epoch in plan:
        for step in range(max(reading.start_step, epoch.first_step), epoch.first_step + epoch.steps):
            for groups in sampler.forward_passes(epoch):
                batch = next(loader)
                if epoch.replay > 1:
                    if step < sampler.start_step:
                        buffer.push(batch, epoch.stage)
                        continue
                    seeds = [derive_seed(sampler.seed, REPLAY, step, group) for group in groups]
                    batch = buffer.extend(batch, seeds, epoch.replay, epoch.stage)
                images, targets, *choices = batch
                if augment is not None:
                    images = augment(to_device(images, device), choices[0], epoch.input_size)
                yield images, targets


def eval_loader(
    source: Source, transform: EvalTransform, batch_size: int, rank: int, world_size: int, workers: int, pin: bool
) -> DataLoader:
    """Every ``world_size``-th image from ``rank`` on: over all processes each image once, none twice."""
    workers = min(workers, -(-len(source) // (batch_size * world_size)))
    side = transform.base_size if transform.operator == "fourier" else transform.size
    return DataLoader(
        EvalSet(source, transform),
        batch_size=batch_size,
        sampler=range(rank, len(source), world_size),
        **loader_options(workers, pin, batch_size * 3 * side**2),
    )


def loader_options(workers: int, pin: bool, batch_bytes: int) -> dict[str, Any]:
    """How every DataLoader starts its workers: aside of the run's random numbers, deaf to the cluster's signals.

    Args:
        batch_bytes: of the largest batch. What is loaded ahead, and page-locked with ``pin``, is bounded by PREFETCH.
    """
    # Its own generator: starting workers must not draw from the one that drop path uses.
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "generator": torch.Generator()}
    if workers:
        ahead = max(1, min(4, int(PREFETCH // (workers * batch_bytes))))
        options.update(prefetch_factor=ahead, worker_init_fn=_start_worker)
        _end_workers_at_exit()
    return options


@cache
def _end_workers_at_exit() -> None:
    """Loader workers that an error left behind ignore the signal by which Python, at its exit, would end them."""
    Finalize(None, kill_workers, exitpriority=10)


def kill_workers() -> None:
    """Ends this process's loader workers at once, whatever they are doing."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for child in multiprocessing.active_children():
        child.kill()


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)  # workers are as many as the machine has cores to give
    # A cluster signals every process of a job. Workers run on until their training process has saved and ends them.
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
