"""The parts of a run, made from its settings: plan, model, batches, optimizer; and filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from checkpoints import BadCheckpoint
from config import Config, load_curriculum
from curriculum import CurriculumSampler, Plan, RandAugment, build_plan, check_input_sizes, parse_duration
from datasets import Source, TrainSet, training_batches
from inputs.bad_files import BadFiles
from inputs.device import DeviceAugment, DeviceTransform
from inputs.finish import IMAGENET_MEAN, IMAGENET_STD, Finish
from inputs.replay import replay_capacity
from inputs.transforms import TrainTransform
from models import create_mae, create_model, param_groups
from models.weights import nonfinite
from optimizer_state import load_optimizer_state
from tasks import Classification, Reconstruction, Task


def make_plan(config: Config, num_images: int, classes: int) -> Plan:
    """The plan of a run, every size of which the model was seen to take."""
    with torch.device("meta"):
        probe = make_model(config, classes, config.input_size)
    plan = build_plan(
        load_curriculum(config.curriculum),
        epochs=config.epochs,
        num_images=num_images,
        batch_size=config.batch_size,
        base_size=config.input_size,
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
        replay=config.replay or (),
    )
    for duration in (config.log_interval, config.eval_interval):
        parse_duration(duration)
    check_input_sizes(probe, sorted({stage.input_size for stage in plan.stages} | {config.eval_size or plan.base_size}))
    return plan


def make_model(config: Config, classes: int, input_size: int) -> nn.Module:
    options = config.model_args or {}
    if config.task == "mae":
        options = {"target": config.mae_target, "mask_ratio": config.mask_ratio, "decoder": config.decoder, **options}
        return create_mae(config.model, input_size, config.drop_path, **options)
    return create_model(config.model, classes, input_size, config.drop_path, **options)


def number_of_classes(config: Config, source: Source) -> int:
    """The model's outputs: the data set's classes, or more if --num_classes says so."""
    found = len(source.classes)
    if config.num_classes is not None and config.num_classes < found:
        raise ValueError(f"--num_classes is {config.num_classes} but the data set has {found} classes")
    return config.num_classes or found


def describe_replay(config: Config, plan: Plan) -> list[str]:
    """What the replay buffer will hold, a line for each stage that has one.

    Raises:
        ValueError: --replay_memory is more than this machine has.
    """
    lines = []
    for stage in plan.stages:
        if stage.replay > 1:
            side = plan.base_size if plan.operator == "fourier" else stage.input_size
            capacity = replay_capacity(config.replay_memory * 1e9, side)
            lines.append(
                f"replay at B {stage.input_size}: one image in {stage.replay} is loaded; in each process the buffer "
                f"takes up to {config.replay_memory:g} GB ({capacity:,} images)"
            )
    return lines


def make_batches(
    config: Config, plan: Plan, sampler: CurriculumSampler, source: Source, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches for the rest of the run, uint8 images and targets, one per forward pass."""
    on_device = DeviceAugment(plan.operator, RandAugment().fill) if config.augment_on == "device" else None
    data = make_train_set(config, plan, source)
    return training_batches(data, sampler, device, config.num_workers, on_device, config.replay_memory * 1e9)


def make_train_set(config: Config, plan: Plan, source: Source) -> TrainSet:
    """The training images as the loader's workers make them."""
    transform = TrainTransform(
        plan.base_size,
        plan.operator,
        RandAugment(),
        scale=config.crop_scale,
        flip=config.hflip,
        pipeline=config.pipeline,
    )
    return TrainSet(
        source,
        DeviceTransform(transform) if config.augment_on == "device" else transform,
        BadFiles(config.max_bad, config.output_dir),
    )


def make_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """fp16's; of constant scale 1 where it only serves to leave out steps that are not finite; else disabled."""
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
    groups = param_groups(model, config.weight_decay, config.layer_decay)
    try:
        return create_optimizer_v2(
            groups, config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **options
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"--opt {config.opt}: {error}") from None


def make_finish(config: Config, num_classes: int, operator: str) -> Finish:
    """What happens to a batch on the device."""
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


def make_task(config: Config, model: nn.Module) -> Task:
    """What the run learns."""
    return Reconstruction(model.patch_side) if config.task == "mae" else Classification(config.smoothing)


def size_of_weights(plan: Plan, state: dict[str, Any] | None) -> int:
    """The input size that a checkpoint's weights are for: the one that was trained last."""
    if state is None:
        return plan.records[0].input_size
    return state["input_size"] or plan.locate(max(state["step"] - 1, 0))[0].input_size


def load_state(
    state: dict[str, Any],
    identity: dict[str, Any],
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Fills a run's parts from a checkpoint. Raises BadCheckpoint where they do not fit it.

    A moving average that the checkpoint lacks starts from its weights; the state of another optimizer is not taken.
    """
    for key in ("model", "model_ema"):
        if bad := nonfinite(state[key] or {}):
            raise BadCheckpoint(
                f"the checkpoint of step {state['step']} holds numbers that are not finite, in {key} {bad[0]}: take an "
                "earlier one"
            )
    try:
        model.load_state_dict(state["model"])
        if ema is not None:
            ema.module.load_state_dict(state["model_ema"] or state["model"])
        if state["identity"] is None or state["identity"]["optimizer"] == identity["optimizer"]:
            load_optimizer_state(optimizer, state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadCheckpoint(f"the checkpoint of step {state['step']} does not fit these settings: {reason}") from None
