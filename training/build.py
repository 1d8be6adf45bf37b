"""The parts of a run, made from its settings: plan, model, batches, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from config import Config, UsageError, as_usage, load_curriculum
from config.checks import DENSE_TASKS
from curriculum import CurriculumSampler, Plan, RandAugment, build_plan, check_input_sizes
from curriculum.device_augment import DeviceAugment
from curriculum.skeleton import Skeleton
from datasets import Source, TrainSet, build_source, describe_data, eval_loader, training_batches
from dense.build import make_dense
from dense.reading import read_bytes
from dense.scenes import TrainScenes
from dense.tasks import Detection, SceneFinish, Segmentation
from dense.tasks import eval_loader as dense_eval_loader
from dense.tasks import training_batches as dense_batches
from dense.transforms import DetectionTest, SegmentationTest
from engine import Task, Training
from inputs.bad_files import BadFiles
from inputs.device import DeviceTransform
from inputs.finish import IMAGENET_MEAN, IMAGENET_STD, Finish
from inputs.readable import drop_unreadable
from inputs.replay import replay_capacity
from inputs.summary import look_at
from inputs.transforms import EvalTransform, TrainTransform
from models import create_mae, create_model, param_groups
from training.muon import Muon
from training.numerics import NEVER, LossMeter, max_skipped
from training.scenes import base_size, has_masks, head_of, make_scene_transform, open_dense, test_sides
from training.tasks import Classification, MultiLabel, Reconstruction
from utils import Topology


def make_plan(config: Config, num_images: int, classes: int) -> Plan:
    """The plan of a run, every size of which the model was seen to take."""
    with as_usage():
        with torch.device("meta"), Skeleton() if config.task in DENSE_TASKS else nullcontext():
            probe = make_model(config, classes, config.input_size)
        plan = build_plan(
            load_curriculum(config.curriculum),
            epochs=config.epochs,
            num_images=num_images,
            batch_size=config.batch_size,
            base_size=base_size(config),
            size_multiple=probe.size_multiple,
            lr=config.lr,
            min_lr=config.min_lr,
            warmup=config.warmup_epochs,
            weight_decay=config.weight_decay,
            weight_decay_end=config.weight_decay_end,
            magnitude=config.magnitude,
            max_magnitude=config.max_magnitude,
            operator=config.operator,
            early_large_batch=config.early_large_batch,
            lr_rule=config.lr_rule,
            schedule=config.schedule,
            lr_steps=config.lr_steps or (),
            replay=config.replay or (),
        )
        check_input_sizes(
            probe, sorted({stage.input_size for stage in plan.stages} | {config.eval_size or plan.base_size})
        )
    return plan


def make_model(config: Config, classes: int, input_size: int) -> nn.Module:
    options = config.model_args or {}
    if config.task in DENSE_TASKS:
        with as_usage():
            model = make_dense(head_of(config), config.model, classes, config.drop_path, options, config.head_args)
        model.input_size, model.num_classes = input_size, classes
        return model
    if config.task == "mae":
        options = {"target": config.mae_target, "mask_ratio": config.mask_ratio, "decoder": config.decoder, **options}
        return create_mae(config.model, input_size, config.drop_path, **options)
    return create_model(config.model, classes, input_size, config.drop_path, **options)


def open_sources(config: Config, classes: list[str] | None = None) -> tuple[Source, Source]:
    """The training and the validation set that the settings name, their classes in this order. Raises UsageError."""
    if config.task not in DENSE_TASKS:
        return build_source(config, True, classes), build_source(config, False, classes)
    train = open_dense(config, True)
    ordered = config.task == "segmentation" or classes is None or list(classes) == train.classes
    if not ordered and set(classes) == set(train.classes):  # label maps have the numbers of their classes in them
        train = open_dense(config, True, classes)
    return train, open_dense(config, False, train.classes)


def usable(config: Config, source: Source) -> Source:
    """The validation images that can be used. Those of scenes were looked for when they were opened; all are needed."""
    if config.task in DENSE_TASKS:
        return source
    with as_usage():
        return drop_unreadable(source, config.max_bad)


def describe(config: Config, sources: tuple[Source, Source]) -> list[str]:
    """What was read, in a line or two."""
    if config.task not in DENSE_TASKS:
        return describe_data(config, sources)
    train, test = sources
    found = f"data: {len(train):,} training and {len(test):,} validation scenes, {len(train.classes)} classes"
    return ["; ".join([found, *look_at(lambda i: read_bytes(train.path(i)), len(train))])]


def number_of_classes(config: Config, source: Source) -> int:
    """The model's outputs: the data set's classes, or more if --num_classes says so."""
    found = len(source.classes)
    if config.num_classes is not None and config.num_classes < found:
        raise UsageError(f"--num_classes is {config.num_classes} but the data set has {found} classes")
    return config.num_classes or found


def describe_replay(config: Config, plan: Plan) -> list[str]:
    """What the replay buffer will hold, a line for each stage that has one.

    Raises:
        UsageError: --replay_memory is more than this machine has.
    """
    lines = []
    for stage in plan.stages:
        if stage.replay > 1:
            side = plan.loaded_size(stage.input_size)
            with as_usage():
                capacity = replay_capacity(config.replay_memory * 1e9, side)
            lines.append(
                f"replay at B {stage.input_size}: one image in {stage.replay} is loaded; in each process the buffer "
                f"takes up to {config.replay_memory:g} GB ({capacity:,} images)"
            )
    return lines


def make_sampler(config: Config, plan: Plan, world_size: int, rank: int = 0) -> CurriculumSampler:
    """Which images this process trains on, and how an optimizer step is shared out. Raises UsageError."""
    with as_usage():
        sampler = CurriculumSampler(
            plan,
            seed=config.seed,
            micro_batch=config.micro_batch,
            forward_batch=config.forward_batch,
            rank=rank,
            world_size=world_size,
            even_groups=mixes(config),
        )
    alone = sampler.micro_batch == 1 and not (world_size > 1 and torch.cuda.is_available())
    passes = (groups for record in plan for groups in sampler.forward_passes(record))
    if config.task == "segmentation" and alone and any(len(groups) == 1 for groups in passes):
        raise UsageError(
            "--micro_batch 1: UperNet pools the whole image to one value a channel, and BatchNorm needs two or more: "
            "give the images of a device, 2 or more"
        )
    return sampler


def mixes(config: Config) -> bool:
    """Whether images are mixed in pairs, so that groups of them are even."""
    return config.mixup > 0 or config.cutmix > 0


def evaluated_passes(plan: Plan, interval: str | float) -> list[int]:
    """Indices of the passes that end with an evaluation: those in which the interval elapses, and the last."""
    due = (record for record in plan if plan.due(interval, record.first_step + record.steps, since=record.first_step))
    return sorted({record.index for record in due} | {len(plan) - 1})


def make_batches(
    config: Config, plan: Plan, sampler: CurriculumSampler, source: Source, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches for the rest of the run, uint8 images and targets, one per forward pass."""
    if config.task in DENSE_TASKS:
        scenes = make_train_set(config, plan, source)
        return dense_batches(scenes, sampler, config.num_workers, device.type == "cuda")
    data, augment = make_train_set(config, plan, source), make_augment(config, plan)
    return training_batches(data, sampler, device, config.num_workers, augment, config.replay_memory * 1e9)


