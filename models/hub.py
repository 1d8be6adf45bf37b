"""A model as a repository of the Hugging Face hub: weights, timm's config.json and a card; and pushing it there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME
from torch import nn

from .card import card, facts
from .rebuilt import Rebuilt, rebuild

CONFIG, CARD = "config.json", "README.md"
FILES = (HF_SAFE_WEIGHTS_NAME, CONFIG, CARD)
TOLERANCE = 1e-4  # of logits, relative to the largest where that is above 1


def export_folder(
    source: str,
    out: str | Path,
    ema: bool = False,
    model: str | None = None,
    accuracy: str | None = None,
    licence: str | None = None,
    repository: str | None = None,
) -> str:
    """Write a folder that ``timm.create_model("local-dir:OUT", pretrained=True)`` loads: weights, config.json, card.

    timm's model must agree with the checkpoint's to 1e-4 on random images. Where timm has no such model, the folder is
    for this project, and the card says so.

    Args:
        source: a checkpoint of this project.
        out: the folder, new, empty, or of an earlier export.
        ema, model: as in :func:`models.graphs.export_graph`.
        accuracy, licence: as in :func:`models.card.facts`.
        repository: what the hub will call it, for the card.

    Returns:
        The line to print.

    Raises:
        ValueError: not such a checkpoint, or other files lie in the folder.
    """
    out = Path(out)
    others = {path.name for path in out.iterdir()} - {*FILES} if out.is_dir() else set()
    if others or ((out / CARD).exists() and not (out / HF_SAFE_WEIGHTS_NAME).exists()):
        first = min(others, default=CARD)
        raise ValueError(f"{out} holds other files, such as {first}: name a folder of its own for the export")
    built = rebuild(source, ema=ema, name=model)
    about = facts(source, built.content, built.report.key, accuracy, licence)
    about["model"] = built.name
    config, refusal = describe(built, licence)
    is_timms = refusal is None
    place = f"hf-hub:{repository}" if repository else f"local-dir:{out.name}"
    text = card(repository or out.name, about, _use(built, config, place, refusal), is_timms)
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in built.model.state_dict().items()}
    write_safetensors(out / HF_SAFE_WEIGHTS_NAME, state, about)
    for name, content in ((CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n"), (CARD, text)):
        temporary = out / f"{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, out / name)
    loaded = "timm loads it" if is_timms else f"for this project alone ({refusal})"
    return f"{out}: {built.name}, {len(state)} tensors from {built.report.key} of {source}; {loaded}"


def write_safetensors(path: Path, state: dict[str, torch.Tensor], about: dict[str, Any] | None) -> None:
    """A safetensors file, under its name only once it is whole, with ``about`` as JSON in its metadata."""
    metadata = {"format": "pt"}
    if about is not None:
        metadata["training"] = json.dumps(about, ensure_ascii=False)
    temporary = path.with_name(path.name + ".tmp")
    safetensors.torch.save_file(state, temporary, metadata=metadata)
    os.replace(temporary, path)


def push(folder: str | Path, repository: str) -> str:
    """Upload an exported folder, by the token of `hf auth login`. Returns the line to print.

    Raises:
        ValueError: it cannot be pushed; the folder is still there.
    """
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Weights and model card"
        )
    except Exception as error:  # each library has its own for a lost connection, a missing token, a wrong name
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"--push {repository}: not pushed ({reason}); {folder} holds the export. `hf auth login` sets the token"
        ) from None
    return f"pushed to {url}"


def describe(built: Rebuilt, licence: str | None = None) -> tuple[dict[str, Any], str | None]:
    """config.json in timm's form, and why timm cannot build the model from it; None if it can."""
    model, report, size = built.model, built.report, built.size
    noted = dict(getattr(model, "pretrained_cfg", None) or {})
    kept = ("first_conv", "classifier", "fixed_input_size")
    config = {
        "architecture": noted.get("architecture") or built.name,
        "num_classes": model.num_classes,
        "num_features": getattr(model, "num_features", None),
        "label_names": built.classes if len(built.classes) == model.num_classes else None,
        "model_args": dict(built.arguments),
        "pretrained_cfg": {
            **{key: noted[key] for key in kept if noted.get(key) is not None},
            "input_size": [3, size, size],
            "interpolation": "lanczos",
            "crop_pct": built.crop_pct,
            "mean": list(report.mean),
            "std": list(report.std),
            "num_classes": model.num_classes,
            **({"license": licence} if licence else {}),
        },
    }
    config = {key: value for key, value in config.items() if value is not None}
    if not noted.get("architecture"):
        return config, "it is a model of its own, which timm does not know"
    entry = timm.model_entrypoint(config["architecture"])
    for arguments in _arguments(built):
        if _agrees(entry, arguments, built):
            config["model_args"] = arguments
            ours = not entry.__module__.startswith("timm.")
            return config, "timm does not know this model" if ours else None
    return config, f"timm's {config['architecture']} does not compute what this model does"


def _arguments(built: Rebuilt) -> Iterator[dict[str, Any]]:
    """Ways to ask timm for a model of this input size, the plainest first."""
    given = dict(built.arguments)
    yield given
    yield {**given, "img_size": built.size}
    windows = [part.window_size for part in built.model.modules() if hasattr(part, "window_size")]
    if windows:
        window = windows[0] if isinstance(windows[0], int) else windows[0][0]
        yield {**given, "img_size": built.size, "window_size": window}


@torch.no_grad()
def _agrees(entry: Any, arguments: dict[str, Any], built: Rebuilt) -> bool:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, built.size, built.size, generator=generator)
    try:
        theirs: nn.Module = entry(num_classes=built.model.num_classes, **arguments).eval()
        theirs.load_state_dict(built.model.state_dict())
        found, expected = theirs(images), built.model(images)
    except Exception:  # constructors refuse sizes and arguments each in a way of its own
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1))


def _use(built: Rebuilt, config: dict[str, Any], place: str, refusal: str | None) -> str:
    """How to load it, as Markdown."""
    timms = [
        "```python",
        "import timm",
        "",
        f'model = timm.create_model("{place}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
        "```",
    ]
    if refusal is None:
        return "\n".join(timms)
    arguments = "".join(f", {key}={value!r}" for key, value in built.arguments.items())
    weights = place.replace("hf-hub:", "hf_hub:").replace("local-dir:", "") + f"/{HF_SAFE_WEIGHTS_NAME}"
    sizes = f"num_classes={config['num_classes']}, input_size={built.size}"
    return "\n".join(
        [
            f"timm alone cannot load this: {refusal}. From a checkout of the project that trained it:",
            "",
            "```python",
            "from models import create_model, load_weights",
            "",
            f'model = create_model("{built.name}", {sizes}{arguments}).eval()',
            f'load_weights(model, "{weights}")',
            "```",
        ]
    )
