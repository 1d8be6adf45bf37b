"""What weights are and what they cost: facts for the metadata of exported files, and a model card of them."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from config import Config, plain
from config.files import read_text
from config.kinds import named

from .run_files import check_records, read_environment, read_log, read_plan, read_settings

PER_IMAGE = 6  # FLOPs of training for each multiply-add of a forward pass: two, and twice that backward
_OWN_FOLDER = re.compile(r"[/~\\]|[A-Za-z]:[/\\]")  # how a path begins that says where somebody's files lie
FINGERPRINT = ("images", "classes", "digest", "order")  # of a data set, as training/identity.py makes it
SCORES = {"acc1": "top-1, %", "acc5": "top-5, %", "map": "mAP, %", "real_acc1": "ReaL top-1, %", "loss": "loss"}


def facts(
    source: str, content: Mapping[str, Any], key: str, accuracy: str | None = None, licence: str | None = None
) -> dict[str, Any]:
    """What a checkpoint of this project, and the run's folder that it lies in, say of its weights; plain types.

    Args:
        source: where the checkpoint was read from.
        content: what it holds.
        key: which of its weights: ``model`` or ``model_ema``.
        accuracy: a file of lines as ``main.py --eval`` prints them.
        licence: of the weights.

    Raises:
        ValueError, OSError: ``accuracy`` is no such file.
    """
    settings, identity = content.get("config") or {}, content.get("identity") or {}
    records, sizes, devices = _run(Path(source).parent, content)
    return {
        "weights": key,
        "step": content.get("step"),
        "share_of_the_plan": content.get("progress"),
        "model": settings.get("model"),
        "classes": content.get("classes"),
        "data": {part: _data_of(identity[part]) for part in ("data", "validation") if part in identity},
        "accuracy": [*_logged(records, content, key), *_evaluated(accuracy, key)],
        "cost": _cost(records, sizes, devices, content),
        "license": licence,
        "recipe": recipe(settings),
    }


def recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make the result and are not the defaults; of absolute paths, the file's name alone."""
    defaults = plain(Config())
    shown = {}
    for name in named(Config, "learned", "curriculum", "optimizer", "model"):
        value = json.loads(json.dumps(settings.get(name, defaults[name]), default=str))
        if value != defaults[name]:
            shown[name] = Path(value).name if isinstance(value, str) and _OWN_FOLDER.match(value) else value
    return shown


def _run(folder: Path, content: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[int, float], dict[str, Any]]:
    """Of the checkpoint's run, if the folder is its own: records of the passes that the weights have seen,
    multiply-adds of an image by input size, and the devices."""
    path = folder / "log.txt"
    try:
        records = check_records(read_log(path), path)
        plan, environment, settings = read_plan(folder), read_environment(folder), read_settings(folder)
    except FileNotFoundError:  # the checkpoint alone then says what it can
        return [], {}, {}
    except (OSError, ValueError) as error:
        print(f"warning: of the run only its checkpoint is told: {error}", file=sys.stderr)
        return [], {}, {}
    progress = content.get("progress")
    if progress is None or recipe(settings) != recipe(content.get("config") or {}):
        return [], {}, {}
    records = [record for record in records if record["progress"] <= progress + 1e-9]
    sizes = {stage["input_size"]: stage["flops"] for stage in plan["stages"] if stage.get("flops")}
    return records, sizes, {"number": plan.get("devices"), "name": environment.get("devices")}


def _data_of(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: about[key] for key in FINGERPRINT if isinstance(about.get(key), int | str)}


