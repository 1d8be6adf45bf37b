"""What training asks of a GPU, counted with fake tensors: that the host never waits, and how many kernels it starts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, Count, fake_device, to_fake
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

from curriculum import CurriculumSampler, RandAugment, build_plan, downsample
from curriculum.device_augment import NAMES, DeviceAugment
from engine import Training, train_epoch
from inputs.finish import Finish
from models import create_mae, create_model, param_groups
from training.numerics import LossMeter
from training.tasks import Classification, Reconstruction

# The most kernels that a step of two forward passes (without the backward passes) may start: a tenth above today's.
MODELS = {"resnet18": 475, "deit_tiny": 1300, "swin_tiny": 1550, "convnext_atto": 710, "mae": 1300}
SIZE = 64


def pinned(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype).pin_memory()


def count_step(model, task=None, **options):
    """One optimizer step of two forward passes of ``train_epoch``, of which the second step is counted."""
    task = task or Classification(0.1)
    plan = build_plan("none", epochs=2, num_images=8, batch_size=8, base_size=SIZE)
    sampler = CurriculumSampler(plan, micro_batch=4)
    ema = ModelEmaV3(model, decay=0.99) if options.pop("ema", False) else None
    with fake_device():
        to_fake(model)
        if ema is not None:
            to_fake(ema.module)
        training = Training(
            model=model,
            ema=ema,
            optimizer=torch.optim.AdamW(param_groups(model, 0.05), fused=True),
            scaler=torch.amp.GradScaler("cuda", enabled=False),
            finish=Finish(max(1, model.num_classes), base_size=SIZE, channels_last=True, **options.pop("finish", {})),
            plan=plan,
            sampler=sampler,
            device=CUDA,
            task=task,
            loss=LossMeter(CUDA),
            **options,
        )
        batches = iter(lambda: (pinned(4, 3, SIZE, SIZE), pinned(4, dtype=torch.int64)), None)
        first, second = plan
        for epoch in (first, second):  # the first one makes constants and moments
            with Count() as count:
                train_epoch(training, epoch, batches, lambda lr, images: False)
    return count


def build(name):
    if name == "mae":
        return create_mae("vit_tiny_patch16_224", SIZE, decoder=(2, 64, 4))
    return create_model(name, 10, SIZE, drop_path=0.1 if name != "resnet18" else 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_waits(name):
    model = build(name)
    task = Reconstruction(model.patch_side) if name == "mae" else None
    finish = {"mixup": 0, "cutmix": 0} if name == "mae" else {}
    count = count_step(model, task, clip_grad=1.0, ema=True, finish=finish)
    assert not count.waits
    assert count.copies == 6  # for each pass its images, its targets, and its choices or masks
    assert MODELS[name] / 2 < count.kernels < MODELS[name]


def test_the_norm_of_a_gradient_that_is_not_clipped_costs_little():
    """For the log alone it is read, and not written: fewer kernels than with clipping, and no wait either."""
    tensors = len([*build("resnet18").parameters()])
    clipped, free = (count_step(build("resnet18"), clip_grad=clip) for clip in (1.0, None))
    assert not free.waits and free.copies == clipped.copies
    assert free.kernels <= clipped.kernels - tensors  # which are scaled one by one here


class Waiting(Classification):
    """The negative control: reads the loss in every step."""

    def loss(self, model, images, targets, seeds):
        loss = super().loss(model, images, targets, seeds)
        loss.item()
        return loss


def test_a_loss_that_is_read_is_noticed():
    count = count_step(build("resnet18"), Waiting(0.1))
    assert sum(count.waits.values()) == 2 and all(place.startswith("test_gpu_counts.py") for place in count.waits)


def count_finish(images, group, size=96, channels_last=True, **settings):
    finish = Finish(1000, base_size=settings.pop("base_size", size), channels_last=channels_last, **settings)
    seeds = list(range(images // group))
    side = finish.base_size if finish.fourier else size
    with fake_device():
        batch = [
            tensor.to(CUDA)
            for tensor in (torch.zeros(images, 3, side, side, dtype=torch.uint8), torch.zeros(images).long())
        ]
        finish.train(*batch, size, seeds, group)  # constants are copied once
        with Count() as count:
            finish.train(*batch, size, seeds, group)
    return count


def test_finishing_a_pass_takes_few_kernels_whatever_its_images():
    count = count_finish(1280, 256)
    assert not count.waits and count.copies == 1
    assert count.kernels < 60
    assert count.kernels == count_finish(320, 64).kernels  # the groups count, not the images
    few = count_finish(1280, 1280)
    assert few.kernels < count.kernels < 1280 / 10


def test_finishing_under_fourier_and_without_mixing():
    count = count_finish(1280, 256, operator="fourier", base_size=224)
    assert not count.waits and count.kernels < 60
    plain = count_finish(64, 64, mixup=0, cutmix=0, erasing=0)
    assert plain.kernels == 3 and plain.copies == 0


@pytest.mark.parametrize("operator", ["lanczos", "fourier"])
def test_augmenting_on_the_device_never_waits(operator):
    augment = DeviceAugment(operator, RandAugment().fill)
    kinds = torch.arange(64) % len(NAMES)
    values = torch.stack([torch.arange(64) % 2, kinds, kinds / 4, kinds.flip(0), kinds / 4], 1).double().numpy()
    choices = SimpleNamespace(numpy=lambda: values)
    with fake_device():
        images = torch.zeros(64, 3, 64, 64, dtype=torch.uint8, device=CUDA)
        augment(images, choices, 48)
        with Count() as count:
            augment(images, choices, 48)
    assert not count.waits and count.copies == 1


class Products(TorchDispatchMode):
    """The precision that float32 matrix products on the device are allowed, each time there is one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("mm.", "mv.", "dot.", "einsum")):
            products = torch.backends.cuda.matmul
            newer = hasattr(products, "fp32_precision")
            self.seen.append(products.fp32_precision == "tf32" if newer else products.allow_tf32)
        return function(*args, **(kwargs or {}))


def by_precision():
    torch.set_float32_matmul_precision("high")


def by_backend():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.fixture(params=[by_precision, by_backend])
def tf32(request):
    """TF32 allowed by each of torch's two ways to say it (which it refuses to mix), of which older ones have one."""
    if request.param is by_backend and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has only one way")
    request.param()
    yield
    if request.param is by_backend:
        torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_what_is_done_to_images_is_never_done_in_tf32(tf32):
    with fake_device():
        images = torch.zeros(2, 3, 32, 32, device=CUDA)
        with Products() as inside:
            for operator in ("fourier", "lanczos"):
                downsample(images, 20, operator)
            values = np.array([[1.0, NAMES.index(name), 0.3] for name in NAMES])
            pixels = torch.zeros(len(NAMES), 3, 32, 32, dtype=torch.uint8, device=CUDA)
            DeviceAugment("lanczos", (1, 2, 3))(pixels, SimpleNamespace(numpy=lambda: values), 20)
        with Products() as outside:
            images @ images
    assert len(inside.seen) >= 6 and not any(inside.seen)
    assert outside.seen == [True]
