"""The correctness checks of gpu_check.py. Each yields (what, value, bar, whether it is met)."""

import contextlib
import copy
import functools
import io
import itertools
import os
import runpy
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from speed import CLASSES, Photos, build, run_plan, synthetic

import engine
from config import Config
from curriculum import RandAugment, low_frequency_crop, set_input_size
from curriculum.device_augment import NAMES, DeviceAugment, encode
from engine import train_epoch
from inputs import finish as finishing
from inputs.finish import Finish
from models import checkpoints, create_model
from training import session

FAMILIES = ("resnet50", "convnext_tiny", "deit_small", "swin_tiny", "cswin_tiny", "pvt_tiny", "caformer_s18")
TINY = {"swin_tiny": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}}
ROOT = Path(__file__).resolve().parent.parent
SMALL = {"input_size": 64, "batch_size": 16, "micro_batch": 8, "epochs": 2, "lr": 1e-3, "warmup_epochs": 0}
MAE = {
    "task": "mae",
    "model": "vit_tiny_patch16_224",
    "mixup": 0.0,
    "cutmix": 0.0,
    "decoder": [2, 64, 4],
    "reprob": 0.0,
    "magnitude": "none",
}


def settings(**changes):
    return Config(**{"model": "resnet18", "num_images": 64, "curriculum": "none", **SMALL, **changes})


def synchronisations(machine):
    """Two steps of every kind under the mode in which a synchronisation is an error."""
    for amp, option in itertools.product(("none", "bf16", "fp16"), ("clip", "ema", "skip", "fourier", "mae", "device")):
        changes = {
            "clip": {"clip_grad": 1.0},
            "ema": {"model_ema": True},
            "skip": {"on_nonfinite": "skip"},
            "fourier": {"curriculum": "efficienttrain"},
            "mae": MAE,
            "device": {"augment_on": "device"},
        }[option]
        config = settings(amp=amp, **changes)
        plan, training = build(config, 64, machine.device)
        batches = synthetic(plan, training)
        if option == "device":
            batches = augmented(plan, training, machine.device)
        stops = itertools.cycle([False, True])  # two steps at a time
        train_epoch(training, plan.records[0], batches, lambda *_: next(stops))  # noqa: B023
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_epoch(training, plan.records[0], batches, lambda *_: next(stops))  # noqa: B023
            value = "0"
        except RuntimeError as error:
            value = str(error).splitlines()[0][:60]
        torch.cuda.set_sync_debug_mode("default")
        yield f"{amp} {option}", value, "0", value == "0"


def augmented(plan, training, device):
    """Synthetic batches, RandAugment and flips on the device, as the loader would hand them on."""
    augment = DeviceAugment(plan.operator, RandAugment().fill)
    for images, labels in synthetic(plan, training):
        yield augment(images.to(device, non_blocking=True), choices(len(images)), images.shape[-1]), labels


def choices(count):
    rows = [
        encode(k % 2 == 0, [(NAMES[k % len(NAMES)], (0.3,)), (NAMES[-1 - k % len(NAMES)], (0.2,))], 2)
        for k in range(count)
    ]
    return torch.stack([torch.from_numpy(row) for row in rows])


def folder_of(machine) -> Path:
    """A small set of real files, made once."""
    root = machine.folder / "data"
    if not root.exists():
        photos = Photos(64, (60, 80))
        for split, count in (("train", 64), ("val", 16)):
            for index in range(count):
                path = root / split / str(index % 4) / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(photos.read(index))
    return root


@functools.cache
def main_program():
    return runpy.run_path(str(ROOT / "main.py"))["main"]


