"""Labels for images (``--predict``), as JSON lines or CSV: a checkpoint's top classes with their probabilities, or of
one of several labels per image all that are probable enough."""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.data import DataLoader, Dataset

from commands.dense import predict_dense
from config import Config, UsageError
from config.checks import DENSE_TASKS
from config.files import read_bytes
from datasets import loader_options
from engine import autocast
from inputs.decode import BadImage
from inputs.formats import ENDINGS, ending, hidden, listed, readable, sniff
from inputs.transforms import EvalTransform
from models import load_weights
from models.reading import read_weights
from models.registry import build_from_file, check_name_from_file
from training.build import make_finish
from utils import Topology

BATCH = 32
# What decides how the model is built and what it is shown: the checkpoint's, unless it was said on the command line.
FROM_CHECKPOINT = ("task", "model", "model_args", "input_size", "eval_size", "num_classes", "crop_pct", "mean", "std")


def predict(config: Config, said: Collection[str], topology: Topology) -> int:
    """Writes one line per image, in the order of their names, to --predict_to or standard output.

    Args:
        config: the settings; ``said``: those that were given, which win over the checkpoint's.

    Returns:
        0, or 1 if some images could not be used: their lines say why, and so does a line on standard error.

    Raises:
        ValueError: no images, a checkpoint that is not this project's or lacks what is asked for.
    """
    if topology.world_size > 1:
        raise UsageError("--predict runs in one process: start it without torchrun")
    paths = find_images(config.predict)
    content = read_weights(config.resume)
    if "format_version" not in content or not content.get("classes"):
        raise ValueError(
            f"--predict: {config.resume} is not a checkpoint of this project, so its classes have no names"
        )
    known = content["config"]
    unsaid = {key: known.get(key) for key in ("model", "model_args", "head_args") if key not in said}
    arguments = {**(unsaid.get("model_args") or {}), **(unsaid.get("head_args") or {})}
    check_name_from_file(unsaid.get("model", ""), arguments, f"--predict: {config.resume}")
    trained = {name: known[name] for name in FROM_CHECKPOINT if name not in said and name in known}
    config = replace(config, **trained)
    if config.task == "mae":
        raise ValueError(f"--predict: {config.resume} is a masked autoencoder without classes: fine-tune it")
    averaged = config.model_ema if "model_ema" in said else content["best"].get("weights") == "model_ema"
    key = "model_ema" if averaged else "model"
    if content.get(key) is None:
        raise ValueError(f"--model_ema true: {config.resume} holds no moving average; use --model_ema false")
    if config.task in DENSE_TASKS:
        return predict_dense(config, said, paths, content, key, topology)
    names = list(content["classes"])
    names += [f"unnamed {i}" for i in range(len(names), config.num_classes or 0)]
    size = config.eval_size or config.input_size
    model = build_from_file(config.model, len(names), size, config.model_args, content[key], config.resume)
    load_weights(model, config.resume, key=key)
    model.to(topology.device).eval()

    bad = []
    several, top_k = config.task == "multilabel", min(config.top_k, len(names))
    with torch.inference_mode(), open_writer(config.predict_to, None if several else top_k) as write:
        finish = make_finish(replace(config, input_size=size), len(names), "lanczos")
        for indices, images, reasons in _batches(paths, size, config, topology.device):
            if images is not None:
                with autocast(topology.device, config.amp):
                    logits = model(finish.evaluate(images.to(topology.device), size)).float()
                if not torch.isfinite(logits).all():
                    raise ValueError(f"{config.resume}: the model's answers are not finite; --amp none may help")
                likely = logits.sigmoid().sort(descending=True) if several else logits.softmax(1).topk(top_k)
                rows = iter(zip(*(part.tolist() for part in likely)))
            for index, reason in zip(indices, reasons):
                if reason is None:
                    probabilities, labels = next(rows)
                    least = config.threshold if several else 0.0
                    found = [(names[label], round(p, 6)) for label, p in zip(labels, probabilities) if p >= least]
                    write(paths[index], found, None)
                else:
                    bad.append(f"{paths[index]} ({reason})")
                    write(paths[index], [], reason)
    print(
        f"{len(paths) - len(bad)} images labelled by {key} of step {content['step']}, {config.resume}", file=sys.stderr
    )
    if bad:
        print(f"error: {len(bad)} of {len(paths)} images cannot be used, the first: {bad[0]}", file=sys.stderr)
    return int(bool(bad))


