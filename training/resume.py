"""A run's state to disk and back: what a checkpoint holds and who reads it; which one a launch resumes from; when one
is written, and what happens when it cannot be."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config, UsageError, plain
from config.checks import parse_interval
from curriculum import Pass, Plan
from engine import Training
from models import checkpoints
from models.reading import class_names, read_weights
from models.weights import nonfinite
from training.identity import Difference, check_place
from training.optimizer_state import load_optimizer_state
from utils import Topology, all_sum, from_main, unwrap

MAX_FAILURES = 3  # failed writes in a row after which a run stops: it would otherwise train on with nothing to keep


def pack(
    training: Training,
    unfinished: int,
    best: dict[str, Any],
    meters: dict[str, Any],
    identity: dict[str, Any],
    config: Config,
    classes: Sequence[str],
    history: History,
    unwritten: str,
    standing: dict[str, Any],
    unusable: int,
) -> dict[str, Any]:
    """What a checkpoint holds: all that :func:`restore` and the commands need to take a run up where it is.

    Args:
        training: weights (under their unwrapped names), moving average, optimizer, scaler and step.
        unfinished: index of the first pass that is not finished.
        best: the best evaluation so far.
        meters: loss and time of the pass in progress, and steps that were skipped.
        identity: what the run is (:func:`training.identity.identify`).
        config: all settings, as JSON's types.
        classes: names of the model's outputs.
        history: what was changed on the way.
        unwritten: lines that log.txt could not take yet.
        standing: the best evaluation of the stage (:class:`training.early_stop.EarlyStop`).
        unusable: validation images that cannot be read, and so were never scored.
    """
    model = unwrap(training.model)
    return {
        "model": model.state_dict(),
        "model_ema": training.ema.module.state_dict() if training.ema else None,
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "step": training.step,
        "epoch": unfinished,
        "input_size": model.input_size,
        "best": best,
        "meters": meters,
        "identity": identity,
        "config": plain(config),
        "classes": list(classes),
        "progress": training.plan.progress(training.step),
        "logged": history.logged(training.plan, unfinished),
        "trained": trained(training.plan, training.step),
        "changes": history.changes,
        "unwritten": unwritten,
        "standing": standing,
        "unusable": unusable,
    }


def restore(state: dict[str, Any], identity: dict[str, Any], training: Training, is_main: bool) -> None:
    """Fills a run's parts, not wrapped yet, from a checkpoint.

    A moving average that the checkpoint lacks starts from its weights; the state of another optimizer is not taken.

    Raises:
        BadCheckpoint: the checkpoint does not fit the parts.
    """
    for key in ("model", "model_ema"):
        if bad := nonfinite(state[key] or {}):
            raise checkpoints.BadCheckpoint(
                f"the checkpoint of step {state['step']} holds numbers that are not finite, in {key} {bad[0]}: take an "
                "earlier one"
            )
    try:
        training.model.load_state_dict(state["model"])
        if training.ema is not None:
            training.ema.module.load_state_dict(state["model_ema"] or state["model"])
        if state["identity"] is None or state["identity"].get("optimizer") == identity["optimizer"]:
            load_optimizer_state(training.optimizer, state["optimizer"])
        if training.scaler.is_enabled() and state["scaler"]:
            training.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise checkpoints.BadCheckpoint(
            f"the checkpoint of step {state['step']} does not fit these settings: {reason}"
        ) from None
    training.loss.load(state["meters"], is_main)
    training.step = training.sampler.start_step = state["step"]


@dataclass(frozen=True)
class History:
    """What ``--allow_change`` changed in a run, oldest first: plain types, kept in its checkpoints.

    Each change says the optimizer ``step`` from which it holds, the ``progress`` there, the progress up to which
    log.txt has ``logged`` passes of before, ``what`` changed, in words, and whether that made another plan
    (``replanned``), whose step it is then.
    """

    changes: list[dict[str, Any]]

    @property
    def replanned(self) -> dict[str, Any] | None:
        """The change that led to the present plan; None: the run began with it."""
        return next((change for change in reversed(self.changes) if change["replanned"]), None)

    def logged(self, plan: Plan, unfinished: int) -> float:
        """Progress at the start of pass ``unfinished``: up to there log.txt has its record of every pass."""
        if unfinished == len(plan):
            return 1.0
        record, change = plan.records[unfinished], self.replanned
        inside = change and record.first_step <= change["step"] < record.first_step + record.steps
        return change["logged"] if inside else record.start

    def first_step(self, record: Pass) -> int:
        """Optimizer step with which a pass began: not its first where a change led into the middle of it."""
        return max(record.first_step, self.replanned["step"] if self.replanned else 0)

    def lines(self) -> list[str]:
        """Change by change, for people."""
        return [
            f"step {change['step']} ({100 * change['progress']:.1f} %): {'; '.join(change['what'])}"
            for change in self.changes
        ]


def trained(plan: Plan, step: int) -> list[list[int]]:
    """What the first ``step`` optimizer steps of a plan are: input size, batch size and steps of each stage."""
    return [
        [stage.input_size, stage.batch_size, min(step - stage.first_step, stage.steps)]
        for stage in plan.stages
        if stage.first_step < step
    ]


def adopt(
    state: dict[str, Any], plan: Plan, found: Sequence[Difference], where: str, is_main: bool = True
) -> dict[str, Any]:
    """A checkpoint as this run resumes it, with what was allowed to change noted.

    Where that makes another plan, the run resumes at the same share of the new plan's clock: step and pass follow from
    it, and with them the input size and the learning rate.

    Raises:
        BadCheckpoint: it is of a step or pass that its plan does not have.
        UsageError: nothing is left of the new plan; or the checkpoint is of an earlier version and does not say how
            far its plan was.
    """
    state = {"changes": [], "unwritten": "", "logged": None, "progress": None, "standing": {}, **state}
    replanned = any(difference.replans for difference in found)
    if not replanned:
        check_place(state, plan, where)
    if not found:
        return state
    if state["progress"] is None and not replanned:
        logged = plan.records[state["epoch"]].start if state["epoch"] < len(plan) else 1.0
        state.update(progress=plan.progress(state["step"]), logged=logged)
    change = {"step": state["step"], "progress": state["progress"], "logged": state["logged"], "replanned": replanned}
    change["what"] = [" ".join(difference.text.split()) for difference in found]
    if replanned:
        if state["progress"] is None:
            raise UsageError(
                f"{where} is of an earlier version and does not say how much of its plan is done: resume it with the "
                "settings of then until its next checkpoint, and change them then"
            )
        before = (state["identity"] or {}).get("curriculum", {})
        budget = (before.get("epochs"), before.get("clock")) == (plan.epochs, plan.curriculum.clock)
        if budget and state.get("trained") == trained(plan, state["step"]):
            step = state["step"]  # the new plan begins like that: shares differ by the rounding of stages to steps
        else:
            step = bisect.bisect_left(range(plan.total_steps), state["progress"] - 1e-9, key=plan.progress)
        change["step"] = step
        if step == plan.total_steps:
            raise UsageError(
                f"{where} is at {100 * state['progress']:.1f} % of its plan, and nothing is left of the new one: train "
                "on from its weights with --finetune and another --output_dir, or resume an earlier checkpoint"
            )
        if is_main:
            print(
                f"resuming at {100 * plan.progress(step):.1f} % of the new plan, step {step} of {plan.total_steps}",
                flush=True,
            )
        # The pass in progress is another one now: its means start anew, and its time counts on.
        meters = {**state["meters"], "loss": [0.0, 0.0], "gradient": [0.0, 0.0]}
        state.update(step=step, epoch=plan.locate(step)[0].index, meters=meters, standing={})
    return {**state, "changes": [*state["changes"], change]}


def size_of_weights(plan: Plan, state: dict[str, Any] | None) -> int:
    """The input size that a checkpoint's weights are for: the one that was trained last."""
    if state is None:
        return plan.records[0].input_size
    return state["input_size"] or plan.locate(max(state["step"] - 1, 0))[0].input_size


