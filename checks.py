"""Ranges of the settings: what can be refused by looking at one number."""

from __future__ import annotations

from config import Config
from identity import parse_parts
from inputs.remote import check_url, is_url
from saving import parse_interval
from utils import redact

_RANGES = {
    "at least 0": (
        lambda x: x >= 0,
        "num_workers keep_checkpoints mixup cutmix min_lr weight_decay weight_decay_end head_init_scale",
    ),
    "at least 1": (
        lambda x: x >= 1,
        "input_size eval_size batch_size num_images num_classes devices val_per_class top_k",
    ),
    "above 0": (lambda x: x > 0, "epochs baseline_epochs lr clip_grad opt_eps timeout replay_memory cache_size"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "mixup_prob mixup_switch_prob smoothing reprob hflip max_bad"),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, "crop_pct layer_decay"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "drop_path momentum model_ema_decay"),
    "from 0 to 10": (lambda x: 0 <= x <= 10, "max_magnitude"),
}


def check_settings(config: Config) -> None:
    """Raises ValueError for a setting outside its range; names it, its value and the range."""
    for expected, (fits, names) in _RANGES.items():
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not fits(value):
                raise ValueError(f"--{name} is {value}; it must be {expected}")
    low, high = config.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"--crop_scale is {list(config.crop_scale)}; it needs 0 < smallest <= largest <= 1")
    if config.opt_betas is not None and not all(0 <= beta < 1 for beta in config.opt_betas):
        raise ValueError(f"--opt_betas is {list(config.opt_betas)}; each must be at least 0 and below 1")
    if config.eval and not (config.resume or config.finetune):
        raise ValueError("--eval needs weights: --resume CHECKPOINT (ours) or --finetune FILE (anyone's)")
    if config.predict is not None and not config.resume:
        raise ValueError("--predict needs a checkpoint of this project: --resume CHECKPOINT")
    for name in ("data_path", "eval_data", "train_split", "val_split"):
        if (value := getattr(config, name)) and is_url(value):
            check_url(value, name)
    if config.cache_dir and is_url(config.cache_dir):
        raise ValueError(f"--cache_dir {redact(config.cache_dir)} is a URL; name a folder on a local disk")
    if config.task == "mae":
        _check_mae(config)
    parse_interval(config.save_interval)
    parse_parts(config.allow_change)


def _check_mae(config: Config) -> None:
    """Raises ValueError for settings that masked autoencoders have no use for."""
    unwanted = [f"--{name} 0" for name in ("mixup", "cutmix", "reprob") if getattr(config, name) > 0]
    if config.magnitude != "none":
        unwanted.append("--magnitude none")
    if unwanted:
        raise ValueError(
            f"--task mae predicts what it hides of images that are only cropped and flipped: set {' '.join(unwanted)} "
            "(recipes in recipes/mae do)"
        )
    for name in ("finetune", "linear_probe", "eval"):
        if value := getattr(config, name):
            raise ValueError(
                f"--{name} {str(value).lower() if value is True else value} is for --task supervised: a masked "
                "autoencoder has no classes, and is fine-tuned or probed by a run of its own (recipes/mae)"
            )
