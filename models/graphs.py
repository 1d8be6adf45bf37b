"""Export a checkpoint's model as a graph of fixed input size: ONNX, or PyTorch's own (torch.export)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .card import facts
from .rebuilt import rebuild

TOLERANCE = 1e-4  # of logits, relative to the largest where that is above 1


def export_graph(
    source: str, out: str | Path, form: str, size: int | None = None, ema: bool = False, model: str | None = None
) -> str:
    """Write the graph from normalised images (N, 3, size, size), float32, to logits (N, classes); any N if it can be.

    The file carries a description, under the key ``about``: class names, input size, the mean and deviation to
    normalise pixels in [0, 1] by, the centre crop's share (``crop_pct``), and what the weights are and cost
    (``training``). It is run on random images and must agree with the model to 1e-4, else nothing is written; ONNX is
    run by onnxruntime.

    Args:
        source: a checkpoint of this project.
        out: the file to write, under that name only once it is whole and checked.
        form: ``onnx``, or ``torch_export``, which ``torch.export.load`` reads.
        size: pixels a side; default: the checkpoint's base size.
        ema: the moving average instead of the weights themselves.
        model: its name; default: the checkpoint's, which must then be one of the registry's.

    Returns:
        The line to print.

    Raises:
        ValueError: a checkpoint without settings, a missing package, a model that cannot be exported, or a graph that
            computes something else.
    """
    built = rebuild(source, size, ema, model)
    network, size, report = built.model, built.size, built.report
    about = {"classes": built.classes, "input_size": size, "mean": report.mean, "std": report.std}
    about.update(crop_pct=built.crop_pct, training=facts(source, built.content, report.key))
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    temporary = out.with_name(out.name + ".tmp")
    try:
        program, images = _capture(network, size)
        write = {"onnx": _write_onnx, "torch_export": _write_torch}[form]
        run = write(program, temporary, json.dumps(about))
        with torch.no_grad():
            difference = _difference(run(images), network(images))
        if not difference <= TOLERANCE:  # not a number is wrong too
            raise ValueError(
                f"the exported graph's outputs differ from the model's by {difference:.2g}; nothing written"
            )
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    batch = "any batch" if len(images) > 1 else "one image at a time"
    classes = network.num_classes
    return f"{out}: {size}x{size} pixels, {batch}, {classes} classes; agrees with the model to {difference:.1g}"


def _capture(model: nn.Module, size: int) -> tuple[torch.export.ExportedProgram, Tensor]:
    """The traced model, and images to try it with: three where it takes any number, else one."""
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            batch = {0: torch.export.Dim("batch", min=1)}
            return torch.export.export(model, (images[:2],), dynamic_shapes=(batch,)), images
        except Exception:  # it computes with the number of images: torch has a type of its own for each way to fail
            pass
        try:
            return torch.export.export(model, (images[:1],)), images[:1]
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"torch.export cannot trace {type(model).__name__}: {reason}") from error


def _write_torch(program: torch.export.ExportedProgram, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={"about": about})
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    if torch.__version__ < "2.6":
        raise ValueError(f"--format onnx needs torch 2.6 or newer, this is {torch.__version__}")
    try:
        import onnx  # noqa: F401 (torch.onnx imports both, and says less when they are missing)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format onnx needs packages ({error}): pip install onnx onnxscript onnxruntime") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph: Any = torch.onnx.export(
            program, (), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
    graph.model.metadata_props["about"] = about
    graph.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
