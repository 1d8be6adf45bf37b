"""The speed checks of gpu_check.py. Each yields (what, value, bar, whether it is met); bars are a GPU's."""

import time
from dataclasses import replace

import torch
from gpu_right import augmented, settings
from speed import CLASSES, build, clock, compute_of, loop_and_bare, run_plan, synthetic

from commands import doctor
from engine import train_epoch
from models.flops import count_flops
from training.build import make_model, make_plan
from utils import Topology

MODELS = ("convnext_tiny", "deit_small", "swin_tiny", "resnet50")


def config_of(machine, name: str, size: int, **changes):
    """A batch that fills an H100, or one that a CPU trains in a moment."""
    batch = 8 if not machine.gpu else 256 * 224**2 // size**2 // 64 * 64
    fast = {"amp": "bf16", "channels_last": True} if machine.gpu else {}
    values = {"model": name, "input_size": size, "batch_size": batch, "micro_batch": batch, "epochs": 1, **fast}
    return settings(**{**values, "num_images": batch, "model_ema": True, **changes})


def bar(machine, value: float, least: float) -> tuple[float, str, bool | None]:
    return value, f">= {least}", value >= least if machine.gpu and not machine.quick else None


def cases(machine):
    if not machine.gpu or machine.quick:
        return [("test_resnet", 32), ("test_resnet", 64)]
    return [(name, size) for name in MODELS for size in (96, 160, 224)]


def loop(machine):
    """The project's loop, from uint8 images, over a bare one on float images that lie on the device."""
    steps, repetitions = (1, 1) if machine.quick else (10, 2)
    least = {96: 0.93}
    for name, size in [*cases(machine), *([("deit_tiny", 96)] if machine.gpu and not machine.quick else [])]:
        ours, bare = loop_and_bare(config_of(machine, name, size), size, machine.device, steps, repetitions)
        yield f"{name} at {size}, over a bare loop", *bar(machine, ours / bare, least.get(size, 0.97))


def host(machine):
    """The host's time to issue a step over the GPU's to do it."""
    for name, size in cases(machine):
        config = config_of(machine, name, size, epochs=40)
        plan, training = build(config, config.batch_size, machine.device)
        batches, records = synthetic(plan, training), iter(plan)
        for _ in range(5):
            train_epoch(training, next(records), batches, lambda *_: False)
        issued, done = 0.0, 0.0
        for _ in range(20):
            started = clock(machine.device)
            train_epoch(training, next(records), batches, lambda *_: False)
            issued += time.perf_counter() - started
            done += clock(machine.device) - started
        value = issued / done
        yield f"{name} at {size}", value, "<= 0.6", value <= 0.6 if not machine.quick else None


def sizes(machine):
    """Images/s at B over those at the base size, as a share of what the FLOPs promise."""
    steps, repetitions = (1, 1) if machine.quick else (10, 2)
    names = dict.fromkeys(name for name, _ in cases(machine))
    base = max(size for _, size in cases(machine))
    for name in names:
        rates, all_sizes = {}, sorted({size for other, size in cases(machine) if other == name})
        for size in all_sizes:
            rates[size], _ = loop_and_bare(config_of(machine, name, size), size, machine.device, steps, repetitions)
        config = config_of(machine, name, base)
        flops, _ = count_flops(lambda size: make_model(config, CLASSES, size), all_sizes)  # noqa: B023
        for size in all_sizes[:-1]:
            share = rates[size] / rates[base] / (flops[base] / flops[size])
            yield (
                f"{name}: {size} over {base}, share of the FLOP ratio",
                *bar(machine, share, 0.85 if size < 128 else 0.9),
            )


def whole_run(machine):
    """EfficientTrain++ against the ordinary plan, from images in memory, at a small scale; the doctor's foresight."""
    small = not machine.gpu or machine.quick
    name, size, images, epochs = ("test_resnet", 64, 64, 2) if small else ("convnext_tiny", 224, 12800, 3)
    config = config_of(machine, name, size, epochs=epochs, curriculum="efficienttrain++")
    config = replace(config, batch_size=16 if small else 512, micro_batch=8 if small else 128)
    ordinary = replace(config, curriculum="none", magnitude="linear", epochs=epochs * 1.5)
    done, full = (run_plan(settings_of, images, machine.device) for settings_of in (config, ordinary))
    wall, compute = full["seconds"] / done["seconds"], compute_of(ordinary, images) / compute_of(config, images)
    yield f"{name}: wall speed-up {wall:.2f} over FLOP speed-up {compute:.2f}", *bar(machine, wall / compute, 0.95)
    slowest = max(done["switches"], default=0.0)
    yield "slowest switch of the input size, s", slowest, "< 3", slowest < 3 if machine.gpu else None
    predicted, plan, topology = 0.0, make_plan(config, images, CLASSES), Topology(0, 1, machine.device)
    doctor.SECONDS = 0.02 if small else 1.5
    for stage in plan.stages:
        passes = build(config, images, machine.device)[1].sampler.forward_passes(plan.locate(stage.first_step)[0])
        most = max(map(len, passes)) * config.micro_batch
        model = make_model(config, CLASSES, stage.input_size)
        forward, update = doctor.step_seconds(config, plan, model, most, config.micro_batch, topology)
        predicted += stage.steps * (forward / most * stage.batch_size + update)
    off = abs(predicted / done["seconds"] - 1)
    yield "the doctor's seconds for it, off by", off, "<= 0.1", off <= 0.1 if machine.gpu and not small else None


def augmenting(machine):
    """Training on images that are augmented on the device over such as the host has augmented."""
    name, size = cases(machine)[-1]
    config = config_of(machine, name, size, epochs=8 if machine.quick else 40)
    rates = {}
    for kind in (synthetic, augmented):
        plan, training = build(config, config.batch_size, machine.device)
        batches = kind(plan, training) if kind is synthetic else kind(plan, training, machine.device)
        records = iter(plan)
        for _ in range(3):
            train_epoch(training, next(records), batches, lambda *_: False)
        started, steps = clock(machine.device), 4 if machine.quick else 20
        for _ in range(steps):
            train_epoch(training, next(records), batches, lambda *_: False)
        rates[kind] = steps / (clock(machine.device) - started)
    yield f"{name} at {size}", *bar(machine, rates[augmented] / rates[synthetic], 0.9)


def options(machine):
    """What TF32 and compilation are worth, printed only."""
    steps, repetitions = (1, 1) if machine.quick else (5, 1)
    for name, size in cases(machine):
        if size not in (64, 224):
            continue
        for compiles in (False, True):
            for amp, precision in (("none", "highest"), ("none", "high"), ("bf16", "high")):
                if amp == "none" and name not in ("convnext_tiny", "test_resnet"):
                    continue
                torch.set_float32_matmul_precision(precision)
                torch.backends.cudnn.allow_tf32 = precision == "high"
                config = config_of(machine, name, size, amp=amp, compile=compiles)
                rate, _ = loop_and_bare(config, size, machine.device, steps, repetitions)
                label = {"none": f"fp32{', TF32' * (precision == 'high')}", "bf16": "bf16"}[amp]
                yield f"{name} at {size}, {label}{', compiled' * compiles}: images/s", rate, "", None
    torch.backends.cudnn.allow_tf32 = True
