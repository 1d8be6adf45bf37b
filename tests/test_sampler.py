"""The batch sampler: every image once per pass, the same groups on any number of processes, resumable anywhere."""

import itertools
from collections import Counter

import pytest
from torch.utils.data import DataLoader, Dataset

from curriculum import CurriculumSampler, build_plan
from curriculum.sampler import derive_seed, group_sizes, idle_share

IMAGES, BATCH, MICRO = 203, 16, 4


@pytest.fixture(scope="module")
def plan():
    return build_plan("efficienttrain++", epochs=2.5, num_images=IMAGES, batch_size=BATCH)


def sampler(plan, **kwargs):
    return CurriculumSampler(plan, **{"seed": 7, "micro_batch": MICRO, **kwargs})


def steps_of(plan, batches, samplers):
    """[optimizer step: samples of all processes in group order], from each process's list of batches."""
    iterators = [iter(b) for b in batches]
    result = []
    for epoch in plan:
        for _ in range(epoch.steps):
            samples = []
            for own, iterator in zip(samplers, iterators):
                for groups in own.forward_passes(epoch):
                    batch = next(iterator)
                    assert len(batch) == len(groups) * own.micro_batch
                    samples += batch
            result.append(samples)
    assert all(next(iterator, None) is None for iterator in iterators)
    return result


def test_each_image_at_most_once_per_record_and_as_the_record_says(plan):
    batches = iter(sampler(plan))
    for epoch in plan:
        seen = Counter()
        for _ in range(epoch.steps * len(sampler(plan).forward_passes(epoch))):
            for index, size, magnitude, _seed in next(batches):
                seen[index] += 1
                assert (size, magnitude) == (epoch.input_size, epoch.magnitude)
        assert sum(seen.values()) == epoch.steps * BATCH
        assert set(seen.values()) == {1} and set(seen) <= set(range(IMAGES))
    assert next(batches, None) is None


