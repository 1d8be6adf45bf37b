"""Write weights, graphs or a hub's folder for other code: python -m models.export CHECKPOINT OUT --format FORMAT."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from .card import facts
from .formats import to_official, to_timm
from .graphs import export_graph
from .hub import export_folder, push, write_safetensors
from .reading import read_weights
from .rebuilt import refuse_dense
from .weights import choose_weights


def export(source: str, out: str | Path, form: str, ema: bool = False) -> str:
    """Convert weights of any known format; returns the line to print.

    Args:
        source: whatever `load_weights` reads.
        out: the file to write, under that name only once it is whole.
        form: `timm`, a safetensors file in timm's names, for `timm.create_model(..., checkpoint_path=out)`; or
            `official`, a PyTorch file {"model": ...} in the names of the model's authors, which detection and
            segmentation code bases read. CSWin and PVT, which timm lacks, have the same names in both. Of a checkpoint
            of this project either says what the weights are and cost (:func:`models.card.facts`), as JSON: in the
            metadata, key `training`, or beside the weights.
        ema: the moving average instead of the weights themselves.

    Raises:
        ValueError: the source cannot be read, lacks what is asked for, or no official names are known for it.
    """
    content = read_weights(source)
    refuse_dense(content, source)
    report, state = choose_weights(content, source, "model_ema" if ema else None)
    about = facts(source, content, report.key) if "format_version" in content else None
    layout, state = to_timm(state)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    names = "timm"
    if form == "official":
        written, state = to_official(state)
        names = written.name
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    if form == "official":
        temporary = out.with_name(out.name + ".tmp")
        torch.save({"model": state, **({"training": json.dumps(about)} if about else {})}, temporary)
        os.replace(temporary, out)
    else:
        write_safetensors(out, state, about)
    return f"{out}: {len(state)} tensors in {names} names, from {report.key} of {source} ({layout.name})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.add_argument("checkpoint", help="a path, a URL, hf_hub:owner/name")
    parser.add_argument("out", help="the file to write; the folder, of format hub")
    parser.add_argument(
        "--format",
        choices=["timm", "official", "onnx", "torch_export", "hub"],
        help="weights in timm's names (default) or the model's authors'; a graph for ONNX or torch.export.load; a "
        "folder for the Hugging Face hub: weights, timm's config.json and a model card",
    )
    parser.add_argument("--size", type=int, metavar="N", help="of a graph: pixels a side; default: the checkpoint's")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument(
        "--model", metavar="NAME", help="of a graph or a hub: the model, if the checkpoint's is package.module:function"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub (implies --format hub)")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the card: mit, cc-by-nc-4.0, ...")
    parser.add_argument("--accuracy", metavar="FILE", help="lines that main.py --eval printed, for the card")
    options = parser.parse_args(arguments)
    form = options.format or ("hub" if options.push else "timm")
    is_graph = form in ("onnx", "torch_export")
    if options.size is not None and not (is_graph and options.size > 0):
        parser.error("--size takes a number of pixels, and is for graphs: --format onnx or torch_export")
    if options.model is not None and not (is_graph or form == "hub"):
        parser.error("--model is for graphs and the hub: --format onnx, torch_export or hub")
    for name in ("push", "license", "accuracy"):
        if getattr(options, name) is not None and form != "hub":
            parser.error(f"--{name} is for the hub: --format hub")
    try:
        if form == "hub":
            about = options.accuracy, options.license, options.push
            print(export_folder(options.checkpoint, options.out, options.ema, options.model, *about))
            if options.push:
                print(push(options.out, options.push))
        elif is_graph:
            print(export_graph(options.checkpoint, options.out, form, options.size, options.ema, options.model))
        else:
            print(export(options.checkpoint, options.out, form, options.ema))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
