"""What cannot work is refused with one line that names the setting and the mend, and nothing is overwritten."""

import itertools
import os
import shutil

import pytest
import torch
from conftest import flags, write_images

from config import Config, UsageError
from config.checks import COMMANDS, check_settings
from models import checkpoints
from training.one_writer import LOCK


def content(folder):
    """Every file below a folder with its bytes, but for the lock of a run."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def refused(main_program, capsys, tmp_path):
    """``refused(code, *words, **settings)``: main.py ends with that code and one line that holds the words."""

    def call(code, *words, argv=None, **settings):
        before = content(tmp_path)
        capsys.readouterr()
        try:
            found = main_program(argv if argv is not None else flags(**settings))
        except SystemExit as stop:
            found = stop.code
        out, err = capsys.readouterr()
        assert found == code, err + out
        line = err.strip().splitlines()[-1]
        assert line.startswith("error: ") and "Traceback" not in err + out
        assert len([text for text in err.splitlines() if text.startswith("error: ")]) == 1
        for word in words:
            assert word in line, line
        assert content(tmp_path) == before
        return line

    return call


@pytest.fixture
def usual(folder, tmp_path):
    return {"data_path": folder, "output_dir": tmp_path / "run"}


# -- settings ----------------------------------------------------------------------------------------------------------


def test_unknown_flag_and_recipe_key(refused, tmp_path, usual):
    refused(2, "'lerning_rate'", "did you mean lr", argv=[*flags(**usual), "--lerning_rate", "3"])
    refused(2, "'btach_size'", "batch_size", argv=[*flags(**usual), "--btach_size", "3"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modle: resnet50\n")
    refused(2, "recipe.yaml", "'modle'", "model", argv=[*flags(**usual), "--recipe", str(recipe)])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "convnext_tinny"}, ["--model convnext_tinny", "convnext_tiny"]),
        ({"model": "no_such_package:net"}, ["--model no_such_package:net", "no_such_package"]),
        ({"model": "tests.tiny_models:nothing"}, ["tests.tiny_models:nothing", "nothing"]),
        ({"model": "test_convnext", "model_args": "{colour: red}"}, ["colour"]),
        ({"model": "test_vit", "input_size": 60}, ["60"]),
        ({"model": "test_vit", "eval_size": 50}, ["50"]),
        ({"model": "swin_tiny", "input_size": 100}, ["100", "32"]),
        ({"epochs": 0.1}, ["--epochs 0.1", "too short"]),
        ({"epochs": -1}, ["--epochs is -1"]),
        ({"epochs": "nan"}, ["epochs", "nan"]),
        ({"batch_size": 49, "micro_batch": 7}, ["48 images", "--batch_size is 49"]),
        ({"batch_size": 8, "micro_batch": 3}, ["--micro_batch 3", "2 and 4"]),
        ({"curriculum": "efficienttrian"}, ["'efficienttrian'", "efficienttrain++"]),
        ({"curriculum": "missing.yaml"}, ["missing.yaml", "No such file"]),
        ({"warmup_epochs": "3 parsecs"}, ["3 parsecs", "500 steps"]),
        ({"warmup_epochs": "200%"}, ["--warmup_epochs 200%"]),
        ({"log_interval": "often"}, ["'often'", "500 steps"]),
        ({"save_interval": "-3"}, ["--save_interval", "-3", "500 steps"]),
        ({"device": "tpu"}, ["--device", "'tpu'", "cpu"]),
        ({"num_classes": 2}, ["--num_classes is 2", "3 classes"]),
        ({"data_path": None}, ["--data_path is not set"]),
        ({"output_dir": None}, ["--output_dir is not set"]),
        ({"mixup": -1}, ["--mixup is -1"]),
        ({"reprob": 3}, ["--reprob is 3"]),
        ({"smoothing": 2}, ["--smoothing is 2"]),
        ({"hflip": 2}, ["--hflip is 2"]),
        ({"crop_scale": "[0.5,0.1]"}, ["--crop_scale"]),
        ({"crop_pct": 0}, ["--crop_pct is 0"]),
        ({"crop_pct": 2}, ["--crop_pct is 2"]),
        ({"drop_path": 1.5}, ["--drop_path is 1.5"]),
        ({"timeout": 0}, ["--timeout is 0"]),
        ({"opt_betas": "[0.9,1.5]"}, ["--opt_betas", "1.5"]),
        ({"allow_change": "data,sead"}, ["--allow_change sead", "seed"]),
        ({"on_nonfinite": "panic"}, ["on_nonfinite", "panic", "skip"]),
        ({"opt": "adamm"}, ["--opt adamm"]),
        ({"num_workers": -1}, ["--num_workers is -1"]),
        ({"keep_checkpoints": -1}, ["--keep_checkpoints is -1"]),
        ({"model_ema_decay": 1.5}, ["--model_ema_decay is 1.5"]),
        ({"clip_grad": 0}, ["--clip_grad is 0"]),
        ({"layer_decay": 0}, ["--layer_decay is 0"]),
        ({"weight_decay": -1}, ["--weight_decay is -1"]),
        ({"eval_size": 0}, ["--eval_size is 0"]),
        ({"input_size": 0}, ["--input_size is 0"]),
        ({"max_magnitude": 11}, ["--max_magnitude is 11"]),
        ({"eval": True}, ["--eval", "--resume"]),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work(refused, usual, settings, words):
    refused(2, *words, **{**usual, **settings})


def test_the_same_for_a_plan_alone(refused):
    common = {"plan": "json", "num_images": 1000, "num_classes": 3}
    refused(2, "1000 images", "--batch_size is 4096", **{**common, "batch_size": 4096, "micro_batch": None})
    refused(2, "--epochs 0.001", **common, epochs=0.001)
    refused(2, "--data_path is not set", plan="json")


# -- data --------------------------------------------------------------------------------------------------------------


def test_missing_and_empty_folders(refused, tmp_path, usual):
    nothing = tmp_path / "data"
    refused(2, "--data_path", str(nothing), **{**usual, "data_path": nothing})
    nothing.mkdir()
    refused(2, "--data_path", "train", **{**usual, "data_path": nothing})
    (nothing / "train").mkdir()
    refused(2, "--data_path", "train", "no class folders", **{**usual, "data_path": nothing})
    (nothing / "train" / "cat").mkdir()
    refused(2, "no images", **{**usual, "data_path": nothing})
    write_images(nothing / "train", [10, 10])
    refused(2, "without images", "cat", **{**usual, "data_path": nothing})
    (nothing / "train" / "cat").rmdir()
    refused(2, "--data_path", "val", **{**usual, "data_path": nothing})


def test_class_in_val_that_is_not_in_train(refused, tmp_path, usual):
    write_images(tmp_path / "data" / "train", [10, 10])
    write_images(tmp_path / "data" / "val", [3, 3, 3])
    refused(2, "class_2", "training set lacks", **{**usual, "data_path": tmp_path / "data"})


def test_fewer_images_than_a_batch(refused, tmp_path, usual):
    write_images(tmp_path / "data" / "train", [3, 3])
    write_images(tmp_path / "data" / "val", [1, 1])
    refused(2, "6 images", "--batch_size is 8", "at most 6", **{**usual, "data_path": tmp_path / "data"})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_image(main_program, tmp_path, capsys, split, workers):
    """Where none may be bad, one line names the file; of a validation image before anything was written."""
    data = tmp_path / "data"
    write_images(data / "train", [10, 10])
    write_images(data / "val", [3, 3])
    broken = data / split / "class_1" / "05.jpg"
    broken.write_bytes((data / "train" / "class_1" / "04.jpg").read_bytes()[:100])
    run = flags(data_path=data, output_dir=tmp_path / "run", num_workers=workers, max_bad=0)
    assert main_program(run) == (1 if split == "train" else 2)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(broken) in errors[0] and "Traceback" not in err
    assert (tmp_path / "run").exists() == (split == "train")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory, main_program):
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main_program(flags(data_path=folder, output_dir=output, model_ema=True)) == 0
    return output


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("flag", ["resume", "finetune"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "text", "folder", "hostile"])
def test_damaged_and_hostile_files(refused, tmp_path, folder, copied, flag, damage):
    path = tmp_path / "weights.pth"
    whole = (copied / "checkpoint-last.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    contents = {"empty": b"", "truncated": whole[: len(whole) // 2], "flipped": bytes(flipped), "text": b"hello"}
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    elif damage == "hostile":
        torch.save({"model": Touch(tmp_path / "pwned")}, path)
    settings = {"data_path": folder, "output_dir": tmp_path / "new", flag: path}
    refused(1, str(path), **settings)
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "new").exists()


class Touch:
    """Unpickling this runs a command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def test_checkpoint_of_another_model(refused, tmp_path, folder, copied):
    last = copied / "checkpoint-last.pth"
    other = {"data_path": folder, "model": "tests.tiny_models:plain"}
    refused(2, "model", "tests.tiny_models:plain", **other, output_dir=tmp_path / "new", resume=last)
    refused(2, "model", "tests.tiny_models:plain", **other, output_dir=copied)
    assert not (tmp_path / "new").exists()
    refused(1, "checkpoint-last.pth", **other, eval=True, resume=last)


