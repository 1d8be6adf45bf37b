"""Ranges of the settings: what can be refused by looking at one number."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from config.kinds import named
from config.settings import Config
from config.urls import check_url, is_url, redact
from config.usage import UsageError, as_usage
from curriculum import parse_duration

# What --allow_change may name beside a setting: parts of a run that several settings, or the files, decide.
PARTS = ("model", "data", "curriculum", "optimizer")

DENSE_TASKS = ("detection", "segmentation")
# Settings that detectors and segmenters would pass over.
FOR_CLASSIFIERS = ("linear_probe", "eval_size", "replay", "eval_data", "real_labels", "class_map", "val_per_class")
FOR_CLASSIFIERS += ("val_share",)

_RANGES = {
    "at least 0": (
        lambda x: x >= 0,
        "num_workers keep_checkpoints mixup cutmix min_lr weight_decay weight_decay_end head_init_scale",
    ),
    "at least 1": (
        lambda x: x >= 1,
        "input_size eval_size crop test_side max_side batch_size num_images devices val_per_class top_k",
    ),
    "from 1 to 1,048,576": (lambda x: 1 <= x <= 1 << 20, "num_classes"),  # a file's; each has a name in memory
    "above 0": (
        lambda x: x > 0,
        "baseline_epochs lr fallback_lr_scale clip_grad opt_eps timeout replay_memory cache_size",
    ),
    "from 0 to 1": (
        lambda x: 0 <= x <= 1,
        "crop_prob mixup_prob mixup_switch_prob smoothing reprob hflip color_jitter max_bad threshold",
    ),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, "crop_pct layer_decay"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "drop_path momentum model_ema_decay"),
    "from 0 to 10": (lambda x: 0 <= x <= 10, "max_magnitude"),
}

COMMANDS = ("plan", "suggest", "doctor", "predict", "eval")  # what main.py does instead of training


def check_ranges(config: Config) -> None:
    """Raises UsageError for a setting outside its range; names it, its value and the range."""
    for expected, (fits, names) in _RANGES.items():
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not fits(value):
                raise UsageError(f"--{name} is {value}; it must be {expected}")
    if not isinstance(config.epochs, str) and not config.epochs > 0:
        raise UsageError(f"--epochs is {config.epochs}; it must be above 0")
    if config.fallback_lr_scale is not None and config.opt != "muon":
        raise UsageError(
            f"--fallback_lr_scale {config.fallback_lr_scale:g} is for --opt muon, not for {config.opt}: leave it out"
        )
    low, high = config.crop_scale
    if not 0 < low <= high <= 1:
        raise UsageError(f"--crop_scale is {list(config.crop_scale)}; it needs 0 < smallest <= largest <= 1")
    low, high = config.crop_ratio
    if not 0 < low <= high:
        raise UsageError(f"--crop_ratio is {list(config.crop_ratio)}; it needs 0 < smallest <= largest")
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and not all((name == "mean" or value > 0) and abs(value) < 1e3 for value in values):
            raise UsageError(f"--{name} is {list(values)}; it is given for pixels in [0, 1], as --mean [0.5,0.5,0.5]")
    if config.opt_betas is not None and not all(0 <= beta < 1 for beta in config.opt_betas):
        raise UsageError(f"--opt_betas is {list(config.opt_betas)}; each must be at least 0 and below 1")


def check_settings(config: Config) -> None:
    """Raises UsageError for a setting outside its range, and for settings that do not go together."""
    check_ranges(config)
    asked = [f"--{name}" for name in COMMANDS if getattr(config, name) not in (None, False, "none")]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} each do something else instead of training: choose one")
    if config.eval and not (config.resume or config.finetune):
        raise UsageError("--eval needs weights: --resume CHECKPOINT (ours) or --finetune FILE (anyone's)")
    if config.predict is not None and not config.resume:
        raise UsageError("--predict needs a checkpoint of this project: --resume CHECKPOINT")
    if config.suggest and isinstance(config.epochs, str):
        raise UsageError(f"--epochs is {config.epochs!r}; --suggest needs a number of epochs")
    if config.suggest and config.task not in ("supervised", "multilabel"):
        raise UsageError(f"--suggest is for classifiers, not for --task {config.task}: begin with a recipe of recipes/")
    _check_data(config)
    if config.task == "mae":
        _check_mae(config)
    if config.task in DENSE_TASKS:
        _check_dense(config)
    if config.task == "multilabel" and config.predict is None:
        _check_multilabel(config)
    parse_interval(config.save_interval)
    parse_parts(config.allow_change)
    for name in ("log_interval", "eval_interval", "stop_after", "patience"):
        with as_usage():
            parse_duration(getattr(config, name) or 0)
    if config.stop_if is not None:
        parse_stop_if(config.stop_if)
    if config.patience is not None and config.task == "mae":
        raise UsageError(f"--patience {config.patience} needs an accuracy, and --task mae has none; use --stop_if")


def _check_data(config: Config) -> None:
    """Raises UsageError for data settings that contradict each other, and URLs that cannot be used."""
    for name in ("data_path", "eval_data", "train_split", "val_split"):
        if is_url(value := getattr(config, name)):
            check_url(value, name)
    if is_url(config.cache_dir):
        raise UsageError(f"--cache_dir {redact(config.cache_dir)} is a URL; name a folder on a local disk")
    if config.val_share is not None:
        parse_share(config.val_share)
        if config.val_per_class is not None:
            raise UsageError("--val_per_class and --val_share both hold images out: give one of them")
    if config.labels is None:
        for name in ("label_columns", "label_separator"):
            if getattr(config, name) is not None:
                raise UsageError(f"--{name} is for a table of labels: name it with --labels")
    elif config.data_set not in ("folder", "tar"):
        raise UsageError(f"--labels is for --data_set folder and tar; {config.data_set} has labels of its own")
    if config.label_columns is not None and len(config.label_columns) not in (2, 3):
        raise UsageError(f"--label_columns is {config.label_columns}: it is [path, label] or [path, label, split]")


def _check_multilabel(config: Config) -> None:
    """Raises UsageError for data that cannot have several labels per image, and for what one label is needed for."""
    for name in ("eval_data", "real_labels"):
        if getattr(config, name):
            raise UsageError(f"--{name} is for --task supervised: it scores the one class of each image")
    if config.data_set not in ("folder", "tar") or (config.data_set == "folder" and config.labels is None):
        raise UsageError(
            f"--task multilabel with --data_set {config.data_set} needs several labels per image: name their table "
            "with --labels (or use --data_set tar, whose .json files may list them)"
        )


def parse_share(value: float | str) -> float:
    """``10%`` or ``0.1`` -> 0.1. Raises UsageError for what is no share between 0 and 1."""
    try:
        share = float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UsageError(f"--val_share is {value}: a share lies between 0 and 1, like 10% or 0.1")
    return share


def _check_mae(config: Config) -> None:
    """Raises UsageError for settings that masked autoencoders have no use for."""
    unwanted = [f"--{name} 0" for name in ("mixup", "cutmix", "reprob", "color_jitter") if getattr(config, name) > 0]
    if config.magnitude != "none":
        unwanted.append("--magnitude none")
    if unwanted:
        raise UsageError(
            f"--task mae predicts what it hides of images that are only cropped and flipped: set {' '.join(unwanted)} "
            "(recipes in recipes/mae do)"
        )
    for name in ("finetune", "linear_probe", "eval"):
        if value := getattr(config, name):
            raise UsageError(
                f"--{name} {str(value).lower() if value is True else value} is for --task supervised: a masked "
                "autoencoder has no classes, and is fine-tuned or probed by a run of its own (recipes/mae)"
            )


def _check_dense(config: Config) -> None:
    """Raises UsageError for settings that detectors and segmenters have no use for."""
    unwanted = [
        f"--{name} 0"
        for name in ("mixup", "cutmix", "reprob", "smoothing", "color_jitter")
        if getattr(config, name) > 0
    ]
    if config.magnitude != "none":
        unwanted.append("--magnitude none")
    if unwanted:
        raise UsageError(
            f"--task {config.task} has augmentation of its own: set {' '.join(unwanted)} (recipes in recipes/dense do)"
        )
    fitting = ("retinanet", "mask_rcnn", "cascade") if config.task == "detection" else ("upernet",)
    if config.head is not None and config.head not in fitting:
        raise UsageError(f"--head {config.head} does not fit --task {config.task}: choose {' or '.join(fitting)}")
    for name in FOR_CLASSIFIERS:
        if value := getattr(config, name):
            raise UsageError(f"--{name} {str(value).lower()} is for classifiers, not for --task {config.task}")
    if config.train_sides is not None and (not config.train_sides or min(config.train_sides) < 1):
        raise UsageError(f"--train_sides is {config.train_sides}; it needs short sides of images in pixels")


def parse_interval(text: str | float) -> float | None:
    """``30 minutes`` -> seconds; None for a duration of the plan (:func:`curriculum.parse_duration`).

    Raises:
        UsageError: neither.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(?:min|minutes?)\s*", str(text))
    if match is None:
        try:
            parse_duration(text)
        except ValueError as error:
            raise UsageError(f"--save_interval: {error}, or 30 minutes") from None
        return None
    try:
        return 60 * float(match[1])
    except ValueError:
        raise UsageError(f"--save_interval {text!r} is not understood; write e.g. 30 minutes") from None


