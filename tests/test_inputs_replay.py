"""The replay buffer against a plain list of images, its statistics, its memory, and resuming."""

import numpy as np
import pytest
import torch

from curriculum import build_plan
from inputs.replay import ReplayBuffer, refill_from, replay_capacity

SIDE = 4
BYTES = 3 * SIDE * SIDE + 8


def stream(count, start=0):
    """``count`` images that carry their own number, which is also their target."""
    numbers = torch.arange(start, start + count)
    images = (numbers % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    return images.contiguous(memory_format=torch.channels_last), numbers


def batches(count, size, start=0):
    return [stream(size, start + k * size) for k in range(count)]


@pytest.mark.parametrize("factor", [2, 4])
def test_equals_a_plain_list(factor):
    buffer, kept = ReplayBuffer(50 * BYTES), []
    for k, batch in enumerate(batches(12, 16)):
        seeds = [7 * k, 7 * k + 1]  # two groups of eight fresh images in a forward pass
        images, targets = buffer.extend(batch, seeds, factor, stage=0)
        kept = (kept + batch[1].tolist())[-50:]
        expected = []
        for group, seed in enumerate(seeds):
            draws = np.random.default_rng(seed).integers(len(kept), size=8 * (factor - 1))
            expected += batch[1][8 * group : 8 * group + 8].tolist() + [kept[-1 - age] for age in draws]
        assert targets.tolist() == expected and len(buffer) == len(kept)
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.uint8
        assert torch.equal(images[:, 0, 0, 0].long(), targets % 256)
        assert (images.flatten(1) == images[:, 0, 0, :1]).all()


def test_samples_are_replayed_factor_minus_one_times_at_the_expected_age():
    capacity, fresh, steps, factor = 400, 20, 600, 3
    buffer = ReplayBuffer(capacity * BYTES)
    seen, ages = np.zeros(steps * fresh), []
    for k, batch in enumerate(batches(steps, fresh)):
        _, targets = buffer.extend(batch, [k], factor, stage=0)
        replayed = targets[fresh:].numpy()
        np.add.at(seen, replayed, 1)
        ages.append(k - replayed // fresh)
    settled = seen[capacity : -2 * capacity]
    assert abs(settled.mean() - (factor - 1)) < 0.05  # spread of the mean: .013
    assert abs(settled.var() / settled.mean() - 1) < 0.1  # as drawing with replacement has it
    assert abs(np.concatenate(ages[50:]).mean() - (capacity / fresh - 1) / 2) < 0.3  # half the buffer
    assert np.concatenate(ages).max() < capacity / fresh


def test_first_pass_of_a_stage_replays_itself_alone():
    buffer = ReplayBuffer(100 * BYTES)
    buffer.extend(stream(8), [0], 2, stage=0)
    _, targets = buffer.extend(stream(8, 1000), [1], 2, stage=1)
    assert (targets >= 1000).all()


def test_the_same_memory_throughout():
    buffer = ReplayBuffer(33.5 * BYTES)
    buffer.push(stream(8), stage=0)
    before = [ring.data_ptr() for ring in buffer._rings]
    for k, batch in enumerate(batches(30, 8)):
        buffer.extend(batch, [k], 2, stage=0)
    assert [ring.data_ptr() for ring in buffer._rings] == before
    assert sum(ring.nbytes for ring in buffer._rings) == 33 * BYTES == replay_capacity(33.5 * BYTES, SIDE) * BYTES


@pytest.mark.parametrize("stop", [1, 3, 9, 20])
def test_refilled_after_a_resume(stop):
    capacity, data = 50, batches(25, 16)
    buffer = ReplayBuffer(capacity * BYTES)
    whole = [buffer.extend(batch, [k], 2, stage=0)[1] for k, batch in enumerate(data)]
    plan = build_plan("none", epochs=4, num_images=224, batch_size=32)
    again = ReplayBuffer(capacity * BYTES)
    start = refill_from(plan, stop, capacity, 16)
    assert start == max(0, stop - 4)  # the ring holds the last 3 1/8 steps
    for batch in data[start:stop]:
        again.push(batch, stage=0)
    rest = [again.extend(data[k], [k], 2, stage=0)[1] for k in range(stop, 25)]
    assert all(torch.equal(a, b) for a, b in zip(whole[stop:], rest))
    empty = ReplayBuffer(capacity * BYTES)
    empty.extend(data[stop], [stop], 2, stage=0)
    assert any(  # without refilling it is another run
        not torch.equal(a, empty.extend(data[k], [k], 2, stage=0)[1]) for k, a in enumerate(whole) if k > stop
    )


def test_refilling_stays_inside_the_stage():
    plan = build_plan("efficienttrain++", epochs=5, num_images=640, batch_size=32, base_size=224)
    boundary = plan.stages[1].first_step
    assert refill_from(plan, boundary, 10**6, 16) == boundary
    assert refill_from(plan, boundary + 5, 10**6, 16) == boundary
    assert refill_from(plan, boundary + 5, 32, 16) == boundary + 3


def test_whatever_goes_with_an_image_goes_along():
    buffer = ReplayBuffer(1e6)
    images, targets = stream(8)
    choices = targets[:, None] * torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    out = buffer.extend((images, targets, choices), [3], 2, stage=0)
    assert torch.equal(out[2][:, 0], out[1].double()) and torch.equal(out[2][:, 1], -out[1].double())


def test_the_loader_decodes_half_as_many():
    loaded = 0
    buffer = ReplayBuffer(1000 * BYTES)
    trained = 0
    for k, batch in enumerate(batches(20, 8)):
        loaded += len(batch[0])
        trained += len(buffer.extend(batch, [k], 2, stage=0)[0])
    assert trained == 2 * loaded


def loss_curve(factor, seed, steps=60, batch=128, images=512):
    """Losses of a linear classifier on noisy images; each loading of an image has noise of its own, as crops do."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(48, generator=generator)
    clean = torch.randn(images, 48, generator=generator)
    weight, losses = torch.zeros(48, requires_grad=True), []
    buffer, fresh = ReplayBuffer(256 * BYTES), batch // factor
    for step in range(steps):
        chosen = torch.randint(images, (fresh,), generator=generator)
        noisy = clean[chosen] + 0.5 * torch.randn(fresh, 48, generator=generator)
        loaded = (noisy * 32 + 128).round().clamp(0, 255).to(torch.uint8).view(-1, 3, SIDE, SIDE)
        labels = (clean[chosen] @ truth > 0).long()
        pixels, targets = buffer.extend((loaded, labels), [1000 * seed + step], factor, stage=0)
        logits = (pixels.flatten(1).float() - 128) / 32 @ weight
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.float())
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.data -= 0.05 * gradient
        with torch.no_grad():  # over all images: what was learnt, not how the last batch was
            every = torch.nn.functional.binary_cross_entropy_with_logits(clean @ weight, (clean @ truth > 0).float())
        losses.append(every.item())
    return losses


def test_the_loss_curve_is_unchanged_on_average():
    # At a learning rate where the mean gradient decides, not its noise, of which replayed images bring more.
    curves = {factor: np.array([loss_curve(factor, seed) for seed in range(12)]) for factor in (1, 2)}
    gap = (curves[2] - curves[1])[:, 9::10].mean(axis=0)  # same seeds, same problems; spread .0013
    assert np.abs(gap).max() < 0.006
    assert curves[1].mean(axis=0)[9] - curves[1].mean(axis=0)[-1] > 0.15  # so much lies between two points of it


def test_factor_one_is_no_replay():
    batch = stream(6)
    assert ReplayBuffer(1.0).extend(batch, [0], 1, stage=0) == batch


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="--replay_memory"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match=r"--replay_memory .* holds 5 images, fewer than the 8"):
        ReplayBuffer(5 * BYTES).extend(stream(8), [0], 2, stage=0)
    with pytest.raises(ValueError, match="groups"):
        ReplayBuffer(1e6).extend(stream(8), [0, 1, 2], 2, stage=0)
    with pytest.raises(ValueError, match="this machine has"):
        replay_capacity(1e18, 224)
