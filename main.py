"""The one entry point: plans, trains, fine-tunes, resumes, evaluates. ``python main.py --help`` lists every setting."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commands import autobatch
from commands.doctor import diagnose
from commands.evaluate import evaluate_weights
from commands.plan import make_summary, show_plan
from commands.predict import predict
from commands.suggest import write_suggestion
from config import Config, UsageError, as_usage, to_yaml
from config.checks import check_settings, parse_parts
from config.command_line import given, parse_config
from curriculum import Plan, table
from curriculum.sampler import derive_seed
from datasets import build_source, describe_data
from engine import train_epoch
from inputs.readable import drop_unreadable
from models import checkpoints, freeze_body, load_weights
from training.build import (
    describe_replay,
    make_model,
    make_plan,
    make_sampler,
    make_training,
    number_of_classes,
    place,
)
from training.identity import check_same_run, identify
from training.numerics import NonFinite
from training.report import environment, plan_picture
from training.resume import checkpoint_to_resume, class_order, restore, size_of_weights
from training.session import Session
from training.validation import is_better, validate
from utils import (
    STOPPED,
    Agreement,
    Topology,
    close_topology,
    die,
    explain,
    init_topology,
    stays_stopped,
    wrap,
    write_text,
)


def train(config: Config, topology: Topology) -> int:
    """Trains, or resumes training; 0 when the plan is done, 75 when a signal stopped it."""
    session = prepare(config, topology)
    if session is None:
        return STOPPED
    plan, training = session.plan, session.training
    with session:
        for record in plan.records[session.first :]:
            session.enter(record)
            stopped = session.stops() or train_epoch(training, record, session.batches, session.after_step)
            result: dict[str, Any] | None = {}
            if not stopped and record.index in session.evaluated:
                result = validate(session, record)
            if stopped or result is None:
                session.save(record.index, required=True)
                break
            better = is_better(session, record, result)
            session.finish({**session.record(record), **result})
            done = record.index == len(plan) - 1
            if done or better or session.save_is_due(training.step):
                session.save(record.index + 1, better, required=done)
            if result:
                session.report()
        else:
            return session.done()
    return session.stopped()


def prepare(config: Config, topology: Topology) -> Session | None:
    """What a run is built of. Nothing is written before all of it is known to work.

    Returns None for a worker that was started again after the run was stopped.
    """
    agreement = Agreement(timedelta(minutes=config.timeout))
    if not config.output_dir:
        raise UsageError("--output_dir is not set: name the folder for checkpoints and logs")
    output = Path(config.output_dir)
    if stays_stopped(output, topology):
        return None

    # The checkpoint to resume from
    found = checkpoint_to_resume(config, topology)
    order = class_order(config, found)

    # The data and the plan
    sources = build_source(config, True, order), build_source(config, False, order)
    classes = number_of_classes(config, sources[0])
    plan = make_plan(config, len(sources[0]), classes)
    with as_usage():
        sources = sources[0], drop_unreadable(sources[1], config.max_bad)
    if topology.is_main:
        print("\n".join(describe_data(config, sources)), flush=True)
    identity = identify(config, plan, sources[0], classes)
    state = None
    if found is not None:
        path, state = found
        check_same_run(state["identity"], identity, parse_parts(config.allow_change), str(path))

    # The model, at the input size of its weights, and what trains it
    build = partial(make_model, config, classes)
    config = replace(config, **settle_micro_batch(config, plan, build, topology, state))
    sampler = make_sampler(config, plan, topology.world_size, topology.rank)
    replay = describe_replay(config, plan)
    torch.manual_seed(derive_seed(config.seed))
    model = build(size_of_weights(plan, state))
    if config.finetune and state is None:
        finetune(config, model, topology)
    if config.linear_probe:
        freeze_body(model, normalise=config.linear_probe == "batchnorm")
    summary = make_summary(config, plan, classes, sampler)
    training = make_training(config, plan, sampler, place(model, topology.device, config.channels_last), classes)
    if state is not None:
        restore(state, identity, training, topology.is_main)
    training.model = wrap(model, topology, config.compile)

    if topology.is_main:
        start_folder(output, config, topology, plan, summary)
        print("\n".join([table(summary, config.baseline), *replay]), flush=True)
    return Session(config, topology, plan, sources, training, agreement, identity, state)


def finetune(config: Config, model: nn.Module, topology: Topology) -> None:
    """Loads the weights of --finetune, and says what fitted."""
    checkpoints.verify_own(config.finetune)
    report = load_weights(model, config.finetune, head_init_scale=config.head_init_scale)
    if topology.is_main:
        print(report)


def settle_micro_batch(
    config: Config, plan: Plan, build: partial[nn.Module], topology: Topology, state: dict[str, Any] | None
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


def run(config: Config, said: set[str]) -> int:
    """Does what the settings ask for. ``said``: the settings that the command line states."""
    check_settings(config)
    if config.plan != "none":
        return show_plan(config)
    if config.suggest:
        return write_suggestion(config, said)
    topology = init_topology(config.device, config.deterministic, timedelta(minutes=config.timeout))
    try:
        if config.doctor:
            return diagnose(config, topology)
        if config.predict is not None:
            return predict(config, said, topology)
        return evaluate_weights(config, topology) if config.eval else train(config, topology)
    finally:
        close_topology()


def main(argv: list[str]) -> int:
    """The command line in, the exit code out; what went wrong is one line on standard error."""
    try:
        return run(parse_config(argv), given(argv))
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