class Rule(NamedTuple):
    """``--stop_if``: what a number of the log must not be, and from when on."""

    name: str
    sign: str
    bound: float
    after: str


def parse_stop_if(text: str) -> Rule:
    """``test_acc1 < 5 after 10%`` -> its parts. Raises UsageError for another form."""
    match = re.fullmatch(r"\s*(\w+)\s*(<=?|>=?)\s*(\S+)\s+after\s+(\S.*)", text)
    try:
        rule = Rule(match[1], match[2], float(match[3]), match[4])
        parse_duration(rule.after)
        return rule
    except (TypeError, ValueError) as error:
        reason = f": {error}" if match and "duration" in str(error) else ""
        raise UsageError(f'--stop_if {text!r} is not understood; write "test_acc1 < 5 after 10%"{reason}') from None


def parse_parts(text: str | None) -> list[str]:
    """``data,seed`` -> the names. Raises UsageError for one that is neither among PARTS nor a setting that may be
    allowed to change."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    known = (*PARTS, *named(Config, "learned", "curriculum", "optimizer"))
    for name in names:
        if name in named(Config, "free"):
            raise UsageError(f"--allow_change {name}: {name} may differ without it; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            parts = f"it may name {', '.join(PARTS)}, or a setting that changes what is learned"
            raise UsageError(
                f"--allow_change {name}: no such part of a run; {f'did you mean {near[0]}?' if near else parts}"
            )
    return names
