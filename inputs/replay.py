"""The replay buffer: training batches of fresh images and of some loaded before (EfficientTrain++, Sec. 5.3)."""

import os
from collections.abc import Sequence

import numpy as np
import torch

from curriculum.plan import Plan


class ReplayBuffer:
    """Turns a stream of fresh batches into training batches ``factor`` times as large, so the loader works less.

    The images of the last ``capacity`` samples lie in a ring that is allocated once. Every group of a training batch is
    its fresh images, followed by factor - 1 times as many drawn from the ring, uniformly and with replacement, when the
    whole forward pass's fresh ones are in it. So crop, flip and RandAugment of a replayed image are those it was loaded
    with, while erasing, mixing and drop path are drawn anew; with mixing's pairs (k, last - k) and factor 2, each fresh
    image meets a replayed one. In the long run a sample is replayed factor - 1 times.

    Differences from the release: it stores float16 after normalising and erasing, this one bytes before; it draws runs
    of consecutive images (1/32 of a batch), this one single images; it takes one forward pass per optimizer step only.

    The ring belongs to one process and holds that process's images: results depend on the number of processes. It
    starts anew with every stage of the plan. To resume from a checkpoint, `push` the fresh batches from step
    `refill_from` on, without training: what the ring then gives is bit-identical to not having stopped.

    Args:
        memory: bytes that the ring may take, in this process (``--replay_memory``).
        pin: whether training batches are put in page-locked memory.
    """

    def __init__(self, memory: float, pin: bool = False):
        if not memory > 0:
            raise ValueError(f"--replay_memory is {memory / 1e9:g} GB: the replay buffer needs some memory")
        self.memory = memory
        self.pin = pin
        self._rings: list[torch.Tensor] = []
        self._stage: int | None = None
        self._next = self._count = 0

    def __len__(self) -> int:
        """Images in the ring."""
        return self._count

    def extend(
        self, batch: Sequence[torch.Tensor], seeds: Sequence[int], factor: int, stage: int
    ) -> tuple[torch.Tensor, ...]:
        """One forward pass: keeps the fresh batch, returns the training batch.

        Args:
            batch: tensors of equal length N, the images first (uint8, (N, 3, S, S)); then targets and whatever else
                goes with an image. On the CPU. N is a whole number of groups of fresh images.
            seeds: one per group. factor: size of a training group over its fresh images; 1 returns the batch as it is.
            stage: of the plan.
        Returns:
            tensors of length factor * N, group by group.
        Raises:
            ValueError: N is not a multiple of the number of groups, or the ring cannot hold one forward pass.
        """
        if factor == 1:
            return tuple(batch)
        total = len(batch[0])
        if total % len(seeds):
            raise ValueError(f"{total} fresh images are not {len(seeds)} groups of equal size")
        self.push(batch, stage)
        fresh = total // len(seeds)
        ages = [np.random.default_rng(seed).integers(self._count, size=(factor - 1) * fresh) for seed in seeds]
        # By age, not by place: after a resume the same images lie elsewhere in the ring.
        places = torch.from_numpy((self._next - 1 - np.stack(ages)) % len(self._rings[0]))
        result = []
        for tensor, ring in zip(batch, self._rings):
            rows = _rows(tensor)
            shape = (len(seeds), factor * fresh, *rows.shape[1:])
            out = torch.empty(shape, dtype=rows.dtype, pin_memory=self.pin)
            out[:, :fresh] = rows.view(len(seeds), fresh, *rows.shape[1:])
            for group, chosen in zip(out, places):
                torch.index_select(ring, 0, chosen, out=group[fresh:])
            result.append(_as_given(out.flatten(0, 1), tensor))
        return tuple(result)

    def push(self, batch: Sequence[torch.Tensor], stage: int) -> None:
        """Keeps a fresh batch; the oldest images make room for it. Raises ValueError if the ring cannot hold it."""
        rows = [_rows(tensor) for tensor in batch]
        if stage != self._stage:
            self._allocate(rows)
            self._stage = stage
        capacity, total = len(self._rings[0]), len(rows[0])
        if total > capacity:
            raise ValueError(
                f"--replay_memory {self.memory / 1e9:g} GB holds {capacity} images, fewer than the {total} of one "
                f"forward pass: raise it, or switch replay off"
            )
        first = min(total, capacity - self._next)
        for ring, row in zip(self._rings, rows):
            ring[self._next : self._next + first] = row[:first]
            ring[: total - first] = row[first:]
        self._next = (self._next + total) % capacity
        self._count = min(self._count + total, capacity)

    def _allocate(self, rows: Sequence[torch.Tensor]) -> None:
        self._rings = []  # the old ring's memory is free before the new one is asked for
        capacity = int(self.memory // sum(row[0].numel() * row.element_size() for row in rows))
        self._rings = [torch.empty((capacity, *row.shape[1:]), dtype=row.dtype) for row in rows]
        self._next = self._count = 0


def replay_capacity(memory: float, side: int) -> int:
    """Images of side x side pixels that ``memory`` bytes hold (targets' 8 bytes included).

    Raises:
        ValueError: it is more memory than this machine has.
    """
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX: the allocation itself will tell
        machine = float("inf")
    if memory > machine:
        raise ValueError(f"--replay_memory is {memory / 1e9:g} GB per process: this machine has {machine / 1e9:.0f} GB")
    return int(memory // (3 * side * side + 8))


def refill_from(plan: Plan, step: int, capacity: int, fresh: int) -> int:
    """The optimizer step from which on fresh batches must be pushed for the ring to be as it was before ``step``.

    Args:
        plan: the run's. step: the next to be taken. capacity: images in the ring. fresh: images that this process loads
            per optimizer step in the current stage.
    """
    stage = plan.stages[plan.locate(step)[0].stage]
    return max(stage.first_step, step - -(-capacity // fresh))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its memory in order: images that lie channels_last are seen as (N, H, W, C)."""
    return tensor.permute(0, 2, 3, 1) if _is_channels_last(tensor) else tensor.contiguous()


def _as_given(rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return rows.permute(0, 3, 1, 2) if _is_channels_last(tensor) else rows


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
