"""The one entry point: plans, trains, fine-tunes, resumes, evaluates. ``python main.py --help`` lists every setting."""

from __future__ import annotations

import json
import os
import sys

from config.command_line import parse_config, parse_stated, rescaled

if __name__ == "__main__" and "RANK" not in os.environ:
    parse_config(sys.argv[1:])  # so that --help and a mistyped flag are answered before torch is imported

import traceback
from collections.abc import Sequence
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
from commands.plan import baseline, make_summary, show_plan
from commands.predict import predict
from commands.suggest import write_suggestion
from config import Config, UsageError, as_usage, to_yaml
from config.checks import DENSE_TASKS, check_settings
from curriculum import Plan, table
from curriculum.sampler import derive_seed, group_sizes
from dense.weights import load_dense
from engine import many_shapes, train_epoch
from models import checkpoints, freeze_body, load_weights
from models.check import check_trainable
from training.advice import advice
from training.build import (
    describe,
    describe_replay,
    make_model,
    make_plan,
    make_sampler,
    make_training,
    mixes,
    number_of_classes,
    open_sources,
    place,
    synchronise,
    usable,
)
from training.curves import check_wandb
from training.early_stop import NOTE, check_stop_if, stays_ended
from training.identity import check_same_run, identify
from training.numerics import NonFinite
from training.one_writer import OneWriter
from training.report import environment, plan_picture
from training.resume import History, adopt, checkpoint_to_resume, class_order, restore, size_of_weights
from training.session import Session
from training.stopping import Agreement, end_with_launcher, stays_stopped
from training.validation import is_better, validate
from utils import (
    STOPPED,
    Topology,
    close_topology,
    die,
    end_now,
    explain,
    init_topology,
    most_processes,
    prepare_streams,
    printing_never_fails,
    wrap,
    write_text,
)


def train(config: Config, topology: Topology, warnings: Sequence[str] = ()) -> int:
    """Trains, or resumes training; 0 when the plan is done, 75 when a signal stopped it."""
    if not config.output_dir:
        raise UsageError("--output_dir is not set: name the folder for checkpoints and logs")
    with OneWriter(Path(config.output_dir), topology) as writer:
        session = prepare(config, topology, writer, warnings)
        return session if isinstance(session, int) else carry_out(session)


def carry_out(session: Session) -> int:
    """The loop of a run; returns the exit code."""
    plan, training = session.plan, session.training
    with session:
        for record in plan.records[session.first :]:
            session.enter(record)
            stopped = session.stops() or train_epoch(training, record, session.batches, session.after_step)
            line = {} if stopped else session.record(record)  # before the evaluation, whose time is not training's
            result: dict[str, Any] | None = {}
            if not stopped and record.index in session.evaluated:
                result = validate(session, record)
            if stopped or result is None:
                session.save(record.index, required=True)
                break
            better = is_better(session, record, result)
            session.finish({**line, **result})
            done = record.index == len(plan) - 1
            ended = not done and session.ends_early(record, {**line, **result})
            if done or better or ended or session.save_is_due(training.step):
                session.save(record.index + 1, better, required=done or ended)
            if result:
                session.report()
            if ended:
                break
        else:
            return session.done()
    return session.stopped()


def prepare(config: Config, topology: Topology, writer: OneWriter, warnings: Sequence[str] = ()) -> Session | int:
    """What a run is built of. Nothing is written before all of it is known to work.

    Returns an exit code where there is nothing to do: for a worker that was started again after the run was stopped,
    and for a run that ended early.
    """
    if config.wandb:
        check_wandb(config.wandb)
    agreement = Agreement(timedelta(minutes=config.timeout))
    output = Path(config.output_dir)
    if stays_stopped(output, topology):
        return STOPPED

    # The checkpoint to resume from
    found = checkpoint_to_resume(config, topology)
    if found is not None and stays_ended(config, found[0].parent, found[1]["step"], topology.is_main):
        return 0
    order = class_order(config, found)

    # The data and the plan
    sources = open_sources(config, order)
    classes = number_of_classes(config, sources[0])
    plan = make_plan(config, len(sources[0]), classes)
    identity = identify(config, plan, sources, classes)
    sources = sources[0], usable(config, sources[1])
    if topology.is_main:
        print("\n".join(describe(config, sources)), flush=True)
    state = None
    if found is not None:
        path, state = found
        changed = check_same_run(state, config, identity, str(path), topology.is_main)
        state = adopt(state, plan, changed, str(path), topology.is_main)

    # The model, at the input size of its weights, and what trains it
    build = partial(make_model, config, classes)
    config = replace(config, **settle_micro_batch(config, plan, build, topology, state))
    sampler = make_sampler(config, plan, topology.world_size, topology.rank)
    replay = describe_replay(config, plan)
    if config.task in ("supervised", "multilabel"):
        with as_usage():
            check_trainable(build, classes, plan.records[0].input_size)
    torch.manual_seed(derive_seed(config.seed))
    model = synchronise(build(size_of_weights(plan, state)), topology, sampler)
    if config.finetune and state is None:
        config = finetune(config, model, sources[0].classes, topology)
    elif state is not None:
        config = replace(config, **{key: getattr(config, key) or state["config"].get(key) for key in ("mean", "std")})
    if config.linear_probe:
        freeze_body(model, normalise=config.linear_probe == "batchnorm")
    summary = make_summary(config, plan, classes, sampler)
    training = make_training(config, plan, sampler, place(model, topology.device, config.channels_last), classes)
    check_stop_if(config, training.task)
    if state is not None:
        restore(state, identity, training, topology.is_main)
    training.model = wrap(model, topology, config.compile)

    writer.hold()
    if topology.is_main:
        history = History(state["changes"] if state else [])
        start_folder(output, config, topology, plan, summary, history)
        if history.replanned and history.replanned["step"] == training.step:
            checkpoints.set_aside(output, len(history.changes))
        lines = [table(summary, baseline(config, plan)), *replay, *warnings, *advice(config, plan)]
        print("\n".join(lines), flush=True)
    return Session(config, topology, plan, sources, training, agreement, identity, state)


