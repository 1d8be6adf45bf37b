"""Write weights or graphs for other code: python -m models.export CHECKPOINT OUT --format FORMAT [--size N] [--ema]."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import safetensors.torch
import torch

from .formats import to_official, to_timm
from .graphs import export_graph
from .reading import read_weights
from .weights import choose_weights


def export(source: str, out: str | Path, form: str, ema: bool = False) -> str:
    """Convert weights of any known format; returns the line to print.

    Args:
        source: whatever `load_weights` reads.
        out: the file to write, under that name only once it is whole.
        form: `timm`, a safetensors file in timm's names, for `timm.create_model(..., checkpoint_path=out)`; or
            `official`, a PyTorch file {"model": ...} in the names of the model's authors, which detection and
            segmentation code bases read. CSWin and PVT, which timm lacks, have the same names in both.
        ema: the moving average instead of the weights themselves.

    Raises:
        ValueError: the source cannot be read, lacks what is asked for, or no official names are known for it.
    """
    report, state = choose_weights(read_weights(source), source, "model_ema" if ema else None)
    layout, state = to_timm(state)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    names = "timm"
    if form == "official":
        written, state = to_official(state)
        names = written.name
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    temporary = out.with_name(out.name + ".tmp")
    if form == "official":
        torch.save({"model": state}, temporary)
    else:
        safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, out)
    return f"{out}: {len(state)} tensors in {names} names, from {report.key} of {source} ({layout.name})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.add_argument("checkpoint", help="a path, a URL, hf_hub:owner/name")
    parser.add_argument("out", help="the file to write")
    parser.add_argument(
        "--format",
        choices=["timm", "official", "onnx", "torch_export"],
        default="timm",
        help="weights in timm's names (default) or the model's authors'; a graph for ONNX or torch.export.load",
    )
    parser.add_argument("--size", type=int, metavar="N", help="of a graph: pixels a side; default: the checkpoint's")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--model", metavar="NAME", help="of a graph: the model, if the checkpoint's is package.module:function"
    )
    options = parser.parse_args(arguments)
    is_graph = options.format in ("onnx", "torch_export")
    if options.size is not None and not (is_graph and options.size > 0):
        parser.error("--size takes a number of pixels, and is for graphs: --format onnx or torch_export")
    if options.model is not None and not is_graph:
        parser.error("--model is for graphs: --format onnx or torch_export")
    try:
        if is_graph:
            print(
                export_graph(options.checkpoint, options.out, options.format, options.size, options.ema, options.model)
            )
        else:
            print(export(options.checkpoint, options.out, options.format, options.ema))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
