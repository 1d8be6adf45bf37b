"""The one entry point: plans, trains, fine-tunes, resumes, evaluates. ``python main.py --help`` lists every setting."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

import autobatch
import checkpoints
from checks import check_settings
from config import Config, given, parse_config, to_yaml
from curriculum import CurriculumSampler, Plan, summarize, table
from curriculum.sampler import derive_seed
from datasets import build_source
from doctor import examine
from evaluation import evaluate_weights
from identity import check_same_run, identify, parse_parts
from models import freeze_body, load_weights
from models.flops import count_flops
from numerics import NonFinite
from parts import describe_replay, make_model, make_plan, number_of_classes, size_of_weights
from predict import predict
from report import environment, plan_picture
from resuming import checkpoint_to_resume
from suggest import suggest
from trainer import Trainer
from utils import STOPPED, Agreement, Topology, close_topology, die, explain, init_topology, read_text, stays_stopped, write_text


class UsageError(ValueError):
    """Settings that cannot work, found before anything was written."""


@contextmanager
def wrong_usage():
    """Turns a ValueError of the checks inside into a UsageError."""
    try:
        yield
    except checkpoints.BadCheckpoint:
        raise
    except ValueError as error:
        raise UsageError(error) from None


def main(argv: list[str]) -> int:
    config = parse_config(argv)
    try:
        with wrong_usage():
            check_settings(config)
        if config.plan != "none":
            return show_plan(config)
        if config.suggest:
            return write_suggestion(config, given(argv))
        with wrong_usage():
            topology = init_topology(config.device, config.deterministic, timedelta(minutes=config.timeout))
        try:
            if config.doctor:
                return diagnose(config, topology)
            if config.predict is not None:
                return predict(config, given(argv), topology)
            return evaluate_weights(config, topology) if config.eval else train(config, topology)
        finally:
            close_topology()
    except UsageError as error:
        return die(error, 2)
    except (ValueError, OSError, NonFinite) as error:
        return die(error)
    except RuntimeError as error:
        if (message := explain(error)) is None:
            raise
        return die(message)
    except KeyboardInterrupt:
        return die("interrupted", 130)


def train(config: Config, topology: Topology) -> int:
    """Trains, or goes on training; 0 when the plan is done, 75 when a signal stopped it."""
    agreement = Agreement(timedelta(minutes=config.timeout))
    with wrong_usage():
        if not config.output_dir:
            raise ValueError("--output_dir is not set: name the folder for checkpoints and logs")
        if stays_stopped(Path(config.output_dir), topology):
            return STOPPED
        sources = tuple(build_source(config, train=train) for train in (True, False))
        classes = number_of_classes(config, sources[0])
        plan = make_plan(config, len(sources[0]), classes)
        found = checkpoint_to_resume(config, topology)
    identity = identify(config, plan, sources[0], classes)
    state = None
    if found is not None:
        path, state = found
        check_same_run(state["identity"], identity, parse_parts(config.allow_change), str(path))
    with wrong_usage():
        config = replace(config, **settle_micro_batch(config, plan, classes, topology, state))
        sampler = make_sampler(config, plan, topology.world_size, topology.rank)
        replay = describe_replay(config, plan)
    torch.manual_seed(derive_seed(config.seed))
    model = make_model(config, classes, size_of_weights(plan, state))
    if config.finetune and state is None:
        checkpoints.verify_own(config.finetune)
        names = None if config.task == "mae" else sources[0].classes
        report = load_weights(model, config.finetune, head_init_scale=config.head_init_scale, classes=names)
        config = replace(config, mean=config.mean or report.mean, std=config.std or report.std)
        if topology.is_main:
            print(report)
    elif state is not None:
        trained = {key: getattr(config, key) or state["config"].get(key) for key in ("mean", "std")}
        config = replace(config, **trained)
    if config.linear_probe:
        freeze_body(model, normalise=config.linear_probe == "batchnorm")
    summary = make_summary(config, plan, classes, sampler)
    with wrong_usage():
        trainer = Trainer(config, topology, plan, sampler, model, sources, agreement, identity, state)
    if topology.is_main:
        start_folder(Path(config.output_dir), config, topology, plan, summary)
        print("\n".join([table(summary, config.baseline_epochs), *replay]), flush=True)
    return trainer.fit()


def diagnose(config: Config, topology: Topology) -> int:
    """``--doctor``: measures this machine for the run that the settings describe; trains nothing, keeps nothing."""
    with wrong_usage():
        source = build_source(config, train=True)
        classes = number_of_classes(config, source)
        plan = make_plan(config, len(source), classes)
        config = replace(config, **settle_micro_batch(config, plan, classes, topology, None))
        sampler = make_sampler(config, plan, topology.world_size, topology.rank)
    return examine(config, plan, sampler, source, partial(make_model, config, classes), topology)


def show_plan(config: Config) -> int:
    """``--plan``: what the run would do and cost, as a table, JSON or a picture. Needs data or --num_images."""
    with wrong_usage():
        num_images, classes = config.num_images, config.num_classes or 1000
        if num_images is None:
            source = build_source(config, train=True)
            num_images, classes = len(source), number_of_classes(config, source)
        plan = make_plan(config, num_images, classes)
        sampler = None
        if config.micro_batch != "auto":  # which is found when training starts
            devices = config.devices or int(os.environ.get("WORLD_SIZE", 1))
            sampler = make_sampler(config, plan, world_size=devices)
        speeds = load_speeds(config.speeds) if config.speeds else None
        summary = make_summary(config, plan, classes, sampler, speeds)
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    if config.plan == "picture":
        path = Path(config.output_dir or ".") / "plan.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(plan_picture(plan))
        print(path)
    else:
        lines = [table(summary, config.baseline_epochs), *describe_replay(config, plan)]
        print(json.dumps(summary) if config.plan == "json" else "\n".join(lines))
    return 0


def write_suggestion(config: Config, said: set[str]) -> int:
    """``--suggest``: a recipe for the images of --data_path, on standard output and in the output folder."""
    with wrong_usage():
        text = suggest(config, said)
    print(text, end="")
    if config.output_dir:
        path = Path(config.output_dir) / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print(f"written to {path}; look at the run: python main.py --recipe {path} --plan table", file=sys.stderr)
    return 0


def load_speeds(path: str) -> dict[int, float]:
    """The file of measured speeds: images that one device trains per second, by input size."""
    try:
        speeds = json.loads(read_text(path, 1 << 20))["images_per_s"]
        return {int(size): float(speed) for size, speed in speeds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f'--speeds {path} must be a file like {{"images_per_s": {{"96": 2500.0, "224": 480.0}}}}'
        ) from None


def make_sampler(config: Config, plan: Plan, world_size: int, rank: int = 0) -> CurriculumSampler:
    return CurriculumSampler(
        plan,
        seed=config.seed,
        micro_batch=config.micro_batch,
        forward_batch=config.forward_batch,
        rank=rank,
        world_size=world_size,
        even_groups=config.mixup > 0 or config.cutmix > 0,
    )


def make_summary(
    config: Config,
    plan: Plan,
    classes: int,
    sampler: CurriculumSampler | None,
    images_per_s: dict[int, float] | None = None,
) -> dict[str, Any]:
    """What the plan does and costs, with the model's parameters and FLOPs counted without computing anything."""
    sizes = sorted({stage.input_size for stage in plan.stages} | {plan.base_size})
    flops, params = count_flops(lambda size: make_model(config, classes, size), sizes)
    return summarize(plan, config.baseline_epochs, flops, params, sampler, images_per_s)