def launch(machine, name, **changes) -> tuple[int, str]:
    """main.py with these settings in this process: its exit code and what it printed."""
    values = {
        "data_path": folder_of(machine), "output_dir": machine.folder / name, "model": "test_resnet", "num_workers": 0,
        "log_interval": "2 steps", "eval_interval": "100%", "save_interval": "100%", "device": machine.device.type,
        **SMALL, **changes,
    }  # fmt: skip
    argv = [text for key, value in values.items() if value is not None for text in (f"--{key}", _text(value))]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return main_program()(argv), printed.getvalue()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def weights(machine, name):
    state = checkpoints.load(machine.folder / name / checkpoints.LAST)
    return {**state["model"], **{f"ema {key}": value for key, value in (state["model_ema"] or {}).items()}}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def resuming(machine):
    """Stopped and resumed against uninterrupted, deterministic: the same bytes."""
    kinds = {"resnet": {}, "device augmentation": {"augment_on": "device"}}
    if not machine.quick:
        swin = {"model": "swin_tiny", "input_size": 224, "batch_size": 8, "micro_batch": 4}
        kinds.update({"resnet": {"model": "resnet18"}, "swin": swin, "mae": MAE})
    for kind, changes in kinds.items():
        changes = {"deterministic": True, "model_ema": True, **changes}
        whole, parts = f"whole {kind}", f"parts {kind}"
        codes = [launch(machine, whole, **changes), launch(machine, parts, stop_after="5 steps", **changes)]
        codes.append(launch(machine, parts, **changes))
        same = equal(weights(machine, whole), weights(machine, parts))
        failed = next((text for code, text in codes if code), "")
        yield kind, "equal" if same else failed or "differ", "equal", same and not failed


def cpu_and_gpu_agree(machine):
    """The same numbers on the CPU and on the GPU."""
    torch.set_float32_matmul_precision("high")  # what is done to images must not care
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 96, 96), generator=generator, dtype=torch.uint8)
    labels, seeds = torch.randint(0, 10, (64,), generator=generator), [1, 2, 3, 4]

    # The generators of the two differ: noise comes from the CPU's for both.
    drawn = finishing.noise_like
    finishing.noise_like = lambda x, counts, s: drawn(torch.empty(x.shape), counts, s).to(x.device)
    try:
        pairs = [Finish(10, base_size=96).train(images.to(d), labels.to(d), 96, seeds, 16) for d in ("cpu", "cuda")]
    finally:
        finishing.noise_like = drawn
    yield worst("finishing", *(pair[0] for pair in pairs), 1e-6 * 3)

    real = torch.randn(8, 3, 224, 224, generator=generator)
    for name, context in {
        "crop": contextlib.nullcontext(),
        "crop, bf16": torch.autocast("cuda", torch.bfloat16),
    }.items():
        with context:
            yield worst(name, low_frequency_crop(real, 96), low_frequency_crop(real.cuda(), 96), 1e-5)

    augment = DeviceAugment("lanczos", RandAugment().fill)
    both = [augment(images.to(d), choices(64), 64).cpu().float() for d in ("cpu", "cuda")]
    off = (both[0] - both[1]).abs().mean().item()
    yield "device augmentation, levels in the mean", off, "<= 0.05", off <= 0.05

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    models = [create_model("test_vit", 10, 64)]
    models.append(copy.deepcopy(models[0]).cuda())
    moments = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
        set_input_size(model, 96, optimizer)
        moments.append(optimizer.state[model.pos_embed]["exp_avg"])
    yield worst("resized parameters", models[0].pos_embed, models[1].pos_embed, 1e-6)
    yield worst("resized moments", *moments, 1e-6)
    for name in ("resnet50", "swin_tiny", "convnext_tiny"):
        model = create_model(name, CLASSES, 224).eval()
        with torch.inference_mode():
            yield worst(f"fp32 logits {name}", model(real), copy.deepcopy(model).cuda()(real.cuda()), 1e-3)
    torch.backends.cudnn.allow_tf32 = True


def worst(what, a, b, bar):
    off = (a.detach().cpu().float() - b.detach().cpu().float()).abs().max().item()
    return what, off, f"<= {bar:g}", off <= bar


def end_to_end(machine):
    """main.py over three stages, stopped by a signal and resumed; another memory format on resume."""
    for amp in ("bf16",) if machine.quick else ("bf16", "fp16"):
        shared = {"amp": amp, "model_ema": True, "epochs": 4, "curriculum": "efficienttrain++"}
        original = session.Session.after_step

        def after_step(self, lr, images, original=original):
            if self.training.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, lr, images)

        session.Session.after_step = after_step
        try:
            stopped, text = launch(machine, amp, **shared)
        finally:
            session.Session.after_step = original
        yield f"{amp}: SIGTERM", stopped if stopped == 75 else text[-200:], "75", stopped == 75
        code, text = launch(machine, amp, channels_last=True, **shared)
        yield f"{amp}: resumed, channels_last changed", code if code == 0 else text[-200:], "0", code == 0


