"""Memory and speed, as gpu_check.py checks them. Each yields (what, value, bar, whether met), with a GPU's bars."""

import functools
from dataclasses import replace

import torch
from gpu_right import ROOT, augmented, settings
from speed import CLASSES, WARM_UP, build, clock, compute_of, in_turn, loop_and_bare, our_loop, run_plan, synthetic

from commands import autobatch, doctor
from config import Config
from config.command_line import parse_config
from engine import train_epoch
from models.flops import count_flops
from training.build import make_model, make_plan
from utils import Topology

MODELS = ("convnext_tiny", "deit_small", "swin_tiny", "resnet50")
FAST = ("in1k/deit_small_fast60", "in1k/convnext_tiny_fast60")  # recipes, beside the ordinary ones of 300 epochs


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


@functools.cache
def rates_of(machine, name: str, size: int) -> tuple[float, float]:
    """Images/s of the project's loop and of a bare one: 20 steps each, and some to warm up."""
    steps, repetitions = (1, 1) if machine.quick else (5, 4)
    return loop_and_bare(config_of(machine, name, size), size, machine.device, steps, repetitions)


def memory(machine):
    """--micro_batch auto: what it finds trains, and fills the memory it may."""
    # A batch of many divisors, so that groups come close to what the memory holds.
    config = parse_config(["--model", "resnet50", "--amp", "bf16", "--batch_size", "15120", "--num_images", "1281167"])
    plan = make_plan(config, config.num_images, CLASSES)
    model_of = functools.partial(make_model, config, CLASSES)
    topology = Topology(0, 1, machine.device)
    micro, forward = autobatch.find(config, plan, model_of, topology)
    total = torch.cuda.get_device_properties(machine.device).total_memory
    for size, images in forward.items():
        torch.cuda.reset_peak_memory_stats()
        blank = autobatch.Blank(config, plan, model_of(size), images, micro, topology)
        for _ in range(20):
            blank.forward_and_backward()
            blank.update()
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() / total
        whole = size == plan.base_size  # smaller images come in whole groups of its size
        met = 0.72 <= used <= 0.92 if whole else used <= 0.92
        yield f"auto: {images} images of {size}, share of the memory", used, "0.72 .. 0.92" if whole else "<= 0.92", met
        del blank
    found = replace(config, micro_batch=micro, forward_batch=forward, epochs=1)
    for size, spare in run_plan(found, 8 * config.batch_size, machine.device)["spare"].items():
        yield f"at {size}, most reserved over most allocated", spare, "<= 1.25", spare <= 1.25


def loop(machine):
    """The project's loop, from uint8 images, over a bare one on float images that lie on the device."""
    least = {96: 0.93}
    for name, size in [*cases(machine), *([("deit_tiny", 96)] if machine.gpu and not machine.quick else [])]:
        ours, bare = rates_of(machine, name, size)
        yield (
            f"{name} at {size}: {ours:,.0f} images/s, over a bare loop",
            *bar(machine, ours / bare, least.get(size, 0.97)),
        )


def host(machine):
    """The host's time to issue a step (that of a batch too small to keep the GPU busy) over the GPU's to do it."""
    steps, repetitions = (1, 1) if machine.quick else (10, 2)
    for name, size in cases(machine):
        config = config_of(machine, name, size)
        small = replace(config, batch_size=8, micro_batch=8, num_images=8)
        run = our_loop(small, machine.device, steps, repetitions + WARM_UP)
        issued = min(in_turn({name: run}, repetitions, machine.device)[name]) / steps
        value = issued / (config.batch_size / rates_of(machine, name, size)[0])
        yield f"{name} at {size}: {1000 * issued:.0f} ms", value, "<= 0.6", value <= 0.6 if not machine.quick else None


def sizes(machine):
    """Images/s at B over those at the base size, as a share of what the FLOPs promise."""
    names = dict.fromkeys(name for name, _ in cases(machine))
    base = max(size for _, size in cases(machine))
    for name in names:
        all_sizes = sorted({size for other, size in cases(machine) if other == name})
        config = config_of(machine, name, base)
        flops, _ = count_flops(lambda size: make_model(config, CLASSES, size), all_sizes)  # noqa: B023
        for size in all_sizes[:-1]:
            faster = rates_of(machine, name, size)[0] / rates_of(machine, name, base)[0]
            share = faster / (flops[base] / flops[size])
            yield (
                f"{name}: {size} over {base}, share of the FLOP ratio",
                *bar(machine, share, 0.85 if size < 128 else 0.9),
            )


