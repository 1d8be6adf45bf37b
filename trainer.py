"""A training run: the engine's loops in the plan's order; input sizes, evaluation, checkpoints and logs around them."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

import checkpoints
from config import Config
from curriculum import CurriculumSampler, Epoch, Plan, RandAugment, set_input_size
from datasets import Source, eval_loader, train_loader
from engine import NonFiniteLoss, Training, evaluate, train_epoch, unwrap
from inputs.finish import Finish
from inputs.transforms import EvalTransform, TrainTransform
from logs import Progress, RunLog, duration_text, progress_line
from models import param_groups
from utils import STOPPED, StopVote, Topology, all_sum, barrier, broadcast_buffers, wrap


class Trainer:
    """Made by main.py once everything was checked; :meth:`fit` does the rest.

    Args:
        config: the settings.
        topology: which process this is.
        plan, sampler: what to do, and this process's share of it.
        model: at the input size of the epoch to start with.
        sources: training and validation set.
        state: the checkpoint to go on from, None at the start.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        plan: Plan,
        sampler: CurriculumSampler,
        model: nn.Module,
        sources: tuple[Source, Source],
        state: dict[str, Any] | None,
    ) -> None:
        self.config, self.topology, self.plan = config, topology, plan
        self.sources, self.output = sources, Path(config.output_dir)
        self.num_classes = config.num_classes or len(sources[0].classes)
        model.to(topology.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
        optimizer = make_optimizer(config, model)
        scaler = torch.amp.GradScaler(topology.device.type, enabled=config.amp == "fp16")
        self.best: dict[str, Any] = {"acc1": -1.0}
        self.first_epoch = 0
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            if ema is not None:
                ema.module.load_state_dict(state["model_ema"])
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
            smoothing=config.smoothing,
            channels_last=config.channels_last,
            step=sampler.start_step,
        )
        if state is not None and topology.is_main:  # sums of the epoch in progress, of all processes
            sums = self.training.loss.sums
            sums += torch.tensor(state["meters"]["loss"], dtype=sums.dtype).to(sums.device)
        # So that the time of an epoch counts what was spent on it before a stop.
        self.epoch_started = time.perf_counter() - (state["meters"]["seconds"] if state is not None else 0.0)
        self.stop = StopVote()
        self.log = RunLog(self.output if topology.is_main else None, sampler.start_step)
        self.progress = Progress(plan)
        self.evaluated = [
            epoch.index
            for epoch in plan
            if epoch.index == len(plan) - 1
            or plan.due(config.eval_interval, epoch.first_step + epoch.steps, since=epoch.first_step)
        ]

    def fit(self) -> int:
        """Trains to the end of the plan. Returns the exit code: 0 done, 75 stopped by a signal after saving."""
        config, training = self.config, self.training
        augment = RandAugment()
        transform = TrainTransform(
            self.plan.base_size,
            self.plan.operator,
            augment,
            scale=config.crop_scale,
            flip=config.hflip,
            pipeline=config.pipeline,
        )
        pin = self.topology.device.type == "cuda"
        batches = iter(train_loader(self.sources[0], transform, training.sampler, config.num_workers, pin))
        started = time.perf_counter()
        for epoch in self.plan.records[self.first_epoch :]:
            self._set_input_size(epoch.input_size)
            self.epoch = epoch
            self.progress.mark()
            try:
                stopped = train_epoch(training, epoch, batches, self._after_step)
                loss = training.loss.mean()
            except NonFiniteLoss:
                raise NonFiniteLoss(
                    f"the loss is not finite near step {training.step} (stage {epoch.stage + 1}, input size "
                    f"{epoch.input_size}); lower --lr, set --clip_grad, or use --amp bf16 or none"
                ) from None
            if stopped:
                self._save(epoch.index)
                return self._stopped()
            self._finish_epoch(epoch, loss)
        self.log.close()
        if self.topology.is_main:
            best = "" if self.best["acc1"] < 0 else f", best top-1 {self.best['acc1']:.2f} %"
            print(f"done in {duration_text(time.perf_counter() - started)}{best}: {self.output}", flush=True)
        return 0

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
        last = step == epoch.first_step + epoch.steps  # then it is saved after the evaluation
        if not last and self.plan.due(self.config.save_interval, step):
            self._save(epoch.index)
            self.progress.mark()
        return self.stop.poll()

    def _finish_epoch(self, epoch: Epoch, loss: float) -> None:
        """Evaluates if it is time, writes the epoch's record, saves if it is time."""
        training, plan = self.training, self.plan
        end = epoch.first_step + epoch.steps
        seconds = max(time.perf_counter() - self.epoch_started, 1e-9)
        images = epoch.steps * epoch.batch_size
        record = {
            "epoch": epoch.index,
            "step": end,
            "progress": plan.progress(end),
            "equivalent_epochs": plan.equivalent_epochs(end),
            "input_size": epoch.input_size,
            "magnitude": epoch.magnitude,
            "lr": plan.lr_at(end - 1),
            "train_loss": loss,
            "images": images,
            "images_per_s": round(images / seconds, 1),
            "seconds": round(seconds, 2),
        }
        better = False
        if epoch.index in self.evaluated:
            result, better = self._evaluate(epoch)
            record.update(result)
        self.log.epoch(record)
        training.loss.reset()
        self.epoch_started = time.perf_counter()
        done = epoch.index == len(plan) - 1
        if done or better or plan.due(self.config.save_interval, end):
            self._save(epoch.index + 1, better)

    def _evaluate(self, epoch: Epoch) -> tuple[dict[str, Any], bool]:
        """Evaluates model and moving average; returns the record's new fields and whether the best was beaten."""
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
            scores = evaluate(module, self._eval_loader(size, base), training.finish, size, training.device, config.amp)
            result["eval_images"] = scores["images"]
            result.update({f"test_{key}{suffix}": scores[key] for key in ("loss", "acc1", "acc5")})
        better = False
        if size == (config.eval_size or self.plan.base_size):
            for weights in ("model", "model_ema"):
                acc1 = result.get("test_acc1" + weights.removeprefix("model"), -1.0)
                if acc1 > self.best["acc1"]:
                    self.best = {"acc1": acc1, "step": training.step, "weights": weights, "eval_size": size}
                    better = True
        self.progress.evaluation_seconds = time.perf_counter() - started
        if self.topology.is_main:
            ema = f"  EMA {result['test_acc1_ema']:.2f} %" if training.ema else ""
            print(
                f"evaluation at {size}: top-1 {result['test_acc1']:.2f} %  top-5 {result['test_acc5']:.2f} %{ema}  "
                f"loss {result['test_loss']:.4f}  on {result['eval_images']} images",
                flush=True,
            )
        return result, better

    def _eval_loader(self, size: int, base: int):
        t = self.topology
        batch = self.training.sampler.micro_batch * max(1, int((self.plan.base_size / size) ** 2))
        transform = EvalTransform(base, size, self.plan.operator, self.config.crop_pct)
        return eval_loader(
            self.sources[1], transform, batch, t.rank, t.world_size, self.config.num_workers, t.device.type == "cuda"
        )

    def _save(self, epoch: int, better: bool = False) -> None:
        """Writes checkpoint-last, -<step> and, if ``better``, -best. ``epoch`` is the first one not finished."""
        training = self.training
        training.loss.mean()  # a loss that is not finite is never saved as good
        sums = all_sum(training.loss.sums.clone())
        if self.topology.is_main:
            payload = {
                "model": unwrap(training.model).state_dict(),
                "model_ema": training.ema.module.state_dict() if training.ema else None,
                "optimizer": training.optimizer.state_dict(),
                "scaler": training.scaler.state_dict(),
                "step": training.step,
                "epoch": epoch,
                "best": self.best,
                "meters": {"loss": sums.tolist(), "seconds": time.perf_counter() - self.epoch_started},
                "config": json.loads(json.dumps(asdict(self.config))),
                "classes": list(self.sources[0].classes),
            }
            last = self.output / checkpoints.LAST
            checkpoints.save(last, payload)
            if self.config.keep_checkpoints:
                checkpoints.link(last, self.output / f"checkpoint-{training.step}.pth")
                checkpoints.prune(self.output, self.config.keep_checkpoints)
            if better:
                checkpoints.link(last, self.output / checkpoints.BEST)
        barrier()

    def _stopped(self) -> int:
        self.log.close()
        if self.topology.is_main:
            (self.output / "stopped.json").write_text(json.dumps({"step": self.training.step, "exit_code": STOPPED}))
            print(
                f"stopped by a signal after step {self.training.step}; the same command goes on from there", flush=True
            )
        return STOPPED


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of that name over our parameter groups; the fused or foreach form where there is one."""
    options: dict[str, Any] = {}
    if config.opt_eps is not None:
        options["eps"] = config.opt_eps
    if config.opt_betas is not None:
        options["betas"] = config.opt_betas
    if config.opt in ("adamw", "adam", "sgd"):
        options["fused"] = True
    groups = param_groups(model, config.weight_decay, config.layer_decay)
    try:
        return create_optimizer_v2(
            groups, config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **options
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"--opt {config.opt}: {error}") from None


def make_finish(config: Config, num_classes: int, operator: str) -> Finish:
    """What happens to a batch on the device."""
    return Finish(
        num_classes=num_classes,
        operator=operator,
        base_size=config.input_size,
        erasing=config.reprob,
        mixup=config.mixup,
        cutmix=config.cutmix,
        mixup_prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        smoothing=config.smoothing,
    )
