"""Speed of single parts as ratios to a plain form, the two run in turn: `python scripts/bench.py crop [--json]`."""

import argparse
import copy
import itertools
import json
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import bench_index
import bench_input
import bench_shards
import torch
from speed import CLASSES, Photos, compute_of, in_turn, loop_and_bare, run_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config, UsageError
from config.command_line import parse_config
from curriculum import CurriculumSampler, build_plan, low_frequency_crop
from engine import Training, train_epoch
from inputs.finish import Finish
from models import create_model
from training.build import make_plan
from training.numerics import LossMeter
from training.tasks import Classification
from utils import die

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"


def crop(args: argparse.Namespace) -> dict:
    """The Fourier crop against fft2 / index the block / ifft2; one thread."""
    torch.set_num_threads(1)
    images = torch.randn(args.batch, 3, args.base_size, args.base_size)
    result = {"crop": {}, "spread": {}}
    for size in args.sizes:
        error = (low_frequency_crop(images, size) - crop_by_fft(images, size)).abs().max().item()
        if not error < 1e-4:
            raise SystemExit(f"error: the two crops to {size} differ by {error:.1e}")
        variants = {"fft": partial(crop_by_fft, images, size), "crop": partial(low_frequency_crop, images, size)}
        seconds = in_turn(variants, args.repetitions)
        ratios = [fft / crop for fft, crop in zip(seconds["fft"], seconds["crop"])]
        result["crop"][str(size)] = round(statistics.median(ratios), 2)
        result["spread"][str(size)] = [round(min(ratios), 2), round(max(ratios), 2)]
        fft, ours = (1000 * statistics.median(seconds[name]) for name in ("fft", "crop"))
        print(
            f"{args.base_size} -> {size}: fft {fft:.1f} ms, low_frequency_crop {ours:.1f} ms, "
            f"{result['crop'][str(size)]:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), largest difference {error:.0e}"
        )
    return result