def make_augment(config: Config, plan: Plan) -> DeviceAugment | None:
    """What augments batches on the device, if it does not happen in the loader's workers."""
    return DeviceAugment(plan.operator, RandAugment().fill) if config.augment_on == "device" else None


def make_eval_loader(
    config: Config, plan: Plan, source: Source, size: int, batch: int, topology: Topology
) -> DataLoader:
    """This process's share of an evaluation at input size ``size``."""
    share = topology.rank, topology.world_size, config.num_workers, topology.device.type == "cuda"
    if config.task in DENSE_TASKS:
        transform = DetectionTest if config.task == "detection" else SegmentationTest
        return dense_eval_loader(source, transform(*test_sides(config)), *share)
    transform = EvalTransform(config.eval_size or plan.base_size, size, plan.operator, config.crop_pct)
    return eval_loader(source, transform, batch, *share)


def make_train_set(config: Config, plan: Plan, source: Source) -> TrainSet | TrainScenes:
    """The training images as the loader's workers make them."""
    bad_files = BadFiles(config.max_bad, config.output_dir)
    if config.task in DENSE_TASKS:
        return TrainScenes(source, make_scene_transform(config, plan), bad_files)
    transform = TrainTransform(
        plan.base_size,
        plan.operator,
        RandAugment(),
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip=config.hflip,
        color_jitter=config.color_jitter,
        interpolation=config.train_interpolation,
        pipeline=config.pipeline,
    )
    return TrainSet(source, DeviceTransform(transform) if config.augment_on == "device" else transform, bad_files)


