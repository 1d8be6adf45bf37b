"""A training run: the engine's loops in the plan's order; input sizes, evaluation, checkpoints and logs around them."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset

from config import Config
from curriculum import CurriculumSampler, Epoch, Plan, set_input_size
from datasets import Source, eval_loader
from engine import Training, evaluate, train_epoch, unwrap
from inputs.transforms import EvalTransform
from inputs.views import fingerprint
from logs import Progress, RunLog, duration_text, progress_line
from numerics import NonFinite, snapshot
from parts import load_state, make_batches, make_finish, make_optimizer, make_scaler, make_task
from report import SAMPLES, save_samples, write_report
from saving import Saver
from utils import STOPPED, Agreement, Topology, broadcast_buffers, from_main, leave_stop_note, wrap
from watchdog import Watchdog


class Trainer:
    """Made by main.py once everything was checked; :meth:`fit` does the rest.

    Args:
        config: the settings.
        topology: which process this is.
        plan, sampler: what to do, and this process's share of it.
        model: at the input size of the epoch to start with.
        sources: training and validation set.
        agreement: on stopping and saving; it has been listening to signals since the process started.
        identity: what the run is (:func:`identity.identify`), for its checkpoints.
        state: the checkpoint to go on from, None at the start.

    Raises:
        ValueError: a setting that cannot work. Nothing has been written then.
        BadCheckpoint: ``state`` does not fit the model or the optimizer.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        plan: Plan,
        sampler: CurriculumSampler,
        model: nn.Module,
        sources: tuple[Source, Source],
        agreement: Agreement,
        identity: dict[str, Any],
        state: dict[str, Any] | None,
    ) -> None:
        self.config, self.topology, self.plan = config, topology, plan
        self.sources, self.agreement, self.identity = sources, agreement, identity
        self.output = Path(config.output_dir)
        # Of the training and the validation images, so that an evaluation can tell whether its images are the run's.
        self.images = {part: fingerprint(source) for part, source in zip(("train", "val"), sources)}
        self.num_classes = config.num_classes or len(sources[0].classes)
        model.to(topology.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
        optimizer = make_optimizer(config, model)
        scaler = make_scaler(config, topology.device)
        self.best: dict[str, Any] = {"acc1": -1.0}
        self.first_epoch = 0
        if state is not None:
            load_state(state, identity, model, ema, optimizer, scaler)
            self.best, self.first_epoch = state["best"], state["epoch"]
            sampler.start_step = state["step"]
        self.training = Training(
            model=wrap(model, topology, config.compile),
            ema=ema,
            optimizer=optimizer,
            scaler=scaler,
            finish=make_finish(config, self.num_classes, plan.operator),
            plan=plan,
            sampler=sampler,
            device=topology.device,
            amp=config.amp,
            clip_grad=config.clip_grad,
            task=make_task(config, model),
            skip_nonfinite=config.on_nonfinite == "skip",
            step=sampler.start_step,
        )
        if state is not None:
            self.training.loss.load(state["meters"], topology.is_main)
        # So that the time of an epoch counts what was spent on it before a stop.
        self.epoch_started = time.perf_counter() - (state["meters"]["seconds"] if state is not None else 0.0)
        self.saver = Saver(self.output, config.save_interval, config.keep_checkpoints, plan, topology)
        self.save_agreed = False
        self.watchdog = Watchdog(60 * config.timeout, topology.rank, topology.world_size)
        self.progress = Progress(plan)
        self.end = plan.total_steps if config.stop_after is None else plan.first_after(config.stop_after)
        self.evaluated = [
            epoch.index
            for epoch in plan
            if epoch.index == len(plan) - 1
            or plan.due(config.eval_interval, epoch.first_step + epoch.steps, since=epoch.first_step)
        ]

    def fit(self) -> int:
        """Trains to the end of the plan, or as far as --stop_after says.

        Returns the exit code: 0 done, 75 stopped by a signal after saving.
        """
        started = time.perf_counter()
        self.log = RunLog(self.output if self.topology.is_main else None, self.training.step, self.first_epoch)
        with self.watchdog:
            stopped_in = self._run()
        self.log.close()
        if stopped_in is not None and self.training.step >= self.end:
            return self._ended()
        if stopped_in is not None:
            return self._stopped()
        if self.topology.is_main:
            best = "" if self.best["acc1"] < 0 else f", best top-1 {self.best['acc1']:.2f} %"
            print(f"done in {duration_text(time.perf_counter() - started)}{best}: {self.output}", flush=True)
        return 0

    def _run(self) -> Epoch | None:
        """Trains the epochs that are left. Returns the one in which it stopped early, having saved."""
        batches = make_batches(self.config, self.plan, self.training.sampler, self.sources[0], self.topology.device)
        stage = None
        try:
            for epoch in self.plan.records[self.first_epoch :]:
                self._set_input_size(epoch.input_size)
                if epoch.stage != stage and self.topology.is_main:
                    self.training.watch = self._save_samples
                self.epoch, stage = epoch, epoch.stage
                self.progress.mark()
                stopped = self._poll() or self._at_end() or train_epoch(self.training, epoch, batches, self._after_step)
                if stopped or self._finish_epoch(epoch):
                    self._save(epoch.index, required=True)
                    return epoch
        except NonFinite as error:
            message = None
            if self.topology.is_main:
                message = snapshot(error, self.output, self.training.sampler, self.sources[0])
            raise NonFinite(from_main(message), error.step) from None
        finally:
            batches.close()  # ends the loader's workers
            self.agreement.close()
        return None

    def _save_samples(self, images: torch.Tensor) -> None:
        """The first images of a stage, for the report."""
        self.training.watch = None
        self._keep(f"stage-{self.epoch.stage + 1}", self.training.finish.pixels(images[:SAMPLES]))

    def _keep(self, name: str, images: torch.Tensor) -> None:
        try:
            save_samples(self.output / "samples" / f"{name}.png", images)
        except OSError as error:
            print(f"warning: samples for the report could not be written: {error}", flush=True)

    def _set_input_size(self, size: int) -> None:
        training = self.training
        model = unwrap(training.model)
        if size == model.input_size:
            return
        training.model = None  # a live data-parallel wrapper would keep its hooks on resized parameters
        set_input_size(model, size, training.optimizer, training.ema)
        training.model = wrap(model, self.topology, self.config.compile)

    def _after_step(self, lr: float, images: int) -> bool:
        """Progress line, checkpoint, and the agreement to stop. True stops the epoch."""
        step, epoch = self.training.step, self.epoch
        self.progress.step()
        if self.plan.due(self.config.log_interval, step):
            loss = self.training.loss.mean()
            speed = self.progress.interval(epoch)
            if self.topology.is_main:
                left = sum(index >= epoch.index for index in self.evaluated)
                eta = self.progress.eta(step, epoch, left)
                print(progress_line(self.plan, epoch, step, loss, lr, speed, eta, self.topology.device), flush=True)
                self.log.interval(step, {"loss": loss, "lr": lr, "input_size": epoch.input_size, "images_per_s": speed})
        if self._poll() or self._at_end():
            return True
        last = step == epoch.first_step + epoch.steps  # then it is saved after the evaluation
        if not last and (self.save_agreed or self.saver.due(step)):
            self._save(epoch.index)
            self.progress.mark()
        self.watchdog.beat(f"training, after step {step}")
        return False

    def _poll(self) -> bool:
        """Whether all processes agreed to stop; that they agreed to save is kept for the next step that can."""
        stop, save = self.agreement.poll(self.saver.wanted())
        self.save_agreed = self.save_agreed or save
        return stop

    def _at_end(self) -> bool:
        """Whether --stop_after ends the run here, before its plan does."""
        return self.end <= self.training.step < self.plan.total_steps

    def _finish_epoch(self, epoch: Epoch) -> bool:
        """Evaluates, writes the epoch's record and saves, as far as it is time. True if a signal stopped it."""
        training, plan = self.training, self.plan
        loss = training.loss.mean()
        end = epoch.first_step + epoch.steps
        seconds = max(time.perf_counter() - self.epoch_started, 1e-9)
        images = epoch.steps * epoch.batch_size
        record = {
            "epoch": epoch.index,
            "step": end,
            "progress": plan.progress(end),
            "equivalent_epochs": plan.equivalent_epochs(end),
            "input_size": epoch.input_size,
            **({} if epoch.radius is None else {"radius": epoch.radius}),
            "magnitude": epoch.magnitude,
            "lr": plan.lr_at(end - 1),
            "train_loss": loss,
            "images": images,
            "images_per_s": round(images / seconds, 1),
            "seconds": round(seconds, 2),
        }
        better = False
        if epoch.index in self.evaluated:
            if (result := self._evaluate(epoch)) is None:
                return True
            better = self._is_better(result)
            record.update(result)
        self.log.epoch(record)
        training.loss.reset()
        self.epoch_started = time.perf_counter()
        done = epoch.index == len(plan) - 1
        if done or better or self.save_agreed or self.saver.due(end):
            self._save(epoch.index + 1, better, required=done)
        if epoch.index in self.evaluated:
            self._report()
        return False

    def _evaluate(self, epoch: Epoch) -> dict[str, Any] | None:
        """Evaluates model and moving average; returns the record's new fields, None if a signal stopped it."""
        started = time.perf_counter()
        config, training = self.config, self.training
        final = epoch.stage == len(self.plan.stages) - 1
        size = config.eval_size or (self.plan.base_size if final else epoch.input_size)
        base = config.eval_size or self.plan.base_size
        model = unwrap(training.model)
        broadcast_buffers(model, training.ema)
        result: dict[str, Any] = {"eval_size": size}
        for suffix, module in (("", model), ("_ema", training.ema.module if training.ema else None)):
            if module is None:
                continue
            if size != epoch.input_size:  # a copy, for resizing there and back would change the weights
                module = copy.deepcopy(module)
                set_input_size(module, size)
            batch = training.sampler.micro_batch * max(1, int((self.plan.base_size / size) ** 2))
            transform = EvalTransform(base, size, self.plan.operator, config.crop_pct)
            t, pin = self.topology, self.topology.device.type == "cuda"
            loader = eval_loader(self.sources[1], transform, batch, t.rank, t.world_size, config.num_workers, pin)
            more = {"task": training.task, "stop": self._after_batch, "radius": epoch.radius}
            scores = evaluate(module, loader, training.finish, size, t.device, config.amp, **more)
            if scores is None:
                return None
            result["eval_images"] = scores["images"]
            if bad := getattr(self.sources[1], "dropped", ()):
                result["eval_bad_images"] = len(bad)
            result.update({f"test_{key}{suffix}": scores[key] for key in training.task.metrics})
            if not suffix:
                self._save_picture(module, loader.dataset, size)
        self.progress.evaluation_seconds = time.perf_counter() - started
        if self.topology.is_main:
            bad = f" ({result['eval_bad_images']} more cannot be used)" if "eval_bad_images" in result else ""
            scored = f"{training.task.describe(result)}  on {result['eval_images']} images{bad}"
            print(f"evaluation at {size}: {scored}", flush=True)
        return result

    def _save_picture(self, model: nn.Module, data: Dataset, size: int) -> None:
        """How the model answers a few validation images, of different classes, for the report and TensorBoard."""
        training, count = self.training, min(SAMPLES, len(data))
        if training.task.picture is None or not self.topology.is_main:
            return
        images = torch.stack([data[len(data) * place // count][0] for place in range(count)])
        images = training.finish.evaluate(images.to(self.topology.device), size, self.epoch.radius)
        picture, name = training.task.picture(model, images, training.finish.pixels), f"stage-{self.epoch.stage + 1}"
        self._keep(f"{name}-answers", picture[None])
        self.log.picture(training.step, f"pictures/{name}", picture)

    def _after_batch(self) -> bool:
        """Of an evaluation. True stops it."""
        self.watchdog.beat(f"evaluating, after step {self.training.step}")
        return self._poll()

    def _is_better(self, result: dict[str, Any]) -> bool:
        """Whether an evaluation at the base size (or at --eval_size) beat the best one; if so, it is the best now."""
        better, size = False, result["eval_size"]
        as_at_the_end = self.epoch.radius == self.plan.records[-1].radius
        if size == (self.config.eval_size or self.plan.base_size) and as_at_the_end:
            for weights in ("model", "model_ema"):
                acc1 = result.get("test_acc1" + weights.removeprefix("model"), -1.0)
                if acc1 > self.best["acc1"]:
                    self.best = {"acc1": acc1, "step": self.training.step, "weights": weights, "eval_size": size}
                    better = True
        return better

    def _save(self, epoch: int, better: bool = False, required: bool = False) -> None:
        """Writes the checkpoint of now. ``epoch`` is the first one not finished."""
        training = self.training
        training.loss.mean()  # what is not finite is never saved as good
        meters = {**training.loss.state(), "seconds": time.perf_counter() - self.epoch_started}

        def make() -> dict[str, Any]:
            model = unwrap(training.model)
            return {
                "model": model.state_dict(),
                "model_ema": training.ema.module.state_dict() if training.ema else None,
                "optimizer": training.optimizer.state_dict(),
                "scaler": training.scaler.state_dict(),
                "step": training.step,
                "epoch": epoch,
                "input_size": model.input_size,
                "best": self.best,
                "meters": meters,
                "identity": self.identity,
                "config": json.loads(json.dumps(asdict(self.config))),
                "classes": list(self.sources[0].classes),
                "images": self.images,
            }

        self.watchdog.beat(f"writing the checkpoint of step {training.step}")
        self.saver.save(make, (training.step, epoch), better, required)
        self.save_agreed = False
        self.watchdog.beat(f"training, after step {training.step}")

    def _ended(self) -> int:
        if self.topology.is_main:
            print(f"ended after step {self.training.step}, as --stop_after says: {self.output}", flush=True)
        return 0

    def _stopped(self) -> int:
        self._report()
        if self.topology.is_main:
            leave_stop_note(self.output, self.training.step)
            print(
                f"stopped by a signal after step {self.training.step}; the same command goes on from there", flush=True
            )
        return STOPPED

    def _report(self) -> None:
        if self.topology.is_main:
            try:
                write_report(self.output)
            except OSError as error:
                print(f"warning: the report could not be written: {error}", flush=True)