def crop_by_fft(images: torch.Tensor, size: int) -> torch.Tensor:
    """The crop as its definition reads: the whole spectrum, its low block, the block's inverse (even sizes)."""
    length = images.shape[-1]
    kept = torch.cat((torch.arange(size // 2), torch.arange(length - size // 2, length)))
    block = torch.fft.fft2(images)[..., kept[:, None], kept] * (size / length) ** 2
    return torch.fft.ifft2(block).real


def loop(args: argparse.Namespace) -> dict:
    """train_epoch (finishing, schedules, seeds, meters, clipping) against a bare forward/backward/fused-AdamW loop."""
    torch.set_num_threads(1)
    model = create_model(args.model, num_classes=100, input_size=args.input_size)
    bare = copy.deepcopy(model)
    images = torch.randint(0, 256, (args.batch, 3, args.input_size, args.input_size), dtype=torch.uint8)
    targets = torch.randint(0, 100, (args.batch,))
    steps = (args.repetitions + 2) * args.steps
    plan = build_plan("none", epochs=steps, num_images=args.batch, batch_size=args.batch, base_size=args.input_size)
    training = Training(
        model=model,
        ema=None,
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        finish=Finish(100, base_size=args.input_size),
        plan=plan,
        sampler=CurriculumSampler(plan),
        device=torch.device("cpu"),
        task=Classification(),
        loss=LossMeter(torch.device("cpu")),
        clip_grad=1.0,
    )
    epochs = iter(plan)
    optimizer = torch.optim.AdamW(bare.parameters(), fused=True)
    finished, soft = training.finish.train(images, targets, args.input_size, [0], args.batch)  # the bare loop's, once

    def run_loop() -> None:
        for _ in range(args.steps):  # epochs of one step: their cost, too, is the loop's
            train_epoch(training, next(epochs), itertools.repeat((images, targets)), lambda lr, count: False)

    def run_bare() -> None:
        bare.train()
        for _ in range(args.steps):
            torch.nn.functional.cross_entropy(bare(finished), soft).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds = in_turn({"bare": run_bare, "loop": run_loop}, args.repetitions)
    ratios = [ours / theirs for ours, theirs in zip(seconds["loop"], seconds["bare"])]
    ratio = round(statistics.median(ratios), 3)
    bare_ms, loop_ms = (1000 * statistics.median(seconds[name]) / args.steps for name in ("bare", "loop"))
    print(
        f"{args.model} at {args.input_size}, batch {args.batch}: bare {bare_ms:.1f} ms a step, train_epoch "
        f"{loop_ms:.1f} ms, {ratio:.3f}x ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    return {"loop": ratio, "spread": [round(min(ratios), 3), round(max(ratios), 3)]}


def train(args: argparse.Namespace) -> dict:
    """Images/s of the whole loop (loader, finish, model, EMA) beside a bare timm loop at each of the plan's sizes, and
    the wall speed-up of a plan over the ordinary one against its FLOP speed-up; on whatever device there is."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = load_config(args.recipe, args.flags)
    source = Photos(args.images, (args.side * 3 // 4, args.side))
    if config.task != "supervised":
        raise UsageError(f"bench.py train times classifiers; --task is {config.task}")
    ordinary = replace(config, curriculum="none", magnitude="linear")
    shorter = replace(config, epochs=make_plan(ordinary, args.images, CLASSES).epochs * args.share)
    runs = {"curriculum": shorter, "ordinary": ordinary}
    seconds = {name: [] for name in runs}
    for _ in range(args.repetitions):
        for name, settings in runs.items():
            done = run_plan(settings, args.images, device, source)
            seconds[name].append(done["seconds"])
            if name == "curriculum":
                rates = done["rates"]
    result: dict = {"rates": {}, "bare": {}}
    for size in sorted(rates):
        result["rates"][str(size)] = round(rates[size], 1)
        bare = loop_and_bare(config, size, device, args.steps, args.repetitions)[1]
        result["bare"][str(size)] = round(bare, 1)
        print(f"B {size}: {rates[size]:,.0f} images/s, a bare loop {bare:,.0f}: {rates[size] / bare:.2f}")
    wall = statistics.median(seconds["ordinary"]) / statistics.median(seconds["curriculum"])
    compute = compute_of(ordinary, args.images) / compute_of(shorter, args.images)
    print(f"speed-up by the clock {wall:.2f}, by FLOPs {compute:.2f}: {wall / compute:.2f} of it")
    return {**result, "wall": round(wall, 3), "flops": round(compute, 3), "share": round(wall / compute, 3)}


def load_config(recipe: str, flags: list[str]) -> Config:
    """A recipe's settings, changed by main.py's flags."""
    return parse_config(["--recipe", recipe, *flags])


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def even_size(text: str) -> int:
    size = positive(text)
    if size % 2:
        raise argparse.ArgumentTypeError(f"{size} is not an even size (odd ones have no counterpart in the release)")
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("crop", help=crop.__doc__)
    command.add_argument("--sizes", type=even_size, nargs="+", default=[160, 96])
    command.add_argument("--base_size", type=even_size, default=224)
    command.add_argument("--batch", type=positive, default=32)
    command.add_argument("--repetitions", type=positive, default=21)
    command.set_defaults(run=crop)

    command = commands.add_parser("loop", help=loop.__doc__)
    command.add_argument("--model", default="resnet18")
    command.add_argument("--input_size", type=positive, default=96)
    command.add_argument("--batch", type=positive, default=32)
    command.add_argument("--steps", type=positive, default=2, help="steps of each loop in each turn")
    command.add_argument("--repetitions", type=positive, default=11)
    command.set_defaults(run=loop)

    command = commands.add_parser("train", help=train.__doc__)
    command.add_argument("--recipe", default=str(DEMO))
    command.add_argument("--share", type=float, default=0.5, help="of the ordinary plan's budget")
    command.add_argument("--images", type=positive, default=2200, help="of the training set, made up")
    command.add_argument("--side", type=positive, default=118, help="longer side of an image (ImageNet's: 500)")
    command.add_argument("--steps", type=positive, default=4, help="steps of each loop in each turn")
    command.add_argument("--repetitions", type=positive, default=3)
    command.add_argument("flags", nargs="*", help="main.py's, after --: -- --num_workers 2")
    command.set_defaults(run=train)

    command = commands.add_parser("input", help=bench_input.run.__doc__)
    command.add_argument("--data_path", required=True, help="folder with images, at any depth")
    command.add_argument("--sizes", type=positive, nargs="+", default=[96, 160, 224])
    command.add_argument("--base_size", type=positive, default=224)
    command.add_argument("--images", type=positive, default=256)
    command.add_argument("--repetitions", type=positive, default=5)
    command.add_argument("--seed", type=int, default=0, help="of the choice of images")
    command.set_defaults(run=bench_input.run)

    command = commands.add_parser("index", help=bench_index.run.__doc__)
    command.add_argument("--images", type=positive, default=13_000_000)
    command.add_argument("--classes", type=positive, default=19_167)
    command.add_argument("--workers", type=positive, default=4)
    command.set_defaults(run=bench_index.run)

    command = commands.add_parser("shards", help=bench_shards.run.__doc__)
    command.add_argument("--images", type=positive, default=2000, help="of the passes")
    command.add_argument("--members", type=positive, default=13_000_000, help="of the simulated set")
    command.add_argument("--repetitions", type=positive, default=5)
    command.set_defaults(run=bench_shards.run)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the ratios as one JSON line last")
    args = parser.parse_args()
    try:
        result = args.run(args)
    except UsageError as error:
        return die(error, 2)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