def whole_run(machine):
    """EfficientTrain++ against the ordinary plan, from images in memory, at a small scale; the doctor's foresight."""
    small = not machine.gpu or machine.quick
    name, size, images, epochs = ("test_resnet", 64, 64, 2) if small else ("convnext_tiny", 224, 12_800, 3)
    config = config_of(machine, name, size, epochs=epochs, curriculum="efficienttrain++")
    config = replace(config, batch_size=16 if small else 1024, micro_batch=8 if small else 256)
    ordinary = replace(config, curriculum="none", magnitude="linear", epochs=epochs * 1.5)
    # Once before, for what every process does once, at every size of image and batch, is no part of a long run.
    cold, done, full = (run_plan(plan, images, machine.device) for plan in (config, config, ordinary))
    # A run of the papers' length is 300 times as long, and switches as often: they are told on their own.
    wall = full["seconds"] / (done["seconds"] - sum(done["switches"]))
    compute = compute_of(ordinary, images) / compute_of(config, images)
    yield (
        f"{name}: wall speed-up {wall:.2f} over FLOP speed-up {compute:.2f}, without switches",
        *bar(machine, wall / compute, 0.95),
    )
    yield "seconds of its switches, each with a step", ", ".join(f"{s:.1f}" for s in done["switches"]), "", None
    slowest = max(cold["switches"], default=0.0)
    yield "slowest of them in a new process, s", slowest, "< 3", slowest < 3 if machine.gpu and not small else None
    off = abs(foreseen(machine, config, images) / done["seconds"] - 1)
    yield "the doctor's seconds for it, off by", off, "<= 0.1", off <= 0.1 if machine.gpu and not small else None


def foreseen(machine, config: Config, images: int) -> float:
    """Seconds of a plan's training as the doctor reckons them, from measured steps."""
    plan, topology, total = make_plan(config, images, CLASSES), Topology(0, 1, machine.device), 0.0
    doctor.SECONDS = 0.02 if machine.quick or not machine.gpu else 1.5
    sampler = build(config, images, machine.device)[1].sampler
    for stage in plan.stages:
        passes = sampler.forward_passes(plan.locate(stage.first_step)[0])
        most = max(map(len, passes)) * sampler.micro_batch
        model = make_model(config, CLASSES, stage.input_size)
        forward, update = doctor.step_seconds(config, plan, model, most, sampler.micro_batch, topology)
        total += stage.steps * (forward / most * stage.batch_size + update)
    return total


def fast(machine):
    """The fast recipe against ordinary AdamW of 300 epochs: how much less time by measured steps, over how much less
    compute; Muon's own time counts."""
    small = {"model": "test_resnet", "model_args": None, "input_size": 64, "batch_size": 16, "num_images": 64}
    for recipe in FAST[:1] if machine.quick else FAST:
        configs = []
        for name in (recipe, recipe.replace("fast60", "base300")):
            config = parse_config(["--recipe", str(ROOT / "recipes" / f"{name}.yaml"), "--amp", "bf16"])
            config = replace(config, channels_last=True, micro_batch=256)
            configs.append(replace(config, **small, micro_batch=8) if machine.quick else config)
        images = 64 if machine.quick else 1_281_167
        less, ordinary = ((foreseen(machine, c, images), compute_of(c, images)) for c in configs)
        seconds, compute = (b / a for a, b in zip(less, ordinary))
        yield f"{recipe}: {seconds:.2f} less time, {compute:.2f} less compute", *bar(machine, seconds / compute, 0.9)


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
    steps, repetitions = (1, 1) if machine.quick else (5, 2)
    size = max(size for _, size in cases(machine))
    names = [name for name, side in cases(machine) if side == size]
    kinds = [(names[0], "none", "highest", False), (names[0], "none", "high", False), (names[0], "none", "high", True)]
    for name, amp, precision, compiles in [*kinds, *((name, "bf16", "high", True) for name in names)]:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision == "high"
        config = config_of(machine, name, size, amp=amp, compile=compiles)
        run = our_loop(config, machine.device, steps, repetitions + WARM_UP)
        seconds = in_turn({name: run}, repetitions, machine.device)[name]
        rate = config.batch_size * steps / min(seconds)
        label = {"none": f"fp32{', TF32' * (precision == 'high')}", "bf16": "bf16"}[amp]
        yield f"{name} at {size}, {label}{', compiled' * compiles}: images/s", rate, "", None
