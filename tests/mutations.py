"""Disconnects one setting at a time in a copy of the source and runs that setting's case of tests/test_settings.py.

A mutation is (setting, file): in this file every `config.SETTING` becomes the default, so that the setting reaches
nothing. All are run by one process that has the libraries loaded and forks for each:

  python tests/mutations.py COPY SETTING:FILE ...       prints a line of JSON, the exit code of pytest for each
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "cv2",
    "yaml",
    "jsonargparse",
    "docstring_parser",
    "pytest",
    "tensorboardX",
)
BUILD = """
curriculum epochs warmup_epochs magnitude max_magnitude operator early_large_batch lr_rule batch_size lr min_lr
weight_decay weight_decay_end replay input_size seed micro_batch forward_batch model model_args num_classes drop_path
task mae_target mask_ratio decoder model_ema model_ema_decay channels_last opt opt_eps opt_betas momentum layer_decay
fallback_lr_scale clip_grad amp on_nonfinite crop_scale crop_ratio train_interpolation hflip color_jitter pipeline
max_bad smoothing
reprob mixup cutmix mixup_prob mixup_switch_prob augment_on num_workers replay_memory mean std
crop_pct schedule lr_steps head_args
"""
ELSEWHERE = {
    "main.py": "channels_last finetune linear_probe head_init_scale mean std compile seed device "
    "deterministic tf32 eval predict suggest doctor plan output_dir wandb",
    "datasets.py": "data_set data_path train_split val_split val_per_class val_share class_map labels label_columns "
    "label_separator label_key cache_dir cache_size",
    "training/identity.py": "allow_change",
    "training/scenes.py": "head train_sides max_side test_side crop crop_prob",
    "training/session.py": "output_dir save_interval keep_checkpoints timeout stop_after eval_interval log_interval "
    "wandb",
    "training/early_stop.py": "patience stop_if",
    "training/resume.py": "resume auto_resume output_dir",
    "training/validation.py": "eval_size",
    "commands/evaluate.py": "mean std crop_pct eval_data real_labels",
    "commands/dense.py": "pictures scales_test flip_test",
    "commands/predict.py": "crop_pct predict predict_to top_k threshold",
    "commands/plan.py": "num_images devices speeds baseline_epochs",
}
MUTATIONS = [(setting, "training/build.py") for setting in BUILD.split()]
MUTATIONS += [(setting, file) for file, settings in ELSEWHERE.items() for setting in settings.split()]
# What is read in another way: (setting, file, text, what it becomes).
BY_HAND = [("rows", "scripts/results.py", 'first.settings["rows"] or', "None or")]
ALL = [*((setting, file, rf"\bconfig\.{setting}\b", None) for setting, file in MUTATIONS), *BY_HAND]


def disconnect(text: str, setting: str, pattern: str, becomes: str | None) -> str:
    """The source without the setting. Raises ValueError if it does not read it."""
    if becomes is not None:
        changed = text.replace(pattern, becomes)
    else:
        changed = re.sub(pattern, f"type(config)().{setting}", text)
    if changed == text:
        raise ValueError(f"nothing here reads {setting}")
    return changed


def copy_source(target: Path) -> None:
    """Every file that git knows, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("docs/", "recipes/in")):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((ROOT / name).read_bytes())


def run_case(copy: Path, setting: str | None) -> int:
    """The exit code of pytest for a setting's case (None: all), in a fork of this process."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        import pytest

        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.chdir(copy)
        test = "tests/test_settings.py" + (f"::test_setting[{setting}]" if setting else "")
        code = pytest.main([test, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"])
    finally:
        os._exit(int(code))


def main(copy: Path, names: list[str]) -> None:
    sys.dont_write_bytecode = True  # a mutation changes a file within the second
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests"))]
    for library in LIBRARIES:
        __import__(library)
    codes = {"": run_case(copy, None)}
    for setting, file, pattern, becomes in ALL:
        if f"{setting}:{file}" in names:
            path = copy / file
            text = path.read_text()
            path.write_text(disconnect(text, setting, pattern, becomes))
            try:
                codes[f"{setting}:{file}"] = run_case(copy, setting)
                print(setting, file, codes[f"{setting}:{file}"], file=sys.stderr, flush=True)
            finally:
                path.write_text(text)
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
