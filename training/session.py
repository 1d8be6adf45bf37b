"""What surrounds the loop of a run: the agreement to stop, the watchdog, progress, checkpoints, the report."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from config import Config, plain
from curriculum import Pass, Plan, set_input_size
from datasets import Source, kill_workers
from engine import Training
from inputs.bad_files import FILE_NAME, BadFiles
from models.run_files import read_log
from training.advice import first_was_best
from training.build import evaluated_passes, make_batches
from training.curves import WandB
from training.early_stop import EarlyStop, leave_note
from training.logs import Progress, RunLog, measure, progress_line
from training.numerics import NonFinite, snapshot
from training.report import SAMPLES, save_samples, write_report
from training.resume import History, Saver, pack
from training.stopping import WEEK, Agreement, leave_stop_note
from training.watchdog import Watchdog
from utils import STOPPED, Topology, duration_text, from_main, release_memory, unwrap, wrap


@dataclass
class Session:
    """The state of a run that the loop in main.py works with; use it as a context.

    Attributes:
        config, topology, plan: the settings, which process this is, and what to do.
        sources: training and validation set.
        training: what the engine works on.
        agreement: on stopping and saving; it has been listening to signals since the process started.
        identity: what the run is (:func:`training.identity.identify`), for its checkpoints.
        state: the checkpoint that the run resumes from, None at the start.
        first: index of the first pass to train.
        best: the best evaluation so far.
        evaluated: indices of the passes that end with an evaluation.
        batches: training batches for the rest of the run; there once the context is entered.
    """

    config: Config
    topology: Topology
    plan: Plan
    sources: tuple[Source, Source]
    training: Training
    agreement: Agreement
    identity: dict[str, Any]
    state: dict[str, Any] | None = None
    first: int = 0
    best: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, plan, topology = self.config, self.plan, self.topology
        self.output = Path(config.output_dir)
        spent, self.unwritten = 0.0, ""
        if self.state is not None:
            self.first, self.best, spent = self.state["epoch"], self.state["best"], self.state["meters"]["seconds"]
            self.unwritten = self.state["unwritten"]
        standing = self.state["standing"] if self.state else {}
        self.early_stop, self.ended_early = EarlyStop(config, plan, self.training.task, standing), None
        self.best = self.best or ({self.training.task.score: -1.0} if self.training.task.score else {})
        self.history = History(self.state["changes"] if self.state else [])
        self.state = None  # a checkpoint is as large as the model with its moments
        self.started = time.perf_counter()
        self.pass_started = self.started - spent  # a pass's time counts what was spent on it before a stop
        self.saver = Saver(self.output, config.save_interval, config.keep_checkpoints, plan, topology)
        self.save_agreed = False
        self.watchdog = Watchdog(60 * config.timeout, topology.rank, topology.world_size)
        self.progress = Progress(plan)
        self.end = plan.total_steps if config.stop_after is None else plan.first_after(config.stop_after)
        self.evaluated = evaluated_passes(plan, config.eval_interval)
        self.current: Pass | None = None

    def __enter__(self) -> Session:
        training, topology = self.training, self.topology
        logged = self.history.logged(self.plan, self.first)
        folder = self.output if topology.is_main else None
        more = [WandB(self.config.wandb, folder, plain(self.config))] if folder and self.config.wandb else []
        self.log = RunLog(folder, training.step, logged, self.unwritten, more)
        self.batches = make_batches(self.config, self.plan, training.sampler, self.sources[0], topology.device)
        self.watchdog.__enter__()
        self.agreement.wait_for(WEEK)
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        if error is not None and self.topology.world_size > 1:
            # Nothing may stand between the error and its message: other processes can be waiting for this one.
            kill_workers()
        try:
            with closing(self.batches):  # ends the loader's workers
                if isinstance(error, NonFinite):
                    self._report_nonfinite(error)
        finally:
            self.watchdog.__exit__(None, None, None)
        if error is None:
            self.agreement.wait_for(timedelta(minutes=self.config.timeout))
            self.agreement.close()
            self.log.close()

    def _report_nonfinite(self, error: NonFinite) -> None:
        message = None
        if self.topology.is_main:
            message = snapshot(error, self.output, self.training.sampler, self.sources[0])
        raise NonFinite(from_main(message), error.step) from None

    def enter(self, record: Pass) -> None:
        """Makes the model ready for a pass: its input size, and at the start of a stage samples for the report."""
        training, topology = self.training, self.topology
        model = unwrap(training.model)
        if record.input_size != model.input_size:
            training.model = None  # a live data-parallel wrapper would keep its hooks on resized parameters
            set_input_size(model, record.input_size, training.optimizer, training.ema)
            release_memory(topology.device)
            training.model = wrap(model, topology, self.config.compile)
        if self.config.compile and (self.current is None or record.input_size != self.current.input_size):
            self.progress.compiling = True
            if topology.is_main:
                took = self.progress.compile_seconds
                last = f"; the last one took {duration_text(took)}" if took else ""
                print(f"compiling the model for input size {record.input_size}, in its first step{last}", flush=True)
        if topology.is_main and (self.current is None or record.stage != self.current.stage):
            training.watch = self._save_samples
        self.current = record
        self.progress.mark()

    def after_step(self, lr: float, images: int) -> bool:
        """Progress line, checkpoint, and the agreement to stop. True stops the pass."""
        step, record, plan = self.training.step, self.current, self.plan
        if self.progress.step() and self.topology.is_main:
            took = duration_text(self.progress.compile_seconds)
            print(f"compiled for input size {record.input_size} in {took}", flush=True)
        if plan.due(self.config.log_interval, step):
            loss = self.training.loss.mean()
            speed = self.progress.interval(record)
            if self.topology.is_main:
                left = sum(index >= record.index for index in self.evaluated)
                eta = self.progress.eta(step, record, left)
                print(progress_line(plan, record, step, loss, lr, speed, eta, self.topology.device), flush=True)
                numbers = {"loss": loss, "lr": lr, "input_size": record.input_size, "images_per_s": speed}
                norm, _ = self.training.loss.gradient_norm()
                more = {} if norm is None else {"grad_norm": norm}
                self.log.interval(step, {**numbers, **more, **measure(self.training)})
        if self.stops():
            return True
        last = step == record.first_step + record.steps  # then it is saved after the evaluation
        if not last and (self.save_agreed or self.saver.due(step)):
            self.save(record.index)
            self.progress.mark()
        self.watchdog.beat(f"training, after step {step}")
        return False

    def after_batch(self) -> bool:
        """Of an evaluation. True stops it."""
        self.watchdog.beat(f"evaluating, after step {self.training.step}")
        return self.poll()

    def stops(self) -> bool:
        """Whether the run ends here before its plan does: all processes agreed to stop, or --stop_after says so."""
        return self.poll() or self.end <= self.training.step < self.plan.total_steps

    def poll(self) -> bool:
        """Whether all processes agreed to stop; that they agreed to save is kept for the next step that can."""
        stop, save = self.agreement.poll(self.saver.wanted())
        self.save_agreed = self.save_agreed or save
        return stop

    def record(self, record: Pass) -> dict[str, Any]:
        """The log's record of a pass that was trained to its end."""
        plan, end = self.plan, record.first_step + record.steps
        loss, (_, norm) = self.training.loss.mean(), self.training.loss.gradient_norm()
        seconds = max(time.perf_counter() - self.pass_started, 1e-9)
        images = (end - self.history.first_step(record)) * record.batch_size
        return {
            "epoch": record.index,  # the pass; the key is what other trainers' logs call it
            "step": end,
            "start": self.history.logged(plan, record.index),
            "progress": plan.progress(end),
            "equivalent_epochs": plan.equivalent_epochs(end),
            "input_size": record.input_size,
            **({} if record.radius is None else {"radius": record.radius}),
            "magnitude": record.magnitude,
            "lr": plan.lr_at(end - 1),
            "train_loss": loss,
            **({} if norm is None else {"grad_norm": norm}),
            **measure(self.training),
            "images": images,
            "images_per_s": round(images / seconds, 1),
            "seconds": round(seconds, 2),
        }

    def finish(self, line: dict[str, Any]) -> None:
        """Logs a pass and starts the meters of the next."""
        self.log.epoch(line)
        self.training.loss.reset()
        self.pass_started = time.perf_counter()

    def ends_early(self, record: Pass, line: dict[str, Any]) -> bool:
        """Whether the run ends after this pass, whose log record is ``line``, as --patience or --stop_if says."""
        self.ended_early = self.early_stop.judge(record, line)
        return self.ended_early is not None

    def save_is_due(self, step: int) -> bool:
        return self.save_agreed or self.saver.due(step)

    def save(self, unfinished: int, better: bool = False, required: bool = False) -> None:
        """Writes the checkpoint of now.

        Args:
            unfinished: index of the first pass that is not finished.
            better: whether it is the best one, too.
            required: whether the run ends here, so that a failure to write cannot be made good later.
        """
        training = self.training
        training.loss.mean()  # what is not finite is never saved as good
        meters = {**training.loss.state(), "seconds": time.perf_counter() - self.pass_started}
        self.watchdog.beat(f"writing the checkpoint of step {training.step}")
        self.saver.save(
            lambda: pack(
                training,
                unfinished,
                self.best,
                meters,
                self.identity,
                self.config,
                self.sources[0].classes,
                self.history,
                self.log.waiting,
                self.early_stop.standing,
                len(getattr(self.sources[1], "dropped", ())),
            ),
            (training.step, unfinished),
            better,
            required,
        )
        self.save_agreed = False
        self.watchdog.beat(f"training, after step {training.step}")

    def keep_picture(self, name: str, images: torch.Tensor) -> None:
        """Writes images (uint8 (N, 3, S, S)) as samples for the report."""
        try:
            save_samples(self.output / "samples" / f"{name}.png", images)
        except Exception as error:  # no picture is worth a run
            print(f"warning: samples for the report could not be written: {error}", flush=True)

    def _save_samples(self, images: torch.Tensor) -> None:
        """The first images of a stage."""
        self.training.watch = None
        self.keep_picture(f"stage-{self.current.stage + 1}", self.training.finish.pixels(images[:SAMPLES]))

    def report(self) -> None:
        if self.topology.is_main:
            try:
                write_report(self.output)
            except Exception as error:  # no report is worth a run
                print(f"warning: the report could not be written: {error!r}", flush=True)

    def stopped(self) -> int:
        """Says why the run ended before its plan. Returns the exit code."""
        step = self.training.step
        if self.ended_early is not None:
            if self.topology.is_main:
                leave_note(self.config, step, self.ended_early)
                where = f"step {step} of {self.plan.total_steps}"
                print(f"ended early, after {where}, and saved: {self.ended_early}: {self.output}", flush=True)
            self.report()
            return 0
        if step >= self.end:
            if self.topology.is_main:
                print(f"ended after step {step}, as --stop_after says: {self.output}", flush=True)
            return 0
        self.report()
        if self.topology.is_main:
            leave_stop_note(self.output, step)
            print(f"stopped by a signal after step {step}; the same command resumes from there", flush=True)
        return STOPPED

    def done(self) -> int:
        if self.topology.is_main:
            score = self.training.task.score
            value, name = (
                self.best.get(score, -1.0),
                {"acc1": "top-1", "map": "mAP"}.get(score, str(score).replace("_", " ")),
            )
            best = "" if value < 0 else f", best {name} {value:.2f} %"
            bad = len(BadFiles(folder=self.output).recorded())
            replaced = f", {bad} unreadable training images replaced ({FILE_NAME})" if bad else ""
            if value >= 0 and (line := self._first_was_best()):
                print(f"warning: {line}", flush=True)
            took = duration_text(time.perf_counter() - self.started)
            print(f"done in {took}{best}{replaced}: {self.output}", flush=True)
        return 0

    def _first_was_best(self) -> str | None:
        """What the log shows of it, if it can be read."""
        key, size = f"test_{self.training.task.score}", self.best.get("eval_size", 0)
        with suppress(OSError, ValueError):
            return first_was_best(read_log(self.output / "log.txt"), key, size)
        return None
