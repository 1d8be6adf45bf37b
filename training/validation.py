"""Evaluations during a run: at the stage's input size, by the same operator; which one is the best."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from curriculum import Pass, set_input_size
from engine import evaluate
from inputs.views import class_counts
from training.build import make_eval_loader
from training.findings import FINDINGS
from training.report import SAMPLES
from training.session import Session
from utils import broadcast_buffers, unwrap, write_text


def validate(session: Session, record: Pass) -> dict[str, Any] | None:
    """Evaluates model and moving average at the end of a pass.

    Until the last stage at the stage's input size, then at the base size; with ``--eval_size`` always at that.
    Detectors and segmenters are always evaluated at their full size.

    Returns:
        The log record's fields of an evaluation; None if a signal stopped it.
    """
    started = time.perf_counter()
    config, training, plan, topology = session.config, session.training, session.plan, session.topology
    final = record.stage == len(plan.stages) - 1
    whole = final or getattr(unwrap(training.model), "any_size", False)
    size = config.eval_size or (plan.base_size if whole else record.input_size)
    model = unwrap(training.model)
    broadcast_buffers(model, training.ema)
    result: dict[str, Any] = {"eval_size": size}

    for suffix, module in (("", model), ("_ema", training.ema.module if training.ema else None)):
        if module is None:
            continue
        if size != record.input_size and not getattr(
            module, "any_size", False
        ):  # a copy, for resizing there and back would change the weights
            module = copy.deepcopy(module)
            set_input_size(module, size)
        batch = training.sampler.micro_batch * max(1, int((plan.base_size / size) ** 2))
        loader = make_eval_loader(config, plan, session.sources[1], size, batch, topology)
        scores = evaluate(
            module,
            loader,
            training.finish,
            size,
            topology.device,
            training.task,
            config.amp,
            stop=session.after_batch,
            radius=record.radius,
        )
        if scores is None:
            return None
        result["eval_images"] = scores["images"]
        if bad := getattr(session.sources[1], "dropped", ()):
            result["eval_bad_images"] = len(bad)
        result.update({f"test_{key}{suffix}": scores[key] for key in training.task.metrics})
        if not suffix:
            result.update({key: scores[key] for key in ("per_class",) if key in scores})
            _save_answers(session, record, module, loader.dataset, size)
            _save_findings(session, scores, size)
    session.progress.evaluation_seconds = time.perf_counter() - started
    if topology.is_main:
        bad = f" ({result['eval_bad_images']} more cannot be used)" if "eval_bad_images" in result else ""
        scored = f"{training.task.describe(result)}  on {result['eval_images']} images{bad}"
        print(f"evaluation at {size}: {scored}", flush=True)
    return result


def is_better(session: Session, record: Pass, result: dict[str, Any]) -> bool:
    """Whether an evaluation at the base size (or at --eval_size) beat the best one; if so, it is the best now."""
    better, size, plan, key = False, result.get("eval_size"), session.plan, session.training.task.score
    as_at_the_end = record.radius == plan.records[-1].radius
    if key is not None and size == (session.config.eval_size or plan.base_size) and as_at_the_end:
        for weights in ("model", "model_ema"):
            score = result.get(f"test_{key}" + weights.removeprefix("model"))
            if score is not None and score > session.best.get(key, -1.0):
                session.best = {key: score, "step": session.training.step, "weights": weights, "eval_size": size}
                better = True
    return better


def _save_findings(session: Session, scores: dict[str, Any], size: int) -> None:
    """validation.json: what the report shows of the model's answers to single images and classes."""
    if not session.topology.is_main:
        return
    try:
        found = session.training.task.findings(scores, session.sources[1])
        if found is not None:
            found = {"eval_size": size, "step": session.training.step, **found}
            train = class_counts(session.sources[0])
            for line, count in zip(found["classes"], train):
                line["training_images"] = count
            write_text(session.output / FINDINGS, json.dumps(found, ensure_ascii=False) + "\n")
    except Exception as error:  # no picture of the report is worth a run
        print(f"warning: {FINDINGS} could not be written for the report: {error}", flush=True)


def _save_answers(session: Session, record: Pass, model: nn.Module, data: Dataset, size: int) -> None:
    """How the model answers a few validation images, of different classes, for the report and TensorBoard."""
    training, count = session.training, min(SAMPLES, len(data))
    if not session.topology.is_main:
        return
    places = [len(data) * place // count for place in range(count)]
    with torch.inference_mode():
        picture = training.task.answers(model, data, places, training.finish, session.topology.device, size)
    if picture is not None:
        name = f"stage-{record.stage + 1}"
        session.keep_picture(f"{name}-answers", picture[None])
        session.log.picture(training.step, f"pictures/{name}", picture)