def make_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """fp16's; of constant scale 1 where it only serves to skip steps that are not finite; else disabled."""
    if config.amp != "fp16" and config.on_nonfinite == "skip":
        return torch.amp.GradScaler(device.type, init_scale=1.0)
    return torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of that name over our parameter groups; the fused or foreach form where there is one."""
    options: dict[str, Any] = {}
    if config.opt_eps is not None:
        options["eps"] = config.opt_eps
    if config.opt_betas is not None:
        options["betas"] = config.opt_betas
    if config.opt in ("adamw", "adam", "sgd"):
        options["fused"] = True
    muon = config.opt == "muon"
    if config.momentum is not None:
        options["momentum"] = config.momentum
    with as_usage():
        groups = param_groups(model, config.weight_decay, config.layer_decay, matrices=muon)
    try:
        if muon:
            scale = config.fallback_lr_scale or (0.1 if has_batch_norm(model) else 1.0)
            for group in groups:
                group["lr_scale"] *= 1.0 if group["matrix"] else scale
            return Muon(groups, config.lr, config.weight_decay, **options)
        return create_optimizer_v2(groups, config.opt, lr=config.lr, weight_decay=config.weight_decay, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"--opt {config.opt}: {error}") from None


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in model.modules())


def make_finish(config: Config, num_classes: int, operator: str) -> Finish:
    """What happens to a batch on the device."""
    if config.task in DENSE_TASKS:
        return SceneFinish(config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD, config.channels_last)
    return Finish(
        num_classes=num_classes,
        mean=config.mean or IMAGENET_MEAN,
        std=config.std or IMAGENET_STD,
        operator=operator,
        base_size=config.input_size,
        erasing=config.reprob,
        mixup=config.mixup,
        cutmix=config.cutmix,
        mixup_prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        smoothing=config.smoothing,
        channels_last=config.channels_last,
    )


def make_task(config: Config, model: nn.Module, classes: int) -> Task:
    """What the run learns; ``classes`` are the data set's."""
    if config.task == "detection":
        return Detection(has_masks(config))
    if config.task == "segmentation":
        return Segmentation()
    if config.task == "mae":
        return Reconstruction(model.patch_side)
    return MultiLabel(classes) if config.task == "multilabel" else Classification(config.smoothing)


def blank_targets(config: Config, images: int, classes: int) -> torch.Tensor:
    """Targets of a batch that only costs time and memory as the run's do."""
    if config.task == "multilabel":
        return torch.zeros(images, classes)
    return torch.zeros(images, dtype=torch.long)


def make_training(config: Config, plan: Plan, sampler: CurriculumSampler, model: nn.Module, classes: int) -> Training:
    """All that an optimizer step works on; ``model`` lies on its device and is not wrapped yet.

    Raises:
        UsageError: an optimizer that cannot be made.
    """
    device = next(model.parameters()).device
    ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
    scaler, skip = make_scaler(config, device), config.on_nonfinite == "skip"
    return Training(
        model=model,
        ema=ema,
        optimizer=make_optimizer(config, model),
        scaler=scaler,
        finish=make_finish(config, classes, plan.operator),
        plan=plan,
        sampler=sampler,
        device=device,
        task=make_task(config, model, classes),
        loss=LossMeter(device, scaler.is_enabled(), skip, max_skipped(plan) if skip else NEVER),
        amp=config.amp,
        clip_grad=config.clip_grad,
        skip_nonfinite=skip,
    )


def synchronise(model: nn.Module, topology: Topology, sampler: CurriculumSampler) -> nn.Module:
    """BatchNorm over all devices in a model that asks for it: a detector's heads see few images on each. CUDA only.

    Raises:
        UsageError: not all devices take as many groups, so that one would wait for ever for the others' forward pass.
    """
    if not (getattr(model, "sync_batch_norm", False) and topology.world_size > 1 and topology.device.type == "cuda"):
        return model
    for stage in sampler.plan.stages:
        if len({*sampler.shares(stage)}) > 1:
            raise UsageError(
                f"--micro_batch {sampler.micro_batch} makes {stage.batch_size // sampler.micro_batch} groups, which "
                f"{topology.world_size} devices cannot share evenly, as BatchNorm over all devices needs: choose a "
                "--batch_size that they can, or fewer devices"
            )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def place(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The model on its device, in the memory format asked for."""
    model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model
