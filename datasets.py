"""Data sets and loaders: what a run asks for. What they are made of is in inputs/."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from curriculum import CurriculumSampler
from inputs.folder import FolderIndex
from inputs.transforms import EvalTransform, TrainTransform


class Source(Protocol):
    """A data set by index: names of its classes, how many images, and each image (encoded bytes or PIL) and label."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any: ...

    def label(self, index: int) -> int: ...


class Folder:
    """An image folder: its files as they are, for the transform to decode."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        self.index = FolderIndex(root, classes=classes)
        self.classes = list(self.index.classes)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> bytes:
        return Path(self.index.path(index)).read_bytes()

    def label(self, index: int) -> int:
        return self.index.label(index)


class Cifar:
    """torchvision's CIFAR-10 or -100, downloaded to ``root`` on first use by rank 0."""

    def __init__(self, name: str, root: str, train: bool) -> None:
        from torchvision.datasets import CIFAR10, CIFAR100

        maker = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        try:
            self.data = maker(root, train=train)
        except RuntimeError:  # not there, or damaged
            self.data = maker(root, train=train, download=True)
        self.classes = self.data.classes

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Any:
        return self.data[index][0]

    def label(self, index: int) -> int:
        return int(self.data.targets[index])


def build_source(data_set: str, data_path: str | None, train: bool) -> Source:
    """The training or the validation set.

    Raises:
        ValueError: a missing or empty folder, or a validation class that is not in training; names the setting.
    """
    if data_path is None:
        raise ValueError("--data_path is not set: name the folder that holds the data set")
    if data_set != "folder":
        return Cifar(data_set, data_path, train)
    if train or not (Path(data_path) / "train").is_dir():
        return Folder(Path(data_path) / ("train" if train else "val"))
    # Labels are those of training, so validation may lack a class but not bring one of its own.
    return Folder(Path(data_path) / "val", classes=Folder(Path(data_path) / "train").classes)


class TrainSet(Dataset):
    """Items are asked for by the sampler's ``(index, size, magnitude, seed)`` and depend on nothing else."""

    def __init__(self, source: Source, transform: TrainTransform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: tuple[int, int, float | None, int]) -> tuple[torch.Tensor, int]:
        index, size, magnitude, seed = sample
        return self.transform(self.source.read(index), size, magnitude, seed), self.source.label(index)


class EvalSet(Dataset):
    """Items are (uint8 image (3, S, S), label, index)."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.transform(self.source.read(index)), self.source.label(index), index


def train_loader(
    source: Source, transform: TrainTransform, sampler: CurriculumSampler, workers: int, pin: bool
) -> DataLoader:
    """One loader for the whole rest of the run: workers start once and prefetch across epochs and stages."""
    return DataLoader(TrainSet(source, transform), batch_sampler=sampler, **_options(workers, pin))


def eval_loader(
    source: Source, transform: EvalTransform, batch_size: int, rank: int, world_size: int, workers: int, pin: bool
) -> DataLoader:
    """Every ``world_size``-th image from ``rank`` on: over all processes each image once, none twice."""
    return DataLoader(
        EvalSet(source, transform),
        batch_size=batch_size,
        sampler=range(rank, len(source), world_size),
        **_options(min(workers, -(-len(source) // (batch_size * world_size))), pin),
    )


def _options(workers: int, pin: bool) -> dict[str, Any]:
    # Its own generator: starting workers must not draw from the one that drop path uses.
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "generator": torch.Generator()}
    if workers:
        options.update(prefetch_factor=4, worker_init_fn=_start_worker)
    return options


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)  # workers are as many as the machine has cores to give
    # A cluster signals every process of a job. Workers go on until their training process has saved and ends them.
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
