"""What makes a run this run and no other: a resume under other settings of these is refused unless allowed by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from config import Config, UsageError, plain
from config.checks import parse_parts
from config.kinds import named
from curriculum import Plan, Segment
from datasets import Source
from inputs.views import fingerprint
from models.checkpoints import BadCheckpoint

OPTIMIZER = tuple(named(Config, "optimizer"))
DENSE = ("task", "head", "head_args")
MAE = ("task", "mae_target", "decoder")
OF_TASK = {"multilabel": ("task",), "mae": MAE, "detection": DENSE, "segmentation": DENSE}
SETTINGS_OF_LATER = ("mask_ratio",)  # in the identity of earlier checkpoints, and compared as the setting that it is
# Settings that are compared by what came of them.
IN_IDENTITY = ("batch_size", "seed", "model", "model_args", "num_classes", *MAE, *DENSE)
# Settings that lead to what a key of the identity says, where it has another name.
SIZES = ("input_size", "crop", "test_side")  # of a classifier, a segmenter, a detector
NARROWER = {"stages": SIZES, "base_size": SIZES, "classes": ("num_classes",)}


def identify(config: Config, plan: Plan, sources: tuple[Source, Source], classes: int) -> dict[str, Any]:
    """Plain types: what settings led to, and must not differ on a resume. ``sources``: training and validation set."""
    curriculum = asdict(plan.curriculum)
    curriculum["stages"] = [_segment(stage) for stage in plan.curriculum.stages]
    curriculum.update(
        epochs=plan.epochs,
        max_magnitude=plan.max_magnitude,
        early_large_batch=config.early_large_batch,
        replay=[stage.replay for stage in plan.stages],
    )
    # Of a classifier nothing more, so that checkpoints from before there were other tasks are still known.
    task = {key: getattr(config, key) for key in OF_TASK.get(config.task, ())}
    optimizer = {key: getattr(config, key) for key in OPTIMIZER}
    if config.momentum is None:  # in numbers, as earlier checkpoints have it
        optimizer["momentum"] = 0.95 if config.opt == "muon" else 0.9
    return {
        "model": {"name": config.model, "classes": classes, "arguments": config.model_args or {}, **plain(task)},
        "data": fingerprint(sources[0]),
        "validation": fingerprint(sources[1]),
        "curriculum": plain(curriculum),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "optimizer": plain(optimizer),
    }


def _segment(stage: Segment) -> str:
    filtered = "" if stage.radius is None else f", low-pass {stage.radius:g}"
    return f"{stage.input_size} until {stage.until:g}{filtered}" + f", mixing x {stage.mixing:g}" * (stage.mixing != 1)


@dataclass(frozen=True)
class Difference:
    """Something in which a run differs from the checkpoint that it resumes: what ``--allow_change`` calls it (the
    first name is what messages suggest), in words, and whether it makes another plan."""

    names: tuple[str, ...]
    text: str
    replans: bool = False


def check_same_run(
    saved: dict[str, Any], config: Config, now: dict[str, Any], where: str, is_main: bool = True
) -> list[Difference]:
    """Compares a checkpoint with this run: settings by their kinds, data and plans by what came of them.

    Prints which circumstances differ.

    Args:
        saved: the checkpoint.
        now: this run's identity.
        where: the checkpoint, for messages.

    Returns:
        What differs and is allowed to.

    Raises:
        UsageError: they differ in what is not allowed to; lists the differences.
    """
    found = differences(saved, config, now)
    allowed = parse_parts(config.allow_change)
    refused = [difference for difference in found if not {*difference.names} & {*allowed}]
    if refused:
        names = list(dict.fromkeys(difference.names[0] for difference in refused if difference.names[0] != "model"))
        ways = ["go back to the settings of then", "choose another --output_dir to start anew"]
        if any(difference.names[0] == "model" for difference in refused):
            ways.append("start another model from these weights with --finetune")
        else:
            ways.append(f"resume regardless with --allow_change {','.join(names)}")
        listed = "; ".join(difference.text for difference in refused)
        raise UsageError(f"{where} is of another run: {listed}. {', '.join(ways[:-1]).capitalize()}, or {ways[-1]}")
    if is_main and "digest" not in (saved["identity"] or {}).get("data", ()):
        print(f"{where} is of an earlier version: whether its images were others than these it cannot tell", flush=True)
    noted = _settings(saved["config"], config, *named(Config, "free"))
    if noted and is_main:
        print(f"settings that differ from the checkpoint's: {'; '.join(text for _, text in noted)}", flush=True)
    return found


def differences(saved: dict[str, Any], config: Config, now: dict[str, Any]) -> list[Difference]:
    """All in which a checkpoint's run differs from this one, but for circumstances.

    A checkpoint of an earlier version is compared in what it says: format 1 has no identity, and a setting that it did
    not know counts as equal. Of its images it may know no more than how many there were.
    """
    found = []
    for part, before in (saved["identity"] or {}).items():
        after = now.get(part)
        if part in ("data", "validation"):
            known = [key for key in before if key != "order" or before.get("digest") == after["digest"]]
            before, after = ({key: side.get(key) for key in known} for side in (before, after))
        for key, text in _compared(before, after, part):
            narrower = NARROWER.get(key, (key,))
            names = dict.fromkeys(("data" if part == "validation" else part, *narrower))
            found.append(Difference(tuple(names), text, part in ("data", "curriculum", "batch_size")))
    covered = () if saved["identity"] is None else IN_IDENTITY
    wanted = [name for name in named(Config, "learned", "model") if name not in covered]
    for name, text in _settings(saved["config"], config, *wanted):
        found.append(Difference(("model" if name in named(Config, "model") else name,), text))
    return found


def check_place(saved: dict[str, Any], plan: Plan, where: str) -> None:
    """Raises BadCheckpoint for a step and a pass that do not go together, or that the plan does not have."""
    step, number = saved["step"], saved["epoch"]
    record = plan.records[min(number, len(plan) - 1)]
    first = plan.total_steps if number == len(plan) else record.first_step
    if number > len(plan) or not first <= step <= record.first_step + record.steps:
        raise BadCheckpoint(
            f"{where} says that it is of step {step} in pass {number + 1}, which its plan of {plan.total_steps} steps "
            f"and {len(plan)} passes does not have: take another one"
        )


def _settings(before: dict[str, Any], config: Config, *names: str) -> list[tuple[str, str]]:
    now = json.loads(json.dumps(asdict(config)))
    names = [name for name in names if name in before and before[name] != now[name]]
    # How a run was started is not what it is; what is not stated of these is the run's (main.prepare).
    unstated = [name for name in ("micro_batch", "forward_batch", "mean", "std") if now[name] in (None, "auto")]
    return [
        (name, f"{name} was {_short(before[name])} and is {_short(now[name])}")
        for name in names
        if name not in (*unstated, "allow_change", "resume", "auto_resume")
    ]


def _compared(before: Any, now: Any, name: str) -> list[tuple[str, str]]:
    """(key, difference in words) of a part; the key is the part's own name if it has no keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in SETTINGS_OF_LATER]
        return [(key, text) for key in keys for text in _differences(before.get(key), now.get(key), f"{name} {key}")]
    return [(name, text) for text in _differences(before, now, name)] if before != now else []


def _differences(before: Any, now: Any, name: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{name} {key}")]
    return [f"{name} was {_short(before)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def differing_images(images: Source, usable: Source, content: dict[str, Any], where: str, config: Config) -> list[str]:
    """A line that says that the validation images are not those of the run that wrote a checkpoint, if so."""
    identity = content.get("identity")
    saved = identity.get("validation") if isinstance(identity, dict) else None
    if config.eval_data or not isinstance(saved, dict) or "digest" not in saved:
        return []
    counts = [number if isinstance(number, int) else 0 for number in (saved.get("images"), content.get("unusable"))]
    then, now = counts[0] - counts[1], len(usable)
    if then == now and saved["digest"] == fingerprint(images)["digest"]:
        return []
    said = f"{then} then, {now} now" if then != now else "other names"
    return [f"warning: the validation images are not those of the run that wrote {where} ({said}): compare with care"]
