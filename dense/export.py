"""Write a detector or segmenter for other code: python -m dense.export CHECKPOINT OUT --format FORMAT [--size H W]."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.reading import read_weights
from models.registry import build_bounded, check_name_from_file
from models.weights import Report

from .build import MULTIPLE, make_dense
from .graphs import DetectorGraph, SegmenterGraph
from .weights import load_dense, to_theirs

TOLERANCE = 1e-3  # of logits and scores, of boxes in sides of the image, of mask probabilities
TIE = 1e-4  # scores that differ by less may change places
WEIGHTS, GRAPHS = ("authors", "mmdetection"), ("onnx", "torch_export")


def export(source: str, out: str | Path, form: str, size: tuple[int, int] | None = None, ema: bool = False) -> str:
    """Write weights under other names, or a graph of a fixed size that was run and agrees with the model.

    Args:
        source: a checkpoint of this project.
        out: the file to write, under that name only once it is whole and checked.
        form: ``authors`` or ``mmdetection``, a PyTorch file {"state_dict": ...} that mmdetection or mmsegmentation
            reads, the body under its authors' names (Swin's, ConvNeXt's detection code) or mmdetection's own; ``onnx``
            or ``torch_export``, normalised images (1, 3, H, W) -> detections or logits (`dense.graphs`).
        size: of a graph: height and width, multiples of 32.
        ema: the moving average instead of the weights themselves.

    Returns:
        The line to print.

    Raises:
        ValueError: no such checkpoint or names, a missing package, or a graph that computes something else.
    """
    content = read_weights(source)
    settings, classes = content.get("config"), content.get("classes")
    if "format_version" not in content or not classes or settings.get("task") not in ("detection", "segmentation"):
        raise ValueError(f"{source} is no checkpoint of a detector or segmenter of this project")
    try:
        head = settings["head"] or ("mask_rcnn" if settings["task"] == "detection" else "upernet")
        outputs = settings["num_classes"] or len(classes)
        name, body, options = settings["model"], settings["model_args"], settings["head_args"]
    except KeyError as error:
        raise ValueError(f"{source}: its settings lack {error}, so its model cannot be built from it") from None
    check_name_from_file(name, {**(body or {}), **(options or {})}, source)
    build = partial(make_dense, head, name, outputs, 0.0, body, options)
    model = build_bounded(build, name, content["model"], source).eval()
    report = load_dense(model, source, "model_ema" if ema else "model")
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    temporary = out.with_name(out.name + ".tmp")
    try:
        if form in WEIGHTS:
            state = {name: tensor.clone() for name, tensor in to_theirs(model.state_dict(), form).items()}
            torch.save({"state_dict": state, "meta": {"CLASSES": list(classes)}}, temporary)
            about = f"{len(state)} tensors in the names of {form}"
        else:
            about = _write_graph(model, temporary, form, size or (512, 512), classes, report)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return f"{out}: {about}"


def _write_graph(
    model: torch.nn.Module, path: Path, form: str, size: tuple[int, int], classes: Sequence[str], report: Report
) -> str:
    if any(side < MULTIPLE or side % MULTIPLE for side in size):
        raise ValueError(f"--size {size[0]} {size[1]}: height and width are multiples of {MULTIPLE}")
    graph = SegmenterGraph(model) if hasattr(model, "auxiliary_head") else DetectorGraph(model)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    about = {"classes": list(classes), "size": list(size), "mean": report.mean, "std": report.std}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(graph, (images,), strict=False)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"torch.export cannot trace {type(model).__name__}: {reason}") from error
        run = (_onnx if form == "onnx" else _torch)(program, path, json.dumps(about), graph.names)
        images = max(_trials(size), key=lambda trial: _count(graph, trial))
        found, expected = run(images), graph(images)
    known = ""
    if isinstance(graph, DetectorGraph):
        difference = disagreement(dict(zip(graph.names, found)), dict(zip(graph.names, expected)), max(size))
        known = f" on {_count(graph, images)} detections"
    else:
        difference = float((found[0] - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= TOLERANCE:  # not a number is wrong too
        how = "finds other objects than the model" if difference == math.inf else f"is {difference:.2g} off the model"
        raise ValueError(f"the exported graph {how}; nothing written")
    return f"{size[0]}x{size[1]} pixels -> {', '.join(graph.names)}; agrees with the model to {difference:.1g}{known}"


def _trials(size: tuple[int, int]) -> Iterator[Tensor]:
    """Images (1, 3, H, W) to compare a graph on: noise, and coarser noise, in which more looks like an object."""
    generator = torch.Generator().manual_seed(0)
    for cell in (1, 8, 32):
        noise = torch.randn(1, 3, -(-size[0] // cell), -(-size[1] // cell), generator=generator)
        yield torch.nn.functional.interpolate(noise, size, mode="bilinear") if cell > 1 else noise


def _count(graph: torch.nn.Module, images: Tensor) -> int:
    """Detections in an image; 0 of a segmenter."""
    return int((graph(images)[1] > 0).sum()) if isinstance(graph, DetectorGraph) else 0


def disagreement(found: dict[str, Tensor], expected: dict[str, Tensor], side: int) -> float:
    """The largest difference between two graphs' detections: of scores, of boxes (in sides of the image), of masks.

    Each expected detection is compared with the nearest of the same label whose score is the same to TIE, so that ties
    may come in any order; infinite if there is none. Where the list is full, its last ties may be cut off differently.

    Args:
        found, expected: by name, as `dense.graphs.DetectorGraph` gives them. side: longer side of the image, pixels.
    """
    scores = expected["scores"]
    worst = (found["scores"] - scores).abs().max()
    open_rows = found["scores"] > 0
    for row in ((scores > 0) & (scores > scores.min() + TIE)).nonzero()[:, 0].tolist():
        alike = open_rows & (found["labels"] == expected["labels"][row])
        rows = (alike & ((found["scores"] - scores[row]).abs() <= TIE)).nonzero()[:, 0]
        if not len(rows):
            return math.inf
        apart = (found["boxes"][rows] - expected["boxes"][row]).abs().amax(1) / side
        nearest = rows[apart.argmin()]
        open_rows[nearest] = False
        worst = torch.maximum(worst, apart.min())
        if "masks" in expected:
            worst = torch.maximum(worst, (found["masks"][nearest] - expected["masks"][row]).abs().max())
    return float(worst)


def _torch(program: Any, path: Path, about: str, names: Sequence[str]) -> Callable[[Tensor], Sequence[Tensor]]:
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={"about": about})
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return lambda images: module(images) if len(names) > 1 else (module(images),)


def _onnx(program: Any, path: Path, about: str, names: Sequence[str]) -> Callable[[Tensor], Sequence[Tensor]]:
    try:
        import onnx  # noqa: F401 (torch.onnx imports both, and says less when they are missing)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format onnx needs packages ({error}): pip install onnx onnxscript onnxruntime") from error
    graph: Any = torch.onnx.export(
        program, (), input_names=["images"], output_names=list(names), dynamo=True, verbose=False
    )
    graph.model.metadata_props["about"] = about
    graph.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dense.export", description=__doc__)
    parser.add_argument("checkpoint", help="of a detector or segmenter of this project")
    parser.add_argument("out", help="the file to write")
    parser.add_argument(
        "--format", choices=[*WEIGHTS, *GRAPHS], default="onnx", help="weights or a graph; default: onnx"
    )
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of a graph; default: 512 512")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    options = parser.parse_args(arguments)
    if options.size is not None and options.format not in GRAPHS:
        parser.error("--size is for graphs: --format onnx or torch_export")
    try:
        print(export(options.checkpoint, options.out, options.format, options.size, options.ema))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