def finetune(config: Config, model: nn.Module, classes: Sequence[str], topology: Topology) -> Config:
    """Loads the weights of --finetune, and says what fitted. Returns the settings, with the weights' normalisation."""
    checkpoints.verify_own(config.finetune)
    if config.task in DENSE_TASKS:
        report = load_dense(model, config.finetune, classes=classes)
    else:
        report = load_weights(model, config.finetune, head_init_scale=config.head_init_scale, classes=classes)
    if topology.is_main:
        print(report)
    return replace(config, mean=config.mean or report.mean, std=config.std or report.std)


def settle_micro_batch(
    config: Config, plan: Plan, build: partial[nn.Module], topology: Topology, state: dict[str, Any] | None
) -> dict[str, Any]:
    """``--micro_batch`` in numbers: for auto or none given, those of the run that is resumed; else what auto finds.

    They belong to the run: other groups would mix other images. Only where it has fewer groups than processes, as it
    began on fewer, and none are asked for, they are divided.
    """
    processes = most_processes(topology)
    if state is not None:
        groups, most = state["config"].get("micro_batch"), state["config"].get("forward_batch")
        settled = {"forward_batch": config.forward_batch or (most and {int(size): n for size, n in most.items()})}
        if config.micro_batch in (None, "auto") and isinstance(groups, int):
            fits = plan.batch_size // groups >= topology.world_size
            parts = [] if fits else group_sizes(plan.batch_size, processes, 2 if mixes(config) else 1, groups)
            settled["micro_batch"] = next(iter(parts), groups)  # if there are no such parts, others say so
            if parts and topology.is_main:
                print(
                    f"--micro_batch is {parts[0]} from here on: groups of {groups} are fewer than {processes} "
                    "processes; mixing happens within these",
                    flush=True,
                )
        if config.micro_batch not in (None, "auto") or "micro_batch" in settled:
            return settled
    if config.micro_batch not in (None, "auto"):
        return {}
    if config.micro_batch is None:
        return {"micro_batch": make_sampler(config, plan, processes).micro_batch}
    micro_batch, forward_batch = autobatch.find(config, plan, build, topology)
    if topology.is_main:
        print(f"--micro_batch auto: groups of {micro_batch}; most images at once by input size: {forward_batch}")
    return {"micro_batch": micro_batch, "forward_batch": forward_batch}


def start_folder(
    output: Path, config: Config, topology: Topology, plan: Plan, summary: dict[str, Any], history: History
) -> None:
    """The resolved configuration, the plan and what the run runs on, beside the checkpoints."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / NOTE).unlink(missing_ok=True)
        changes = "".join(f"# changed at {line}\n" for line in history.lines())
        write_text(output / "config.yaml", to_yaml(config) + changes)
        write_text(output / "plan.json", json.dumps({**summary, "changes": history.lines()}) + "\n")
        write_text(output / "plan.svg", plan_picture(plan))
        about = environment(topology.device, topology.world_size)
        write_text(output / "environment.json", json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise OSError(f"--output_dir {output} cannot be written: {error.strerror}") from None


def run(config: Config, said: set[str], warnings: Sequence[str] = ()) -> int:
    """Does what the settings ask for. ``said``: the settings that the command line states; ``warnings``: about them."""
    check_settings(config)
    if config.plan != "none":
        return show_plan(config, warnings)
    if config.suggest:
        return write_suggestion(config, said)
    end_with_launcher()
    topology = init_topology(config.device, config.deterministic, config.tf32, timedelta(minutes=config.timeout))
    with many_shapes(config.task == "detection"):
        if config.doctor:
            return diagnose(config, topology)
        if config.predict is not None:
            return predict(config, said, topology)
        if config.eval:
            return evaluate_weights(config, topology)
        with printing_never_fails():
            return train(config, topology, warnings)


def main(argv: list[str]) -> int:
    """The command line in, the exit code out; what went wrong is one line on standard error."""
    prepare_streams()
    try:
        config, said = parse_stated(argv)
        code = run(config, said, rescaled(argv))
        close_topology()
        return code
    except KeyboardInterrupt:
        code = die("interrupted", 130)
    except Exception as error:
        code = report(error)
    end_now(code)
    return code


def report(error: Exception) -> int:
    """Prints one line about an error and returns the exit code. A fault of the code is shown with its traceback."""
    if isinstance(error, UsageError):
        return die(error, 2)
    message = explain(error)
    if message is not None or isinstance(error, ValueError | OSError | NonFinite):
        return die(message or error)
    if "RANK" not in os.environ:
        raise error
    traceback.print_exception(error)  # here, for several processes end without Python's exit
    return die(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