def switching(machine):
    """Every family of models trains through the input sizes of a plan."""
    names = ("test_vit", "swin_tiny") if machine.quick else FAMILIES
    for name in names:
        config = settings(model=name, curriculum="efficienttrain++", model_ema=True, input_size=224)
        config = replace(config, model_args=TINY.get(name), input_size=64) if machine.quick else config
        rates = run_plan(config, 64, machine.device)["rates"]
        yield f"{name}: {', '.join(map(str, rates))}", len(rates), ">= 2", len(rates) >= 2


def tasks(machine):
    """main.py on every task beside classification, evaluated at its end."""
    try:
        from demo_scenes import build as build_scenes
    except ImportError:
        yield "needs scikit-image", "-", "", None
        return
    scenes = machine.folder / "scenes"
    build_scenes(scenes, 0, 16, 8)
    dense = {"data_path": scenes, "epochs": 1, "baseline_epochs": 1, "model": "resnet18", "input_size": None}
    kinds = {"mae": {**MAE, "data_path": folder_of(machine)}}
    for name in ("detection", "segmentation"):
        kinds[name] = {"recipe": ROOT / "recipes" / f"demo_{name}.yaml", **dense}
    for name, changes in kinds.items():
        for amp in ("bf16",) if machine.quick else ("none", "bf16"):
            code, text = launch(machine, f"{name} {amp}", amp=amp, **changes)
            yield f"{name}, {amp}", code if code == 0 else text[-200:], "0", code == 0


def data_parallel(machine):
    """One process that reduces as one of several would, over NCCL on a GPU: the same weights as alone."""
    changes = {"model_ema": True, "deterministic": True, "curriculum": "efficienttrain++", "epochs": 4}
    codes = [launch(machine, "alone", **changes)]
    wrap, program = session.wrap, main_program().__globals__

    def several(model, topology, compiles):
        return wrap(model, replace(topology, world_size=2), compiles)

    # An error does not end this process, but is a row of the table.
    own = mock.patch.dict(program, wrap=several, end_now=lambda code: None)
    with own, mock.patch.object(session, "wrap", several):
        for stop in ("5 steps", None):
            store = dist.HashStore()
            dist.init_process_group("nccl" if machine.gpu else "gloo", store=store, rank=0, world_size=1)
            codes.append(launch(machine, "one of several", stop_after=stop, **changes))
            if dist.is_initialized():  # main.py takes it down when all went well
                dist.destroy_process_group()
    failed = next((text[-200:] for code, text in codes if code), "")
    same = not failed and equal(weights(machine, "alone"), weights(machine, "one of several"))
    yield "stopped and resumed against alone", "equal" if same else failed or "differ", "equal", same


def compiled(machine):
    """The first loss compiled against eager, and no compilation after a stage's second step."""
    # Without a GPU, the graphs are captured and differentiated but not turned into code of their own.
    wrapper = torch.compile if machine.gpu else functools.partial(torch.compile, backend="aot_eager")
    real_compile = torch.compile
    for amp, bar in (("bf16", 2e-2),) if machine.quick else (("none", 1e-4), ("bf16", 2e-2)):
        losses = {}
        for compiles in (False, True):
            torch.compile = lambda model, **options: wrapper(model, **options)
            try:
                torch._dynamo.reset()
                torch.manual_seed(0)
                config = settings(
                    compile=compiles, amp=amp, model="test_resnet", curriculum="efficienttrain++", epochs=4
                )
                plan, training = build(config, 64, machine.device)
                batches, seen = synthetic(plan, training), []
                original = engine.forward_loss

                def forward_loss(*args, original=original, seen=seen):
                    seen.append(original(*args))
                    return seen[-1]

                engine.forward_loss = forward_loss
                counts = []
                try:
                    train_epoch(
                        training, plan.records[0], batches,
                        lambda *_: counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]),  # noqa: B023
                    )  # fmt: skip
                finally:
                    engine.forward_loss = original
                losses[compiles] = seen[0].item()
            finally:
                torch.compile = real_compile
        off = abs(losses[True] - losses[False])
        yield f"first loss, {amp}", off, f"<= {bar:g}", off <= bar
        yield f"graphs after the second step, {amp}", str(counts[-1] - counts[1]), "0", counts[-1] == counts[1] > 0