def _logged(records: list[dict[str, Any]], content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """What the run itself measured of these very weights."""
    suffix = key.removeprefix("model")
    last = records[-1] if records else {}
    if last.get("step") != content.get("step") or "eval_size" not in last:
        return []
    found = {name: last[f"test_{name}{suffix}"] for name in SCORES if f"test_{name}{suffix}" in last}
    return [{"eval_size": last["eval_size"], **found}] if found else []


def _evaluated(path: str | None, key: str) -> list[dict[str, Any]]:
    if path is None:
        return []
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            scores = json.loads(line)
            if scores["weights"] == key:
                found.append({name: scores[name] for name in ("eval_size", *SCORES) if name in scores})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--accuracy {path}, line {number}: not a line that main.py --eval prints") from None
    if not found:
        raise ValueError(f"--accuracy {path}: no line is of {key}, the weights that are exported")
    return found


def _cost(
    records: list[dict[str, Any]], sizes: dict[int, float], devices: dict[str, Any], content: Mapping[str, Any]
) -> dict[str, Any]:
    """Of the training: images by input size, FLOPs, hours (without evaluations) and device-hours; None: not known."""
    images: Counter[int] = Counter()
    for stage in content.get("trained") or []:
        size, batch, steps = (*stage, 0, 0, 0)[:3]
        images[size] += batch * steps
    seconds = None
    if records:
        images = Counter()
        for record in records:
            images[record["input_size"]] += record["images"]
        seconds = sum(record["seconds"] for record in records)
    flops = None
    if images and images.keys() <= sizes.keys():
        flops = PER_IMAGE * sum(count * sizes[size] for size, count in images.items())
    number = devices.get("number")
    return {
        "images": {str(size): count for size, count in sorted(images.items())},
        "flops": flops,
        "hours": None if seconds is None else seconds / 3600,
        "device_hours": None if seconds is None or not number else seconds / 3600 * number,
        "devices": devices.get("name"),
    }


# -- the card ----------------------------------------------------------------------------------------------------------


def card(name: str, about: Mapping[str, Any], use: str, is_timms: bool) -> str:
    """A README.md in the form of the Hugging Face hub.

    Args:
        name: the repository's, or the folder's.
        about: from :func:`facts`.
        use: how the model is loaded, Markdown.
        is_timms: whether timm builds it by itself.
    """
    head = {"library_name": "timm" if is_timms else "pytorch", "pipeline_tag": "image-classification"}
    head["tags"] = ["image-classification", "efficienttrain", *["timm"] * is_timms]
    if about["license"]:
        head["license"] = about["license"]
    weights = "the moving average of the weights" if about["weights"] == "model_ema" else "the weights"
    share = about["share_of_the_plan"]
    done = "" if share is None else f" ({100 * share:.1f} % of the plan)"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            "---",
            f"# {name}",
            "",
            f"`{about['model']}` with {len(about['classes'])} classes: {weights} after step {about['step']:,}{done}.",
            f"Licence of the weights: {about['license'] or 'not stated'}.",
            "",
            "## Accuracy",
            "",
            *_accuracy(about["accuracy"]),
            "",
            "## Training cost",
            "",
            *_cost_table(about["cost"]),
            "",
            "## Data",
            "",
            *_data(about["data"]),
            "",
            "## Use",
            "",
            use,
            "",
            "## Recipe",
            "",
            "Settings that differ from the defaults:",
            "",
            "```yaml",
            yaml.safe_dump(dict(about["recipe"]), sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def _accuracy(scores: list[dict[str, Any]]) -> list[str]:
    if not scores:
        return ["Not measured at this step."]
    names = [name for name in SCORES if any(name in row for row in scores)]
    rows = [["input size", *(SCORES[name] for name in names)]]
    rows += [[row["eval_size"], *(f"{row[name]:.2f}" if name in row else "–" for name in names)] for row in scores]
    return _table(rows)


def _cost_table(cost: Mapping[str, Any]) -> list[str]:
    def said(value: float | None, text: str) -> str:
        return "not known" if value is None else text.format(value)

    images = ", ".join(f"{count:,} at {size}" for size, count in cost["images"].items())
    rows = [
        ["", ""],
        ["FLOPs (six for each multiply-add of a forward pass)", said(cost["flops"], "{:.3g}")],
        ["hours, without evaluations", said(cost["hours"], "{:.2f}")],
        ["device-hours, on the devices of the last start", said(cost["device_hours"], "{:.2f}")],
        ["devices", cost["devices"] or "not known"],
        ["images by input size", images or "not known"],
    ]
    return _table(rows)


def _data(data: Mapping[str, Any]) -> list[str]:
    names = {"data": "training", "validation": "validation"}
    rows = [["", *FINGERPRINT]]
    rows += [[names[part], *(about.get(key, "–") for key in FINGERPRINT)] for part, about in data.items()]
    return _table(rows) if data else ["Not known."]


def _table(rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