def checkpoint_to_resume(config: Config, topology: Topology) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint in --output_dir that this very command wrote, else --resume's, else None.

    So the same command launched again resumes from what it has done, also when it started from ``--resume``. Without
    ``--resume`` every checkpoint there counts; ``--auto_resume false`` counts none.

    Raises:
        UsageError: ``--auto_resume false`` would write over another run's checkpoints.
        BadCheckpoint: a file that cannot be used, or nothing but such files.
    """
    found, error = None, None
    if topology.is_main:
        try:
            found = _choose(config)
        except ValueError as problem:
            error = problem
    # Folders on a network may look different from different machines: one process decides.
    path, kind, message = from_main((found and str(found[0]), type(error), str(error)))
    if kind is not type(None):
        raise kind(message)
    if path is None:
        return None
    if topology.is_main:
        print(f"resuming from {path}, step {found[1]['step']}", flush=True)
        return found
    return Path(path), checkpoints.load(path)


def class_order(config: Config, found: tuple[Path, dict[str, Any]] | None) -> list[str] | None:
    """The order of the classes that the weights to start from know: those of the checkpoint; None if it has none.

    Other versions of this project, and other programs, sort class names in another way.
    """
    if found is not None:
        return found[1].get("classes")
    return class_names(read_weights(config.finetune)) if config.finetune else None


def _choose(config: Config) -> tuple[Path, dict[str, Any]] | None:
    output = Path(config.output_dir)
    if not config.auto_resume:
        if not config.resume and (there := sorted(output.glob("checkpoint-*.pth"))):
            raise UsageError(
                f"--auto_resume false, but {output} holds another run's checkpoints ({there[0].name}, ...): remove "
                "them or name another --output_dir"
            )
    elif output.is_dir():
        wrote = None if config.resume is None else lambda payload: payload["config"].get("resume") == config.resume
        found = checkpoints.newest(output, wrote)
        if found is not None:
            return found
    return (Path(config.resume), checkpoints.load(config.resume)) if config.resume else None


class Saver:
    """Writes the checkpoints of a run. Every process calls every method alike; the main one writes.

    Args:
        output: the output folder.
        interval: ``--save_interval``: a duration of the plan, or minutes.
        keep: how many checkpoint-<step>.pth stay.
        plan, topology: of the run.
    """

    def __init__(self, output: Path, interval: str | float, keep: int, plan: Plan, topology: Topology) -> None:
        self.output, self.interval, self.keep, self.plan, self.topology = output, interval, keep, plan, topology
        self.seconds = parse_interval(interval)
        self.failures = 0
        self.newest: tuple[int, int] | None = None  # step and epoch of the last one written
        self._saved = time.monotonic()

    def due(self, step: int, since: int | None = None) -> bool:
        """Whether the plan's interval elapsed with ``step``, or after ``since``."""
        return self.seconds is None and self.plan.due(self.interval, step, since)

    def wanted(self) -> bool:
        """Whether this process's clock asks for one; the main process's counts, and all have to agree on the step."""
        return self.seconds is not None and self.topology.is_main and time.monotonic() - self._saved >= self.seconds

    def save(self, make: Callable[[], dict[str, Any]], place: tuple[int, int], best: bool, required: bool) -> None:
        """Writes checkpoint-last and -<step>, and -best if ``best``.

        Args:
            make: returns the payload; called by the main process.
            place: steps done and the first epoch not finished. The same place is written once.
            required: whether the run ends here, so that a failure cannot be made good later.

        Raises:
            OSError: on every process, for a failure that was the last of MAX_FAILURES or is ``required``.
        """
        self._saved = time.monotonic()
        if place == self.newest and not best:
            return
        reason = ""
        if self.topology.is_main:
            try:
                self._write(make(), place[0], best)
            except OSError as error:
                reason = error.strerror or str(error)
        failed = all_sum(torch.tensor(float(bool(reason)), device=self.topology.device)).item() > 0
        self.failures = self.failures + 1 if failed else 0
        if not failed:
            self.newest = place
        elif required or self.failures >= MAX_FAILURES:
            raise OSError(
                f"the checkpoint of step {place[0]} could not be written to {self.output}"
                f"{': ' * bool(reason)}{reason}; {self._left()}. Mend the storage and launch the same command again"
            )
        elif self.topology.is_main:
            print(
                f"warning: the checkpoint of step {place[0]} could not be written to {self.output}: {reason}; "
                f"{self._left()}. Training continues; failure {self.failures} of {MAX_FAILURES} in a row",
                flush=True,
            )

    def _left(self) -> str:
        return f"the newest good one is of step {self.newest[0]}" if self.newest else "this run has written none yet"

    def _write(self, payload: dict[str, Any], step: int, best: bool) -> None:
        # The best one first: a kill between the two leaves it as the newest, to resume from.
        written = self.output / (checkpoints.BEST if best else checkpoints.LAST)
        checkpoints.save(written, payload)
        if best:
            checkpoints.link(written, self.output / checkpoints.LAST)
        if self.keep:
            numbered = self.output / f"checkpoint-{step}.pth"
            checkpoints.link(written, numbered)
            checkpoints.prune(self.output, self.keep, trusted=numbered)
