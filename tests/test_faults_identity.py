"""A checkpoint of another run is refused with the list of differences, unless they are allowed by name."""

import shutil

import numpy as np
import pytest
from conftest import Run, checkpoint_fields, flags, write_images

from config import Config, UsageError, plain
from config.checks import parse_parts
from curriculum import build_plan
from inputs.folder import FolderIndex
from inputs.views import View, fingerprint
from models import checkpoints
from training.identity import check_same_run, identify

SETTINGS = {"save_interval": "1 steps", "model": "tests.tiny_models:convnet"}


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory, main_program):
    """A run's folder as it was after 8 steps, with its own copy of the data."""
    root = tmp_path_factory.mktemp("begun")
    shutil.copytree(folder, root / "data")
    argv = flags(output_dir=root / "run", data_path=root / "data", **SETTINGS, keep_checkpoints=100)
    assert main_program(argv) == 0
    for path in (root / "run").glob("checkpoint-*.pth"):
        if path.name != "checkpoint-8.pth":
            path.unlink()
    return root


@pytest.fixture
def copied(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "copy")


DIFFERENCES = {
    "model": ({"model": "tests.tiny_models:plain"}, "model name was tests.tiny_models:convnet and is tests.tiny_mod"),
    "model arguments": ({"model_args": "{width: 16}"}, "model arguments width was None and is 16"),
    "model classes": ({"num_classes": 5}, "model classes was 3 and is 5"),
    "curriculum": ({"curriculum": "none"}, "curriculum name was efficienttrain++ and is none"),
    "epochs": ({"epochs": 3}, "curriculum epochs was 2.0 and is 3.0"),
    "operator": ({"operator": "bicubic"}, "curriculum operator was lanczos and is bicubic"),
    "magnitude": ({"max_magnitude": 5}, "curriculum max_magnitude was 9.0 and is 5.0"),
    "input size": ({"input_size": 96}, "curriculum base_size was 64 and is 96"),
    "batch size": ({"batch_size": 16}, "batch_size was 8 and is 16"),
    "seed": ({"seed": 4}, "seed was 0 and is 4"),
    "optimizer": ({"opt": "lamb"}, "optimizer opt was adamw and is lamb"),
    "layer decay": ({"layer_decay": 0.9}, "optimizer layer_decay was 1.0 and is 0.9"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_another_run_is_refused_with_the_difference(main_program, copied, capsys, what):
    change, difference = DIFFERENCES[what]
    before = (copied / "run" / "checkpoint-8.pth").read_bytes()
    argv = flags(**{"output_dir": copied / "run", "data_path": copied / "data", **SETTINGS, **change})
    assert main_program(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {copied / 'run' / 'checkpoint-8.pth'} is of another run: ") and difference in line
    part = difference.split()[0]
    assert ("with --finetune" if part == "model" else "--allow_change " + part) in line
    assert (copied / "run" / "checkpoint-8.pth").read_bytes() == before
    assert not (copied / "run" / "checkpoint-last.pth").exists()


@pytest.mark.parametrize("change", ["added", "removed", "moved", "renamed", "class"])
def test_other_data_is_refused(main_program, copied, capsys, change):
    train = copied / "data" / "train"
    image = train / "class_0" / "03.jpg"
    if change == "added":
        shutil.copy(image, train / "class_0" / "99.jpg")
    elif change == "removed":
        image.unlink()
    elif change == "moved":
        image.rename(train / "class_1" / "03b.jpg")
    elif change == "renamed":
        image.rename(train / "class_0" / "3.jpg")
    else:
        (train / "class_2").rename(train / "class_x")
        (copied / "data" / "val" / "class_2").rename(copied / "data" / "val" / "class_x")
    assert main_program(flags(output_dir=copied / "run", data_path=copied / "data", **SETTINGS)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of another run: " in line and "data digest was " in line and "--allow_change data" in line


def test_another_copy_of_the_data_is_the_same_data(main_program, copied):
    """Elsewhere, with other time stamps, and with files of other modification: not a difference."""
    shutil.move(copied / "data", copied / "elsewhere")
    for path in (copied / "elsewhere").rglob("*.jpg"):
        path.touch()
    assert main_program(flags(output_dir=copied / "run", data_path=copied / "elsewhere", **SETTINGS)) == 0
    assert Run(copied / "run").state()["step"] == 22


ALLOWED = {
    "seed": {"seed": 4},
    "curriculum": {"epochs": 3},
    "batch_size": {"batch_size": 16},
    "optimizer": {"opt": "lamb"},
    "curriculum,seed": {"curriculum": "none", "seed": 4},
}


@pytest.mark.parametrize("names", ALLOWED)
def test_allowed_by_name_it_goes_on(main_program, copied, names):
    settings = {"output_dir": copied / "run", "data_path": copied / "data", **SETTINGS, **ALLOWED[names]}
    assert main_program(flags(**settings, allow_change=names)) == 0
    run = Run(copied / "run")
    assert run.log()[-1]["progress"] == 1.0 and run.state()["step"] > 8
    # What was allowed once is the run's from then on.
    assert main_program(flags(**settings)) == 0


def test_circumstances_may_change(main_program, copied):
    """Loader processes, intervals and the like are no other run."""
    settings = {"num_workers": 1, "channels_last": True, "keep_checkpoints": 1, "on_nonfinite": "skip"}
    argv = flags(**{"output_dir": copied / "run", "data_path": copied / "data", **SETTINGS, **settings})
    assert main_program([*argv, "--eval_interval", "1 steps", "--timeout", "5"]) == 0


def test_allowing_one_does_not_allow_another(main_program, copied, capsys):
    settings = {"output_dir": copied / "run", "data_path": copied / "data", **SETTINGS, "seed": 4, "batch_size": 16}
    assert main_program(flags(**settings, allow_change="seed")) == 2
    line = capsys.readouterr().err
    assert "batch_size was 8" in line and "seed was" not in line and "--allow_change batch_size" in line


def test_weights_of_another_shape_do_not_fit_even_if_allowed(main_program, copied, capsys):
    settings = {"output_dir": copied / "run", "data_path": copied / "data", **SETTINGS, "model_args": "{width: 16}"}
    assert main_program(flags(**settings, allow_change="model")) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint of step 8 does not fit these settings" in line and "stem.weight" in line
    assert "Traceback" not in line


def test_identity_is_plain_and_survives_a_checkpoint(folder, tmp_path):
    source = FolderIndex(folder / "train")
    config = Config(opt_betas=(0.9, 0.95))
    plan = build_plan("efficienttrain", epochs=5, num_images=48, batch_size=8)
    identity = identify(config, plan, (source, source), 3)
    assert identity["data"] == identity["validation"]
    checkpoints.save(tmp_path / "checkpoint-last.pth", checkpoint_fields(identity=identity))
    assert checkpoints.load(tmp_path / "checkpoint-last.pth")["identity"] == identity


def test_fingerprints(tmp_path):
    write_images(tmp_path / "a", [3, 3])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same = [fingerprint(FolderIndex(tmp_path / name, cache_dir=tmp_path / "cache")) for name in "ab"]
    assert same[0] == same[1] and len(same[0]["digest"]) == len(same[0]["order"]) == 16
    (tmp_path / "b" / "class_1" / "02.jpg").rename(tmp_path / "b" / "class_1" / "04.jpg")
    assert fingerprint(FolderIndex(tmp_path / "b", cache_dir=tmp_path / "cache"))["digest"] != same[0]["digest"]


class Turned(View):
    """The images of a source from the last to the first."""

    def __init__(self, source):
        super().__init__(source, np.ones(len(source), dtype=bool))

    def places(self):
        return super().places()[::-1]


def test_the_same_images_in_another_order_are_other_data(folder):
    """As in shards that were packed anew: step 8 would train on other images."""
    source = FolderIndex(folder / "train")
    config, plan = Config(), build_plan("efficienttrain", epochs=5, num_images=48, batch_size=8)
    saved = {"config": plain(config), "identity": identify(config, plan, (source, source), 3)}
    with pytest.raises(UsageError, match=r"of another run: data order was [0-9a-f]{16} and is [0-9a-f]{16}\. Go back"):
        check_same_run(saved, config, identify(config, plan, (Turned(source), source), 3), "x.pth")
    assert check_same_run(saved, config, saved["identity"], "x.pth") == []


def as_before(state, source):
    """A checkpoint's images as an earlier version noted them."""
    now = fingerprint(source)
    state["identity"]["data"] = {"images": now["images"], "classes": 3, "fingerprint": "24e1535febe8a928"}
    state["identity"]["validation"] = dict(state["identity"]["data"])
    state["images"] = {part: {"images": now["images"], "digest": now["digest"]} for part in ("train", "val")}
    return state


@pytest.mark.parametrize("known", ["images", "how many"])
def test_images_of_an_earlier_version_are_compared_in_what_it_says(folder, tmp_path, capsys, known):
    source = FolderIndex(folder / "train")
    fewer = View(source, np.arange(48) > 0)
    config, plan = Config(), build_plan("efficienttrain", epochs=5, num_images=48, batch_size=8)
    now, changed = (identify(config, plan, (images, images), 3) for images in (source, fewer))
    state = as_before(checkpoint_fields(identity=dict(now)), source)
    if known != "images":
        del state["images"]
    checkpoints.save(tmp_path / "checkpoint-last.pth", state)
    saved = {**checkpoints.load(tmp_path / "checkpoint-last.pth"), "config": plain(config)}
    assert check_same_run(saved, config, now, "x.pth") == []
    assert ("whether its images were others" in capsys.readouterr().out) == (known != "images")
    with pytest.raises(UsageError, match="data images was 48 and is 47"):
        check_same_run(saved, config, changed, "x.pth")
    renamed = {**now, "data": {**now["data"], "digest": "0" * 16}}
    if known == "images":
        with pytest.raises(UsageError, match=r"of another run: data digest was .* and is 0{16}\. Go back"):
            check_same_run(saved, config, renamed, "x.pth")


def test_names_of_parts():
    assert parse_parts(None) == parse_parts("") == []
    assert parse_parts("data, seed") == ["data", "seed"]
    with pytest.raises(ValueError, match="it may name model, data"):
        parse_parts("zzz")