def test_all_images_are_used_in_turn(plan):
    """The images that a pass leaves over (floor(images / batch)) are others in every pass."""
    left_over = []
    for epoch in plan:
        if epoch.steps == IMAGES // BATCH:
            order = sampler(plan).permutation(epoch)
            assert sorted(order) == list(range(IMAGES))
            left_over.append(frozenset(order[epoch.steps * BATCH :].tolist()))
    assert len(left_over) >= 4 and len(set(left_over)) == len(left_over)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_steps_and_groups_on_any_number_of_processes(plan, world_size):
    alone = sampler(plan)
    expected = steps_of(plan, [list(alone)], [alone])
    several = [sampler(plan, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert steps_of(plan, [list(s) for s in several], several) == expected
    for epoch in plan:  # the processes' groups are all groups, none twice
        groups = [g for s in several for groups in s.forward_passes(epoch) for g in groups]
        assert groups == list(range(BATCH // MICRO))
        assert [sum(map(len, s.forward_passes(epoch))) for s in several] == several[0].shares(epoch)
        assert several[0].shares(epoch) == {2: [2, 2], 3: [2, 1, 1], 4: [1, 1, 1, 1]}[world_size]
    other = sampler(plan, seed=8)
    assert steps_of(plan, [list(other)], [other]) != expected  # negative control


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_from_any_step_gives_the_tail(plan, world_size):
    own = sampler(plan, rank=world_size - 1, world_size=world_size)
    whole, place = list(own), 0
    assert len(own) == len(whole)
    for step in range(plan.total_steps):
        resumed = sampler(plan, rank=world_size - 1, world_size=world_size, start_step=step)
        assert list(resumed) == whole[place:]
        assert len(resumed) == len(whole) - place
        place += len(own.forward_passes(plan.locate(step)[0]))
    end = sampler(plan, start_step=plan.total_steps)
    assert len(end) == 0 and list(end) == []


def test_seeds_come_from_run_seed_epoch_and_index_only(plan):
    """Of the same pass, the same image has the same seed, whatever batch, micro-batch and process count."""

    def seeds(**kwargs):
        own = sampler(plan, **kwargs)
        batches, found = iter(own), {}
        for epoch in plan:
            for _ in range(epoch.steps * len(own.forward_passes(epoch))):
                for index, _size, _magnitude, seed in next(batches):
                    found[epoch.index, index] = seed
        return found

    one = seeds()
    assert len(set(one.values())) == len(one)  # another seed for every image and pass
    assert seeds(micro_batch=8) == one
    shared = seeds(rank=1, world_size=2)
    assert shared.items() <= one.items() and len(shared) == len(one) / 2
    assert not set(seeds(seed=8).values()) & set(one.values())
    (epoch, index), seed = next(iter(one.items()))
    assert seed == derive_seed(7, 1, epoch, index)


def test_derived_seeds_are_unrelated():
    grid = [derive_seed(*values) for values in itertools.product(range(4), range(8), range(100))]
    assert len(set(grid)) == len(grid)
    assert all(0 <= seed < 2**63 for seed in grid)
    assert derive_seed(1, 2) != derive_seed(2, 1) and derive_seed(0) != derive_seed(0, 0)
    # About half of the 63 bits differ between neighbours, as between unrelated numbers.
    flips = [bin(derive_seed(0, n) ^ derive_seed(0, n + 1)).count("1") for n in range(500)]
    assert 30 < sum(flips) / len(flips) < 33


def test_forward_passes_follow_the_pixels(plan):
    """At B a device takes as many groups as cost what one costs at the base size: 5 at 96, 1 at 160 and 224."""
    own = sampler(plan)
    by_size = {epoch.input_size: [len(groups) for groups in own.forward_passes(epoch)] for epoch in plan}
    assert by_size == {96: [4], 160: [1, 1, 1, 1], 224: [1, 1, 1, 1]}
    wide = CurriculumSampler(build_plan("efficienttrain++", epochs=30, num_images=64, batch_size=64), micro_batch=4)
    passes = {epoch.input_size: [len(groups) for groups in wide.forward_passes(epoch)] for epoch in wide.plan}
    assert passes[96] == [4, 4, 4, 4]  # as even as can be, not 5 + 5 + 5 + 1
    half = CurriculumSampler(build_plan("none", epochs=1, base_size=64, num_images=64, batch_size=64))
    assert half.micro_batch == 64


def test_larger_batches_at_small_sizes():
    plan = build_plan("efficienttrain++", epochs=30, num_images=256, batch_size=16, early_large_batch=True)
    own = CurriculumSampler(plan, micro_batch=8)
    batches = iter(own)
    for epoch in plan:
        assert epoch.batch_size == {96: 64, 160: 32, 224: 16}[epoch.input_size]
        seen = [
            index
            for _ in range(epoch.steps * len(own.forward_passes(epoch)))
            for index, _size, _magnitude, _seed in next(batches)
        ]
        assert len(seen) == epoch.steps * epoch.batch_size == len(set(seen))


@pytest.mark.parametrize(
    "batch, micro, world_size, message",
    [
        (16, 5, 1, "`micro_batch` 5 does not divide `batch_size` 16; nearest that do: 4 and 8$"),
        (16, 12, 2, "`micro_batch` 12 .* nearest that do: 8$"),
        (16, 32, 1, "`micro_batch` 32 .* nearest that do: 16$"),
        (16, 8, 3, "`micro_batch` 8 makes 2 groups of `batch_size` 16, fewer than 3 processes; 2 would serve$"),
        (16, 16, 2, "`micro_batch` 16 makes 1 group of `batch_size` 16, fewer than 2 processes; 8 would serve$"),
        (2, None, 3, "`batch_size` 2 makes no group of 1 for each of 3 processes: raise it to 3 or more"),
        (16, -4, 1, "`micro_batch` is -4"),
        (16, 0, 1, "`micro_batch` is 0"),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest_that_do(batch, micro, world_size, message):
    plan = build_plan("none", epochs=1, num_images=100, batch_size=batch)
    with pytest.raises(ValueError, match=message):
        CurriculumSampler(plan, micro_batch=micro, world_size=world_size)


@pytest.mark.parametrize(
    "batch, micro, world_size, message",
    [
        (16, 1, 1, "`micro_batch` 1 is odd.* nearest that do: 2"),
        (24, 3, 1, "`micro_batch` 3 is odd.* nearest that do: 2 and 4"),
        (15, None, 1, "`batch_size` 15 is odd, but images are mixed in pairs; nearest that do: 14 and 16"),
        (6, None, 4, "`batch_size` 6 makes no group of 2 for each of 4 processes: raise it to 8 or more"),
    ],
)
def test_mixed_groups_are_even(batch, micro, world_size, message):
    plan = build_plan("none", epochs=1, num_images=100, batch_size=batch)
    with pytest.raises(ValueError, match=message):
        CurriculumSampler(plan, micro_batch=micro, world_size=world_size, even_groups=True)
    assert CurriculumSampler(plan, micro_batch=batch, world_size=1).micro_batch == batch


@pytest.mark.parametrize(
    "batch, world_size, multiple, whole, best",
    [
        (4096, 8, 2, None, 512),  # a device's whole share, where there is one
        (4096, 3, 2, None, 512),  # 8 groups, 3 + 3 + 2; of 4 a third of the time would be idle
        (18, 4, 2, None, 2),  # 9 groups: a quarter idle, the least that there is
        (7, 3, 1, None, 1),  # 7 groups, 3 + 2 + 2
        (16, 3, 1, 8, 2),  # parts of a run's groups
        (24, 2, 1, 24, 12),
    ],
)
def test_groups_of_any_number_of_processes(batch, world_size, multiple, whole, best):
    sizes = group_sizes(batch, world_size, multiple, whole)
    assert sizes[0] == best
    every = [n for n in range(1, batch + 1) if batch % n == 0 and n % multiple == 0 and batch // n >= world_size]
    assert {*sizes} <= {n for n in every if (whole or batch) % n == 0}
    assert idle_share(batch // best, world_size) <= max(1 / 8, min(idle_share(batch // n, world_size) for n in every))


class Echo(Dataset):
    """Returns what the sampler asks for."""

    def __len__(self):
        return IMAGES

    def __getitem__(self, sample):
        return sample


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_receive_the_instructions_in_order(plan, workers):
    own = sampler(plan, start_step=plan.total_steps - 6)
    loader = DataLoader(Echo(), batch_sampler=own, num_workers=workers, collate_fn=list)
    assert list(loader) == list(own)