def find_images(where: str) -> list[str]:
    """The image, the images below the folder, or those that the pattern (photos/*.jpg) matches; sorted.

    Raises:
        ValueError: there are none.
    """
    if os.path.isdir(where):
        found, left_out = [], Counter()
        for folder, _, names in os.walk(where):
            for name in names:
                path = os.path.join(folder, name)
                if hidden(name):
                    continue
                if os.path.isfile(path) and (ending(name) in ENDINGS or sniff(path) in readable()):
                    found.append(path)
                else:
                    left_out[ending(name)] += 1
        if left_out:
            print(f"no images, so skipped: {listed(left_out)}", file=sys.stderr)
    else:
        found = [where] if os.path.exists(where) else [path for path in glob.glob(where) if not os.path.isdir(path)]
    if not found:
        raise ValueError(
            f"--predict {where}: no images there; name an image, a folder or a pattern like 'photos/*.jpg'"
        )
    return sorted(found)


@contextmanager
def open_writer(path: str | None, top_k: int | None) -> Iterator[Any]:
    """Yields ``write(image, [(label, probability), ...], reason or None)``; of ``top_k`` labels, None: any number.

    JSON lines go to standard output or a file, CSV to a file whose name ends in .csv. A file appears under its name
    only once it is whole.
    """
    if path is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8")
        yield _json_lines(sys.stdout, top_k)
        return
    if os.path.isdir(path):  # else that would be met when all is done
        raise UsageError(f"--predict_to {path} is a folder: of a classifier name a file, {path.rstrip('/')}/labels.csv")
    temporary = Path(path + ".tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield (_csv if path.lower().endswith(".csv") else _json_lines)(file, top_k)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _json_lines(file: TextIO, top_k: int | None) -> Any:
    key = "labels" if top_k is None else "top"

    def write(image: str, top: list[tuple[str, float]], reason: str | None) -> None:
        line: dict[str, Any] = {"image": image}
        line.update({key: [{"label": a, "probability": b} for a, b in top]} if reason is None else {"error": reason})
        print(_json(line), file=file)

    return write


def _json(line: dict[str, Any]) -> str:
    """JSON in real characters; in escapes if a file's name is no text."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(line)
    return text


def _csv(file: TextIO, top_k: int | None) -> Any:
    writer = csv.writer(file)
    if top_k is None:  # a table that --labels reads
        writer.writerow(["image", "labels", "probabilities", "error"])

        def write_all(image: str, found: list[tuple[str, float]], reason: str | None) -> None:
            cells = [json.dumps(list(part), ensure_ascii=False) for part in zip(*found)] or ["[]", "[]"]
            writer.writerow([image, *(cells if reason is None else ["", ""]), reason or ""])

        return write_all
    columns = [f"{name}_{k}" for k in range(1, top_k + 1) for name in ("label", "probability")]
    writer.writerow(["image", *columns, "error"])

    def write(image: str, top: list[tuple[str, float]], reason: str | None) -> None:
        cells = [value for pair in top for value in pair] or [""] * len(columns)
        writer.writerow([image, *cells, reason or ""])

    return write


class _Images(Dataset):
    """Items are (index, uint8 image (3, S, S) or None, reason why it cannot be used or None)."""

    def __init__(self, paths: list[str], transform: EvalTransform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str | None]:
        try:
            return index, self.transform(read_bytes(self.paths[index])), None
        except OSError as error:
            return index, None, error.strerror or str(error)
        except BadImage as error:
            return index, None, str(error)


def _batches(
    paths: list[str], size: int, config: Config, device: torch.device
) -> Iterator[tuple[list[int], torch.Tensor | None, list[str | None]]]:
    data = _Images(paths, EvalTransform(size, size, "lanczos", config.crop_pct))
    workers = min(config.num_workers, len(paths) // BATCH)  # starting them costs more than a few images
    options = loader_options(workers, device.type == "cuda", BATCH * 3 * size**2)
    return iter(DataLoader(data, BATCH, collate_fn=_collate, **options))


def _collate(items: list[tuple[int, torch.Tensor | None, str | None]]) -> tuple[Any, ...]:
    indices, images, reasons = zip(*items)
    good = [image for image in images if image is not None]
    return indices, torch.stack(good) if good else None, reasons