def settle_micro_batch(
    config: Config, plan: Plan, classes: int, topology: Topology, state: dict[str, Any] | None
) -> dict[str, Any]:
    """``--micro_batch`` in numbers: for auto or none given, those of the run that is resumed; else what auto finds.

    They belong to the run: other groups would mix other images.
    """
    if config.micro_batch not in (None, "auto"):
        return {}
    if state is not None:
        sizes = state["config"]["forward_batch"]
        return {
            "micro_batch": state["config"]["micro_batch"],
            "forward_batch": sizes and {int(size): images for size, images in sizes.items()},
        }
    if config.micro_batch is None:
        return {"micro_batch": make_sampler(config, plan, topology.world_size).micro_batch}
    build = partial(make_model, config, classes)
    micro_batch, forward_batch = autobatch.find(config, plan, build, topology)
    if topology.is_main:
        print(f"--micro_batch auto: groups of {micro_batch}; most images at once by input size: {forward_batch}")
    return {"micro_batch": micro_batch, "forward_batch": forward_batch}


def start_folder(output: Path, config: Config, topology: Topology, plan: Plan, summary: dict[str, Any]) -> None:
    """The resolved configuration, the plan and what the run runs on, beside the checkpoints."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "config.yaml", to_yaml(config))
        write_text(output / "plan.json", json.dumps(summary) + "\n")
        write_text(output / "plan.svg", plan_picture(plan))
        about = environment(topology.device, topology.world_size)
        write_text(output / "environment.json", json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise OSError(f"--output_dir {output} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
