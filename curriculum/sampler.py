"""The batch sampler: every sample carries its own instructions, so workers share no state."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Sampler

from curriculum.plan import Plan
from curriculum.records import Pass, Stage

_MASK = (1 << 64) - 1
# Streams of derived seeds: shuffling, images, erasing and mixing, drop path, the replay buffer's choice.
ORDER, SAMPLE, GROUP, FORWARD, REPLAY = range(5)
MOST_IDLE = 1 / 8  # of the processes' time, where groups of another size waste less


def derive_seed(*values: int) -> int:
    """A 63-bit seed from integers, by SplitMix64: neighbouring values give unrelated seeds."""
    state = 0
    for value in values:
        state = (state ^ (int(value) & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


class CurriculumSampler(Sampler):
    """Batches of the whole rest of a run, one per forward pass of one process.

    An optimizer step is a fixed list of groups, each a slice of the epoch's one permutation, ``micro_batch`` images
    long. Processes take shares of the list in order, the first ones a group more where it does not divide. At a size B
    below the base one forward pass takes several groups, up to (base / B)^2, since they cost what one costs at full
    size. So which images meet in a group, and what becomes of each, depends neither on the number of processes nor on
    that of workers.

    In a stage with replay, only the first 1 / replay of each group is loaded: the replay buffer fills it up.

    Each batch is a list of ``(index, size, magnitude, seed)``: the image, the input size B in pixels, the RandAugment
    magnitude (None for none) and the seed of its crop, flip and RandAugment, made of run seed, epoch and index alone.

    Args:
        plan: from :func:`curriculum.build_plan`.
        seed: the run's seed.
        micro_batch: images per group; None: the first of ``group_sizes``, which is one group per process and step
            at the base batch if that divides.
        forward_batch: most images of one forward pass, by input size; default: as many groups as cost what one costs at
            the base size.
        rank, world_size: this process and the number of processes.
        start_step: optimizer steps already done (resume).
        even_groups: whether groups must be even, since mixup and cutmix pair their images.

    Raises:
        ValueError: groups that do not divide the batch, or fewer of them than processes; names sizes that serve.

    >>> from curriculum import build_plan
    >>> plan = build_plan("efficienttrain++", epochs=2, num_images=800, batch_size=8, base_size=64)
    >>> batch = next(iter(CurriculumSampler(plan, seed=0)))
    >>> len(batch), {size for index, size, magnitude, seed in batch}
    (8, {32})
    """

    def __init__(
        self,
        plan: Plan,
        *,
        seed: int = 0,
        micro_batch: int | None = None,
        forward_batch: dict[int, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        even_groups: bool = False,
    ) -> None:
        self.plan, self.seed, self.rank, self.world_size = plan, seed, rank, world_size
        self.micro_batch = _check_groups(plan.batch_size, micro_batch, world_size, 2 if even_groups else 1)
        for stage in plan.stages:
            if self.micro_batch % stage.replay:
                raise ValueError(
                    f"`micro_batch` {self.micro_batch} cannot be 1/{stage.replay} fresh images, as `replay` asks at "
                    f"input size {stage.input_size}: make it a multiple of {stage.replay}"
                )
        self.forward_batch = forward_batch or {}
        self.start_step = start_step

    def forward_passes(self, epoch: Pass) -> list[range]:
        """This process's groups of any optimizer step of ``epoch``, split into forward passes as even as can be."""
        before, share = sum(self.shares(epoch)[: self.rank]), self.shares(epoch)[self.rank]
        most = int((self.plan.base_size / epoch.input_size) ** 2 + 1e-9)
        if epoch.input_size in self.forward_batch:
            most = self.forward_batch[epoch.input_size] // self.micro_batch
        most = max(1, most)
        count = -(-share // most)
        ends = [before + share * i // count for i in range(count + 1)]
        return [range(a, b) for a, b in pairwise(ends)]

    def shares(self, epoch: Pass | Stage) -> list[int]:
        """Groups of an optimizer step that each process takes."""
        each, more = divmod(epoch.batch_size // self.micro_batch, self.world_size)
        return [each + (rank < more) for rank in range(self.world_size)]

    def __len__(self) -> int:
        """Batches (forward passes of this process) that are left."""
        return sum(
            len(self.forward_passes(epoch)) * max(0, epoch.steps - max(0, self.start_step - epoch.first_step))
            for epoch in self.plan
        )

    def __iter__(self) -> Iterator[list[tuple[int, int, float | None, int]]]:
        for epoch in self.plan:
            if epoch.first_step + epoch.steps <= self.start_step:
                continue
            order = self.permutation(epoch)
            for step in range(max(0, self.start_step - epoch.first_step), epoch.steps):
                fresh = self.micro_batch // epoch.replay
                for groups in self.forward_passes(epoch):
                    first = step * epoch.batch_size // epoch.replay + groups.start * fresh
                    indices = order[first : first + len(groups) * fresh].tolist()
                    yield [
                        (index, epoch.input_size, epoch.magnitude, derive_seed(self.seed, SAMPLE, epoch.index, index))
                        for index in indices
                    ]

    def permutation(self, epoch: Pass) -> np.ndarray:
        """The order of the training set in ``epoch``: one permutation over all processes."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch.index))
        return torch.randperm(self.plan.num_images, generator=generator).numpy()


class IndexSampler(CurriculumSampler):
    """The same batches, of indices alone: for data sets that take an index, and images that the device reduces.

    With the curriculum ``none`` it is a sampler whose runs resume inside a pass on any number of processes.

    >>> from curriculum import build_plan
    >>> plan = build_plan("none", epochs=1, num_images=8, batch_size=4)
    >>> halves = [next(iter(IndexSampler(plan, rank=rank, world_size=2, start_step=1))) for rank in (0, 1)]
    >>> halves, list(IndexSampler(plan))[1]
    ([[0, 6], [5, 3]], [0, 6, 5, 3])
    """

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield [index for index, *_ in batch]


def group_sizes(batch: int, world_size: int, multiple: int = 1, whole: int | None = None) -> list[int]:
    """Images per group with which a batch makes a group or more for each process, the best first.

    That is the largest that leaves no more than ``MOST_IDLE`` of the processes' time idle, or else the least idle.

    Args:
        multiple: of which groups must be, 2 where images are mixed in pairs. whole: which groups divide; by default the
            batch. A run's groups, to go on with parts of them.

    >>> group_sizes(64, 4)[0], group_sizes(64, 3)[:2]
    (16, [8, 4])
    """
    sizes = [n for n in range(batch // world_size, 0, -1) if (whole or batch) % n == batch % n == n % multiple == 0]
    idle = {n: idle_share(batch // n, world_size) for n in sizes}
    return [n for n in sizes if idle[n] <= MOST_IDLE] or sorted(sizes, key=idle.get)


def idle_share(groups: int, world_size: int) -> float:
    """The share of the processes' time that they wait for those of them that take a group more."""
    return 1 - groups / (-(-groups // world_size) * world_size)


def _check_groups(batch: int, micro_batch: int | None, world_size: int, multiple: int) -> int:
    """Images per group, of which a batch is a whole number, one or more for each process."""
    if batch % multiple:
        near = _nearest(batch, lambda n: n % multiple == 0)
        raise ValueError(f"`batch_size` {batch} is odd, but images are mixed in pairs; nearest that do: {near}")
    if batch < world_size * multiple:
        raise ValueError(
            f"`batch_size` {batch} makes no group of {multiple} for each of {_processes(world_size)}: raise it to "
            f"{world_size * multiple} or more, or start fewer"
        )
    micro = group_sizes(batch, world_size, multiple)[0] if micro_batch is None else micro_batch
    if micro < 1:
        raise ValueError(f"`micro_batch` is {micro}; it must be a positive number")
    near = _nearest(micro, lambda n: batch % n == n % multiple == 0, highest=batch // world_size)
    if micro % multiple:
        raise ValueError(
            f"`micro_batch` {micro} is odd, but mixup and cutmix pair the images of a group; nearest that do: "
            f"{near} (or switch both off)"
        )
    if batch % micro:
        raise ValueError(f"`micro_batch` {micro} does not divide `batch_size` {batch}; nearest that do: {near}")
    if batch // micro < world_size:
        raise ValueError(
            f"`micro_batch` {micro} makes {batch // micro} group{'s' * (batch > micro)} of `batch_size` {batch}, fewer "
            f"than {_processes(world_size)}; {group_sizes(batch, world_size, multiple)[0]} would serve"
        )
    return micro


def _processes(world_size: int) -> str:
    return f"{world_size} process{'es' * (world_size > 1)}"


def _nearest(value: int, fits, highest: int | None = None) -> str:
    below = next((n for n in range(min(value, highest or value), 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, (highest or 2 * value) + 1) if fits(n)), None)
    return " and ".join(str(n) for n in (below, above) if n)
