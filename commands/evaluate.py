"""Evaluating finished weights (``--eval true``): any input size, raw or averaged, on ImageNet's variants too."""

from __future__ import annotations

import json
import pkgutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo

from commands.dense import evaluate_dense
from config import Config, UsageError
from config.checks import DENSE_TASKS
from datasets import Source, build_source, dropped_line, eval_loader
from engine import evaluate
from inputs.readable import drop_unreadable
from inputs.readers import open_folder
from inputs.transforms import EvalTransform
from models import checkpoints, create_model, load_weights
from models.reading import class_names, read_weights
from training.build import make_finish
from training.identity import differing_images
from training.tasks import Classification, MultiLabel
from training.watchdog import Watchdog
from utils import Topology


def evaluate_weights(config: Config, topology: Topology) -> int:
    """Prints one JSON line per set of weights: those of --resume and their moving average, or those of --finetune.

    Raises:
        ValueError: weights without a head for these classes, or images of unknown classes.
    """
    source_of_weights = config.resume or config.finetune
    checkpoints.verify_own(source_of_weights)
    content = read_weights(source_of_weights)
    trained = content["config"].get("task", config.task) if "format_version" in content else config.task
    if trained not in (config.task, "mae"):  # which has no head, as will be said
        raise UsageError(
            f"--eval: {source_of_weights} is of --task {trained}, not {config.task}: give its own recipe, or --task "
            f"{trained} and its data"
        )
    if config.task in DENSE_TASKS:
        return evaluate_dense(config, content, topology)
    images = _source(config)
    source = drop_unreadable(images, config.max_bad)
    if topology.is_main:
        for line in (*dropped_line(source), *differing_images(images, source, content, str(source_of_weights), config)):
            print(line, file=sys.stderr)
    known = _model_classes(config, content, source)
    columns = _columns(source, known)
    real = _real_labels(source) if config.real_labels else None
    size = config.eval_size or config.input_size
    model = create_model(config.model, len(known), size, config.drop_path, **(config.model_args or {}))
    loader = eval_loader(
        source,
        EvalTransform(size, size, "lanczos", config.crop_pct),
        _batch_size(config, topology),
        topology.rank,
        topology.world_size,
        config.num_workers,
        topology.device.type == "cuda",
    )
    several = config.task == "multilabel"
    task = MultiLabel(len(source.classes), columns) if several else Classification(columns=columns)
    averaged = isinstance(content.get("model_ema"), dict)
    for key in ("model", "model_ema") if averaged else (None,):
        report = load_weights(model, source_of_weights, key=key)
        if report.random:
            raise ValueError(
                f"{source_of_weights} has no head for {len(known)} classes ({', '.join(report.random)} would stay "
                "random): train one with --finetune, or name the number of classes it has with --num_classes"
            )
        if topology.is_main:
            print(report, file=sys.stderr)
        how = replace(config, mean=config.mean or report.mean, std=config.std or report.std)
        finish = make_finish(how, len(known), "lanczos")
        model.to(topology.device)
        started = time.perf_counter()
        with Watchdog(60 * config.timeout, topology.rank, topology.world_size) as watchdog:
            stop = partial(watchdog.beat, "evaluating")
            scores = evaluate(model, loader, finish, size, topology.device, task, config.amp, stop=stop)
        speed = scores["images"] / (time.perf_counter() - started)
        line = {"weights": key or "model", "eval_size": size}
        line.update({name: scores[name] for name in (*task.metrics, "images")}, images_per_s=round(speed, 1))
        if several:
            line["ap"] = dict(zip(source.classes, scores["ap"]))
        if bad := getattr(source, "dropped", ()):
            line["bad_images"] = len(bad)
        if real is not None:
            top = scores["predictions"]
            top = top.cpu() if columns is None else columns[top.cpu()]
            line["real_acc1"] = real_accuracy(top.tolist(), real)
        if topology.is_main:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    return 0


def real_accuracy(predictions: list[int], real: list[list[int]]) -> float:
    """ReaL accuracy, per cent: predictions among an image's reassessed labels; images without any do not count."""
    judged = [prediction in labels for prediction, labels in zip(predictions, real) if labels]
    return 100 * sum(judged) / max(len(judged), 1)


def _source(config: Config) -> Source:
    """--eval_data's class folders, else the data set's validation images."""
    if config.eval_data is None:
        return build_source(config, train=False)
    return open_folder(config.eval_data)


def _model_classes(config: Config, content: dict[str, Any], source: Source) -> list[str]:
    """Names of the model's outputs, in order: the checkpoint says, or ImageNet's wnids fit, or the data set's."""
    if config.num_classes is None and (known := class_names(content)):
        return known
    wnids = ImageNetInfo("imagenet-1k").label_names()
    count = config.num_classes or (len(wnids) if set(source.classes) <= set(wnids) else len(source.classes))
    if count == len(wnids) and (set(source.classes) <= set(wnids) or _are_numbers(source.classes)):
        return wnids
    return [*source.classes, *(f"unnamed {i}" for i in range(len(source.classes), count))]


def _columns(source: Source, known: list[str]) -> torch.Tensor | None:
    """The model's output for each class of the data set; None if they are the same. Fewer classes: only those compete.

    So ImageNet-A and -R (200 of the 1000 wnids) are scored among their own classes, as their authors do; ImageNet-V2's
    folders are named by the class's number.
    """
    if list(source.classes) == known:
        return None
    if _are_numbers(source.classes) and not set(source.classes) <= set(known):
        columns = [int(name) for name in source.classes]
        if max(columns) < len(known):
            return torch.tensor(columns)
    place = {name: column for column, name in enumerate(known)}
    unknown = [name for name in source.classes if name not in place]
    if unknown:
        raise ValueError(
            f"the model has no class {unknown[0]!r} ({len(unknown)} of the images' classes are unknown to it)"
        )
    return torch.tensor([place[name] for name in source.classes])


def _are_numbers(names: list[str]) -> bool:
    return all(name.isdigit() for name in names)


def _real_labels(source: Source) -> list[list[int]]:
    """The reassessed labels (timm ships them) of ImageNet's validation images, by file name, in the set's order."""
    labels = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    table = {f"ILSVRC2012_val_{number:08d}.JPEG": label for number, label in enumerate(labels, 1)}
    names = [Path(source.name(i)).name for i in range(len(source))]
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError("--real_labels is for the validation images of ImageNet-1K under their original file names")
    return [table[name] for name in names]


def _batch_size(config: Config, topology: Topology) -> int:
    if isinstance(config.micro_batch, int):
        return config.micro_batch
    return max(1, config.batch_size // topology.world_size)
