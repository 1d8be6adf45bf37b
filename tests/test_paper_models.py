"""Every model of the papers trains at 96, 160 and 224 with a size switch in between (extended: minutes)."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from timm.utils import ModelEmaV3

from config import Config
from curriculum import CurriculumSampler, build_plan, set_input_size
from engine import Training, train_epoch, unwrap
from inputs.finish import Finish
from models import create_model
from training.build import make_optimizer
from training.numerics import LossMeter
from training.tasks import Classification
from utils import Topology, wrap

SMALLEST = ["resnet18", "convnext_tiny", "deit_tiny", "swin_tiny", "cswin_tiny", "pvt_tiny", "caformer_s18"]
OTHERS = [
    "resnet50",
    *(f"convnext_{size}" for size in ("small", "base", "large")),
    "convnext_isotropic_small",
    *(f"deit_{size}" for size in ("small", "base")),
    *(f"swin_{size}" for size in ("small", "base", "large")),
    *(f"cswin_{size}" for size in ("small", "base", "large")),
    *(f"pvt_{size}" for size in ("small", "medium", "large")),
    *(f"caformer_{size}" for size in ("s36", "m36", "b36")),
]
THREE_STEPS_EACH = {
    "clock": "epochs",
    "stages": [{"until": u, "input_size": s} for u, s in ((1 / 3, 96), (2 / 3, 160), (1, 224))],
}
CLASSES = 10


def run(name, opt, rank=0, world_size=1):
    """Three steps at each size through the training loop; returns the finished Training."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    topology = Topology(rank, world_size, device)
    config = Config(opt=opt, lr=1e-3, output_dir="unused")
    model = create_model(name, CLASSES, 96)
    plan = build_plan(
        THREE_STEPS_EACH, epochs=9, num_images=4, batch_size=4, size_multiple=model.size_multiple, lr=1e-3, warmup="0%"
    )
    assert [(stage.input_size, stage.steps) for stage in plan.stages] == [(96, 3), (160, 3), (224, 3)]
    training = Training(
        model=wrap(model, topology, False),
        ema=ModelEmaV3(model, decay=0.9),
        optimizer=make_optimizer(config, model),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        finish=Finish(CLASSES),
        plan=plan,
        sampler=CurriculumSampler(plan, micro_batch=2, rank=rank, world_size=world_size),
        device=device,
        task=Classification(),
        loss=LossMeter(device),
    )
    for epoch in plan:
        if epoch.input_size != model.input_size:
            training.model = None
            set_input_size(model, epoch.input_size, training.optimizer, training.ema)
            training.model = wrap(model, topology, False)
        train_epoch(training, epoch, batches(training.sampler, epoch), lambda lr, images: False)
    return training


def batches(sampler, epoch):
    """The same images for the same groups, whatever process they fall to."""
    for step in range(epoch.first_step, epoch.first_step + epoch.steps):
        for groups in sampler.forward_passes(epoch):
            made = [group_images(step, group, epoch.input_size) for group in groups]
            yield torch.cat([images for images, _ in made]), torch.cat([targets for _, targets in made])


def group_images(step, group, size):
    generator = torch.Generator().manual_seed(1000 * step + group)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, CLASSES, (2,), generator=generator)


def check(training, before):
    """All is finite, at 224, and moved; moments and moving average have the parameters' shapes."""
    model = unwrap(training.model)
    assert training.step == 9 and model.input_size == 224 and training.loss.mean() < 50
    averaged = dict(training.ema.module.named_parameters())
    moved = 0
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and averaged[name].shape == parameter.shape, name
        for value in training.optimizer.state[parameter].values():
            assert not torch.is_tensor(value) or value.ndim == 0 or value.shape == parameter.shape, name
        moved += before[name].shape != parameter.shape or not torch.equal(before[name], parameter)
    assert moved > 0.9 * len(before)
    with torch.inference_mode():
        assert torch.isfinite(training.ema.module(torch.zeros(1, 3, 224, 224))).all()


def weights(name):
    torch.manual_seed(0)
    return {key: value.clone() for key, value in create_model(name, CLASSES, 96).named_parameters()}


@pytest.mark.parametrize("name", ["deit_tiny"])
def test_three_sizes(name):
    check(run(name, "adamw"), weights(name))


@pytest.mark.extended
@pytest.mark.parametrize("opt", ["adamw", "lamb"])
@pytest.mark.parametrize("name", [*SMALLEST, *OTHERS])
def test_three_sizes_of_every_model(name, opt):
    check(run(name, opt), weights(name))


@pytest.mark.extended
@pytest.mark.parametrize("opt", ["adamw", "lamb"])
@pytest.mark.parametrize("name", SMALLEST)
def test_two_processes(name, opt, tmp_path):
    """Two processes end where one does (but for BatchNorm, whose batches are smaller)."""
    one = unwrap(run(name, opt).model).state_dict()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(process, (name, opt, port, str(tmp_path)), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    learnt = [key for key in one if "running" not in key and "num_batches" not in key]
    assert all(torch.equal(two[0][key], two[1][key]) for key in learnt)
    if not any("running_mean" in key for key in one):
        distance = max((one[key] - two[0][key]).abs().max().item() for key in learnt)
        assert distance < 2e-3, distance  # nine steps of 1e-3 apart at most; the same to rounding, which Adam enlarges


def process(rank, name, opt, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(unwrap(run(name, opt, rank, 2).model).state_dict(), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()
