"""``--eval`` and ``--predict`` of detectors and segmenters."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from config import Config, UsageError
from dense.predictions import DetectionWriter, LabelWriter
from dense.reading import read_image, to_tensor
from dense.tasks import Detection, Segmentation, eval_loader
from dense.transforms import DetectionTest, SegmentationTest
from dense.weights import load_dense
from engine import autocast, evaluate, many_shapes
from inputs.decode import BadImage
from models.reading import class_names
from models.registry import build_bounded
from training.build import make_finish, make_model
from training.identity import differing_images
from training.scenes import base_size, has_masks, open_dense, test_sides
from training.watchdog import Watchdog
from utils import Topology

# What decides how the model is built and what it is shown: the checkpoint's, unless it was said on the command line.
FROM_CHECKPOINT = ("task", "head", "head_args", "model", "model_args", "num_classes", "mean", "std")
FROM_CHECKPOINT += ("test_side", "max_side", "crop")


def evaluate_dense(config: Config, content: dict[str, Any], topology: Topology) -> int:
    """Prints one JSON line per set of weights: those of --resume and their moving average, or those of --finetune.

    Args:
        content: of that file.
    """
    weights = config.resume or config.finetune
    source = open_dense(config, False, class_names(content))
    if topology.is_main:
        for line in differing_images(source, source, content, str(weights), config):
            print(line, file=sys.stderr)
    classes = config.num_classes or len(source.classes)
    model = make_model(config, classes, base_size(config))
    transform = DetectionTest if config.task == "detection" else SegmentationTest
    share = topology.rank, topology.world_size, config.num_workers, topology.device.type == "cuda"
    loader = eval_loader(source, transform(*test_sides(config)), *share)
    task = _task(config)
    averaged = isinstance(content.get("model_ema"), dict)
    for key in ("model", "model_ema") if averaged else (None,):
        report = load_dense(model, weights, key)
        if report.random:
            raise ValueError(
                f"{weights} is no whole {type(model).__name__} for {classes} classes ({report.random[0]} and "
                f"{len(report.random) - 1} others would stay random)"
            )
        model.to(topology.device)
        how = replace(config, mean=config.mean or report.mean, std=config.std or report.std)
        finish = make_finish(how, classes, "lanczos")
        started = time.perf_counter()
        with Watchdog(60 * config.timeout, topology.rank, topology.world_size) as watchdog:
            stop = partial(watchdog.beat, "evaluating")
            scores = evaluate(model, loader, finish, base_size(config), topology.device, task, config.amp, stop=stop)
        speed = scores["images"] / (time.perf_counter() - started)
        if topology.is_main:
            line = {"weights": key or "model", "test_side": test_sides(config)[0], **scores}
            print(json.dumps({**line, "images_per_s": round(speed, 1)}), flush=True)
    return 0


def predict_dense(
    config: Config, said: Collection[str], paths: list[str], content: dict[str, Any], key: str, topology: Topology
) -> int:
    """Writes detections as a COCO json or label maps as PNGs to the folder --predict_to, with --pictures drawn too.

    Args:
        content: of the checkpoint. key: which of its weights.

    Returns:
        0, or 1 if some images could not be used: standard error says which.
    """
    if config.predict_to is None:
        raise UsageError("--predict with a detector or segmenter writes files: name a folder with --predict_to")
    trained = {name: content["config"].get(name, getattr(config, name)) for name in FROM_CHECKPOINT if name not in said}
    config = replace(config, **trained)
    names, bad = list(content["classes"]), []
    build = partial(make_model, replace(config, drop_path=0.0), config.num_classes or len(names), base_size(config))
    model = build_bounded(build, config.model, content[key], config.resume)
    load_dense(model, config.resume, key)
    model.to(topology.device).eval()
    names += [f"unnamed {i}" for i in range(len(names), config.num_classes or 0)]
    task, finish = _task(config), make_finish(config, len(names), "lanczos")
    detects, sides = config.task == "detection", test_sides(config)
    transform = DetectionTest(*sides) if detects else SegmentationTest(*sides)
    if detects:
        writer = DetectionWriter(config.predict_to, names, has_masks(config), config.pictures)
    else:
        writer = LabelWriter(config.predict_to, names, config.pictures)
    root = config.predict if os.path.isdir(config.predict) else os.path.dirname(config.predict.split("*")[0])
    with torch.inference_mode(), many_shapes():
        for path in paths:
            try:
                image = to_tensor(read_image(path, None))
            except (OSError, BadImage) as error:
                bad.append(f"{path} ({error})")
                continue
            pixels, _ = transform((image, None))
            size = torch.tensor([pixels.shape[-2:]])
            name = os.path.relpath(path, root or ".")
            with autocast(topology.device, config.amp):
                batch = finish.evaluate(pixels[None].to(topology.device), base_size(config))
                if detects:
                    writer.add(name, image, model(batch, size)[0], tuple(pixels.shape[-2:]))
                else:
                    writer.add(name, image, task.labels(model, batch, size, [tuple(image.shape[-2:])])[0])
    if detects:
        writer.close()
    done = f"{len(paths) - len(bad)} images predicted by {key} of step {content['step']}, {config.resume}"
    print(f"{done}: {config.predict_to}", file=sys.stderr)
    if bad:
        print(f"error: {len(bad)} of {len(paths)} images cannot be used, the first: {bad[0]}", file=sys.stderr)
    return int(bool(bad))


def _task(config: Config) -> Detection | Segmentation:
    if config.task == "detection":
        return Detection(has_masks(config))
    return Segmentation(config.scales_test or (1.0,), config.flip_test)
