"""--suggest: rules that agree with what the papers and the demo found; folders of any layout; a recipe that runs."""

import random
from dataclasses import replace

import pytest
import yaml
from conftest import Run, flags, write_images
from PIL import Image

from commands.suggest import HELD_OUT, Seen, base_size, batch, length, look, model, of_the_model, suggest
from commands.suggest import learning_rate as rate
from config import Config
from datasets import build_source


def seen(images, side=300, classes=10):
    return Seen([images // classes] * classes, [side])


def value(rule, config, what, key=None):
    rows = {row[0]: row[1] for row in rule(config, what)}
    return rows[key] if key else next(iter(rows.values()))


@pytest.mark.parametrize("side, size", [(500, 224), (224, 224), (223, 192), (88, 64), (32, 64)])
def test_base_size(side, size):
    assert value(base_size, Config(), seen(100, side)) == size


@pytest.mark.parametrize(
    "images, network, size, lr, epochs",
    [
        (1_281_160, "convnext_tiny", 4096, 4e-3, 200),  # the papers' ImageNet-1K
        (13_153_500, "convnext_tiny", 4096, 4e-3, 80),  # the papers' ImageNet-22K
        (50_000, "resnet50", 1024, 3.2e-3, 200),
        (2_200, "resnet18", 64, 2e-3, 200),  # the demo's best of those tried
        (300, "resnet18", 32, 1.8e-3, 667),
        (40, "resnet18", 16, 1.6e-3, 1000),
    ],
)
def test_rules(images, network, size, lr, epochs):
    what = seen(images)
    assert value(model, Config(), what) == network
    assert value(batch, Config(), what) == size
    assert value(rate, Config(model=network, batch_size=size), what) == pytest.approx(lr)
    assert value(length, Config(batch_size=size), what) == epochs


def test_settings_of_the_papers_recipes():
    assert value(of_the_model, Config(model="deit_small"), seen(100), "curriculum") == "efficienttrain++-deit"
    assert value(of_the_model, Config(model="deit_small"), seen(100), "drop_path") == 0.1
    assert value(of_the_model, Config(model="resnet18"), seen(100)) == "efficienttrain++"
    assert value(rate, Config(model="deit_tiny", batch_size=64), seen(100)) == pytest.approx(5e-4)  # no BatchNorm


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders without splits, of unequal sizes and images of unequal size."""
    root = tmp_path_factory.mktemp("photos")
    rng = random.Random(0)
    for name, count in (("cat", 30), ("dog", 22), ("newt", 12)):
        (root / name).mkdir()
        for k in range(count):
            size = rng.randint(100, 120), rng.randint(100, 160)
            Image.effect_noise(size, 60).convert("RGB").save(root / name / f"{k}.jpg")
    return root


def settings_of(text):
    return yaml.safe_load(text)


def test_one_folder_without_validation(photos):
    settings = settings_of(suggest(Config(data_path=str(photos)), {"data_path"}))
    assert (settings["train_split"], settings["val_per_class"]) == (".", HELD_OUT)
    assert settings["input_size"] == 96 and settings["batch_size"] == 16  # two steps a pass at least
    assert set(settings) <= set(Config.__dataclass_fields__)


@pytest.mark.parametrize(
    "names, expected",
    [
        (("train", "val"), {"train_split": "train", "val_split": "val"}),
        (("training", "test"), {"train_split": "training", "val_split": "test"}),
        (("train",), {"train_split": "train", "val_per_class": HELD_OUT}),
    ],
)
def test_layouts(names, expected, tmp_path):
    for seed, name in enumerate(names):
        write_images(tmp_path / name, [20, 20], seed, size=(80, 90))
    settings = settings_of(suggest(Config(data_path=str(tmp_path)), {"data_path"}))
    assert {key: settings.get(key) for key in expected} == expected


def test_what_is_said_is_kept(folder):
    config = Config(data_path=str(folder), model="tests.tiny_models:plain", input_size=224, lr=0.5, epochs=300)
    text = suggest(config, {"data_path", "model", "input_size", "lr", "epochs", "suggest"})
    settings = settings_of(text)
    assert (settings["model"], settings["input_size"], settings["lr"]) == ("tests.tiny_models:plain", 224, 0.5)
    assert settings["baseline_epochs"] is None and "suggest" not in settings
    assert text.count("as you said") == 1  # one reason for all of them


def test_a_setting_that_cannot_work_is_refused_at_once(folder):
    with pytest.raises(ValueError, match="input size 48"):
        suggest(Config(data_path=str(folder), model="tests.sized_models:picky"), {"model"})


def test_what_was_seen_is_said(tmp_path):
    write_images(tmp_path / "train", [120, 11], size=(72, 80))
    write_images(tmp_path / "val", [2, 2], seed=1)
    for name in ("zz.jpg", "zzz.jpg"):
        (tmp_path / "train" / "class_0" / name).write_bytes(b"no image")
    text = suggest(Config(data_path=str(tmp_path), max_bad=0.5), {"max_bad"})
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert "133 images to train on, 2 classes of 11 to 122 images; short sides of 72 pixels" in head
    assert "unbalanced (11 to 1)" in head
    assert "2 of 133 files" in head  # every file is looked at


def test_balanced_classes_are_not_called_unbalanced(folder):
    assert "unbalanced" not in suggest(Config(data_path=str(folder)), ())


def test_headers_only(monkeypatch, folder):
    from inputs.folder import FolderIndex

    monkeypatch.setattr(Image.Image, "load", lambda self: 1 / 0)  # pixels are not decoded
    what = look(FolderIndex(folder / "train"))
    assert what.counts == [16, 16, 16] and set(what.short_sides) == {40} and not what.unreadable


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda root: None, "no class folders"),
        (lambda root: write_images(root / "train", [3]), "holds out none of 3 images"),
        (lambda root: [write_images(root / name, [3], size=(64, 64)) for name in ("train", "val")], "at least four"),
        (lambda root: [broken(root / name) for name in ("train", "val")], "none of 3 images can be opened"),
    ],
)
def test_data_that_are_too_few_or_none(make, words, tmp_path, main_program, capsys):
    make(tmp_path)
    assert main_program(["--suggest", "true", "--data_path", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def broken(root):
    write_images(root, [3])
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no image")


def test_no_data(main_program, capsys, tmp_path):
    assert main_program(["--suggest", "true"]) == 2 and "--data_path" in capsys.readouterr().err
    assert main_program(["--suggest", "true", "--data_path", str(tmp_path / "x")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_recipe_is_written_and_runs(photos, tmp_path, main_program, capsys):
    words = ["--suggest", "true", "--data_path", str(photos), "--output_dir", str(tmp_path)]
    assert main_program(words) == 0
    out, err = capsys.readouterr()
    recipe = tmp_path / "recipe.yaml"
    assert recipe.read_text() == out and f"--recipe {recipe}" in err
    assert main_program(["--recipe", str(recipe), "--plan", "table"]) == 0
    assert "curriculum efficienttrain++" in capsys.readouterr().out
    reduced = flags(input_size=None, batch_size=None, lr=None, micro_batch=None)
    assert main_program(["--recipe", str(recipe), *reduced, "--output_dir", str(tmp_path / "run")]) == 0
    run = Run(tmp_path / "run")
    held = len(build_source(Config(data_path=str(photos), train_split=".", val_per_class=HELD_OUT), train=False))
    assert 1 <= held <= 15 and run.state()["classes"] == ["cat", "dog", "newt"] and run.log()[-1]["eval_images"] == held


def test_tables_and_several_labels(tmp_path):
    """What --suggest proposes for a table is what builds: its split, its task."""
    rng = random.Random(0)
    rows = []
    (tmp_path / "images").mkdir()
    for k in range(60):
        Image.effect_noise((70, 80), 60).save(tmp_path / "images" / f"{k}.png")
        rows.append((f"{k}.png", rng.choice(["a", "b"]), "a|b" if k % 3 else "b"))
    (tmp_path / "one.csv").write_text("path,label\n" + "".join(f"{a},{b}\n" for a, b, _ in rows))
    (tmp_path / "many.csv").write_text("path,label\n" + "".join(f"{a},{c}\n" for a, _, c in rows))
    for table, extra, task in (("one.csv", {}, None), ("many.csv", {"label_separator": "|"}, "multilabel")):
        given = {"data_path": str(tmp_path / "images"), "labels": str(tmp_path / table), **extra}
        text = suggest(Config(**given), set(given))
        settings = settings_of(text)
        assert (settings.get("task"), settings["val_share"]) == (task, "10%")
        assert settings["labels"] == given["labels"]
        built = Config(**{key: value for key, value in settings.items() if key in Config.__dataclass_fields__})
        assert len(build_source(built, train=True)) + len(build_source(built, train=False)) == 60
        words = text.replace("\n# ", " ")
        assert "2 classes" in words and "minutes" in words


def test_the_time_of_a_run_follows_its_length(folder):
    from commands.estimate import run_minutes
    from training.build import make_plan

    config = Config(
        data_path=str(folder), model="tests.tiny_models:convnet", input_size=64, batch_size=8, num_workers=0
    )
    source = build_source(config, train=True)
    config.device, config.micro_batch = "cpu", 4
    plans = [make_plan(replace(config, epochs=epochs), len(source), 3) for epochs in (2, 2000)]
    short, long = (run_minutes(config, plan, source) for plan in plans)
    assert 0 < short < long / 100
    speed = long * 60 / (2000 * 48)  # seconds per full-size image
    assert 1e-5 < speed < 1
