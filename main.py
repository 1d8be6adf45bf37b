"""The one entry point: plans, trains, fine-tunes, resumes, evaluates. ``python main.py --help`` lists every setting."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoints
from config import Config, load_curriculum, parse_config, to_yaml
from curriculum import CurriculumSampler, Plan, build_plan, check_input_sizes, parse_duration, summarize, table
from curriculum.sampler import derive_seed
from datasets import Source, build_source, eval_loader
from engine import NonFiniteLoss, evaluate
from inputs.transforms import EvalTransform
from models import create_model, load_weights
from models.flops import count_flops
from trainer import Trainer, make_finish
from utils import Topology, close_topology, die, init_topology


class UsageError(ValueError):
    """Settings that cannot work, found before anything was written."""


@contextmanager
def wrong_usage():
    """Turns a ValueError of the checks inside into a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(error) from None


def main(argv: list[str]) -> int:
    config = parse_config(argv)
    try:
        if config.plan != "none":
            return show_plan(config)
        with wrong_usage():
            topology = init_topology(config.device, config.deterministic)
        try:
            return evaluate_only(config, topology) if config.eval else train(config, topology)
        finally:
            close_topology()
    except UsageError as error:
        return die(error, 2)
    except (ValueError, OSError, NonFiniteLoss) as error:
        return die(error)
    except KeyboardInterrupt:
        return die("interrupted", 130)


def train(config: Config, topology: Topology) -> int:
    """Trains, or goes on training; 0 when the plan is done, 75 when a signal stopped it."""
    with wrong_usage():
        if not config.output_dir:
            raise ValueError("--output_dir is not set: name the folder for checkpoints and logs")
        sources = tuple(build_source(config.data_set, config.data_path, train=train) for train in (True, False))
        classes = number_of_classes(config, sources[0])
        plan = make_plan(config, len(sources[0]), classes)
        sampler = CurriculumSampler(
            plan,
            seed=config.seed,
            micro_batch=config.micro_batch,
            rank=topology.rank,
            world_size=topology.world_size,
            even_groups=config.mixup > 0 or config.cutmix > 0,
        )
    state = checkpoint_to_resume(config)
    first = plan.records[min(state["epoch"], len(plan) - 1) if state else 0]
    torch.manual_seed(derive_seed(config.seed))
    model = make_model(config, classes, first.input_size)
    if config.finetune and state is None:
        report = load_weights(model, config.finetune, head_init_scale=config.head_init_scale)
        if topology.is_main:
            print(report)
    if topology.is_main:
        start_folder(Path(config.output_dir), config, make_summary(config, plan, classes))
    return Trainer(config, topology, plan, sampler, model, sources, state).fit()


def evaluate_only(config: Config, topology: Topology) -> int:
    """Prints the accuracy of --resume's (or --finetune's) weights, and of their moving average if there is one."""
    with wrong_usage():
        path = config.resume or config.finetune
        if path is None:
            raise ValueError("--eval needs the weights to evaluate: --resume CHECKPOINT or --finetune FILE")
        source = build_source(config.data_set, config.data_path, train=False)
        classes = number_of_classes(config, source)
        size = config.eval_size or config.input_size
        model = make_model(config, classes, size)
    finish = make_finish(config, classes, "lanczos")
    transform = EvalTransform(size, size, "lanczos", config.crop_pct)
    batch = config.micro_batch or max(1, config.batch_size // topology.world_size)
    pin = topology.device.type == "cuda"
    keys = ["model", "model_ema"] if config.resume and checkpoints.load(path)["model_ema"] else [None]
    for key in keys:
        load_weights(model, path, key=key)
        model.to(topology.device)
        loader = eval_loader(source, transform, batch, topology.rank, topology.world_size, config.num_workers, pin)
        result = evaluate(model, loader, finish, size, topology.device, config.amp)
        if topology.is_main:
            print(json.dumps({"weights": key or "model", "eval_size": size, **result}))
    return 0


def show_plan(config: Config) -> int:
    """``--plan``: what the run would do and cost, as a table or as one line of JSON. Needs data or --num_images."""
    with wrong_usage():
        num_images, classes = config.num_images, config.num_classes or 1000
        if num_images is None:
            source = build_source(config.data_set, config.data_path, train=True)
            num_images, classes = len(source), number_of_classes(config, source)
        plan = make_plan(config, num_images, classes)
    summary = make_summary(config, plan, classes)
    print(json.dumps(summary) if config.plan == "json" else table(summary, config.baseline_epochs))
    return 0


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
    )
    for duration in (config.log_interval, config.eval_interval, config.save_interval):
        parse_duration(duration)
    check_input_sizes(probe, sorted({stage.input_size for stage in plan.stages} | {config.eval_size or plan.base_size}))
    return plan


def make_summary(config: Config, plan: Plan, classes: int) -> dict[str, Any]:
    """What the plan does and costs, with the model's parameters and FLOPs counted without computing anything."""
    sizes = sorted({stage.input_size for stage in plan.stages} | {plan.base_size})
    flops, params = count_flops(lambda size: make_model(config, classes, size), sizes)
    return summarize(plan, config.baseline_epochs, flops, params)


def make_model(config: Config, classes: int, input_size: int) -> nn.Module:
    return create_model(config.model, classes, input_size, config.drop_path, **(config.model_args or {}))


def number_of_classes(config: Config, source: Source) -> int:
    """The model's outputs: the data set's classes, or more if --num_classes says so."""
    found = len(source.classes)
    if config.num_classes is not None and config.num_classes < found:
        raise ValueError(f"--num_classes is {config.num_classes} but the data set has {found} classes")
    return config.num_classes or found


def checkpoint_to_resume(config: Config) -> dict[str, Any] | None:
    """--resume's checkpoint, else the newest good one in --output_dir (unless --auto_resume false), else None."""
    if config.resume:
        return checkpoints.load(config.resume)
    output = Path(config.output_dir)
    found = checkpoints.newest(output) if config.auto_resume and output.is_dir() else None
    if found is None:
        return None
    print(f"going on from {found[0]}, step {found[1]['step']}", flush=True)
    return found[1]


def start_folder(output: Path, config: Config, summary: dict[str, Any]) -> None:
    """The resolved configuration and the plan, beside the checkpoints."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(to_yaml(config))
    (output / "plan.json").write_text(json.dumps(summary) + "\n")
    print(table(summary, config.baseline_epochs), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