def test_all_checkpoints_damaged(refused, tmp_path, folder, copied):
    """Starting again would overwrite what a person may still want to look at."""
    for path in copied.glob("checkpoint-*.pth"):
        damaged = path.read_bytes()[:-1000]
        path.unlink()
        path.write_bytes(damaged)
    refused(1, "--output_dir", str(copied), "checkpoint-last.pth", data_path=folder, output_dir=copied, model_ema=True)


def test_fresh_start_over_another_run(refused, folder, copied):
    refused(2, "--auto_resume false", str(copied), data_path=folder, output_dir=copied, auto_resume=False)


def test_output_dir_that_cannot_be_written(refused, tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    refused(1, "--output_dir", "file", data_path=folder, output_dir=tmp_path / "file" / "run")
    refused(1, "--output_dir", "file", data_path=folder, output_dir=tmp_path / "file")


def test_a_good_checkpoint_is_not_refused(main_program, folder, copied):
    """Negative control for all of the above."""
    assert main_program(flags(data_path=folder, output_dir=copied, model_ema=True)) == 0
    assert checkpoints.load(copied / "checkpoint-last.pth")["step"] == 22


INSTEAD = {"plan": "table", "suggest": True, "doctor": True, "predict": "x", "eval": True}


@pytest.mark.parametrize("names", itertools.combinations(INSTEAD, 2), ids="-".join)
def test_one_thing_at_a_time(names):
    settings = {name: INSTEAD[name] for name in names}
    with pytest.raises(UsageError, match=f"^--{names[0]} and --{names[1]} each do something else instead of training"):
        check_settings(Config(resume="y", **settings))
    assert tuple(INSTEAD) == COMMANDS
