"""docs/tutorial.md and CONTRIBUTING.md from start to end: their files are written, their commands run in order."""

import csv
import importlib
import json
import random
import re
import shlex

import pytest
from conftest import ROOT, flags, script, write_images
from PIL import Image

from tests.buckets import pack, s3_server

# The network, the sizes, the batch and the rest stay the recipe's.
REDUCED = ["--epochs", "2", "--device", "cpu", "--num_workers", "0"]
NOT_TRAINING = {"--suggest", "--plan", "--eval", "--predict"}


@pytest.fixture
def follow(main_program, monkeypatch, tmp_path, capsys):
    """``follow(page)`` does what the page says in a folder of its own; yields (command, standard output) pairs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")

    def run(page):
        for kind, block in re.findall(r"```(\w+)\n(.*?)```", (ROOT / page).read_text(), re.S):
            if name := re.match(r"# (\w+\.(?:py|yaml))\n", block):
                (tmp_path / name[1]).write_text(block)
            for line in block.replace("\\\n", " ").splitlines() if kind == "bash" else ():
                words = shlex.split(line, comments=True)
                assert execute(words) == 0, (line, capsys.readouterr().err)
                yield line, capsys.readouterr().out

    def execute(words):
        if words[:2] == ["python", "main.py"]:
            reduced = [] if NOT_TRAINING & set(words) else REDUCED
            return main_program([*words[2:], *reduced])
        if words[:2] == ["python", "scripts/report.py"]:
            return script("report").main(words[2:])
        if words[:2] == ["python", "-m"]:
            return importlib.import_module(words[2]).main(words[3:])
        return int(words[0] != "bash" or not (ROOT / words[1]).is_file())

    return run


def test_tutorial(follow, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    rng = random.Random(0)
    for label, (name, count) in enumerate((("cat", 30), ("dog", 22), ("newt", 12))):
        for k in range(count):
            size = rng.randint(66, 90), rng.randint(70, 120)
            image = Image.effect_noise(size, 60).convert("RGB")
            tint = tuple(160 if channel == label else 40 for channel in range(3))
            folder = tmp_path / ("photos" if k else "new_photos") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.blend(image, Image.new("RGB", size, tint), 0.6).save(
                folder / f"photo {k}.{'jpg' if k % 4 else 'png'}"
            )
    photos = sorted((tmp_path / "photos").rglob("photo *"))
    (tmp_path / "herbarium").mkdir()
    rows = ["file,label"]
    for k, path in enumerate(photos):
        rows.append(f"IMG_{k:04d}{path.suffix},{path.parent.name}")
        (tmp_path / f"herbarium/IMG_{k:04d}{path.suffix}").write_bytes(path.read_bytes())
    (tmp_path / "herbarium/labels.csv").write_text("\n".join(rows))
    shard = pack([(f"{path.parent.name}/{path.name}", path.read_bytes()) for path in photos])
    write_shots(tmp_path, rng)
    with s3_server(monkeypatch.setenv) as client:
        client.create_bucket(Bucket="my-bucket")
        client.put_object(Bucket="my-bucket", Key="photos/photos-000.tar", Body=shard)
        said = dict(follow("docs/tutorial.md"))
    for name, there in (("table", "herbarium"), ("bucket", "s3://my-bucket/photos")):
        (trained,) = (text for line, text in said.items() if f"--recipe output/{name}" in line)
        first = next(line for line in trained.splitlines() if line.startswith("data: "))
        assert "held out by a hash of their paths, --val_share 20%" in first and "cat, dog, newt" in first
        assert f"{there}: " in first and "14 .png" in first
    page = (ROOT / "docs" / "tutorial.md").read_text()
    recipe = (tmp_path / "output/photos/recipe.yaml").read_text()
    for snippet in ("model: resnet18", "curriculum: efficienttrain++", "input_size: 64", "of timm's will do"):
        assert snippet in recipe and snippet in page
    log = [json.loads(line) for line in (tmp_path / "output/photos/log.txt").read_text().splitlines()]
    assert sorted({record["input_size"] for record in log}) == [32, 48, 64]
    assert (tmp_path / "output/photos/report.html").stat().st_size > 10_000
    evaluated = [json.loads(text) for line, text in said.items() if "--eval" in line and "photos" in line]
    assert [line["eval_size"] for line in evaluated] == [64, 96] and evaluated[0]["images"] == 2 + 2 + 1
    at_64 = [record["test_acc1"] for record in log if record.get("eval_size") == 64]
    assert evaluated[0]["acc1"] == pytest.approx(max(at_64))
    (labels,) = (text for line, text in said.items() if "--top_k 2" in line)
    labels = [json.loads(line) for line in labels.splitlines()]
    assert len(labels) == 3 and all({top["label"] for top in line["top"]} < {"cat", "dog", "newt"} for line in labels)
    with open(tmp_path / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label_1"] for row in rows] == [line["top"][0]["label"] for line in labels]
    assert (tmp_path / "photos.onnx").is_file() and (tmp_path / "photos.safetensors").is_file()

    import timm
    import torch

    timm.create_model("resnet18", num_classes=3, checkpoint_path=str(tmp_path / "photos.safetensors"))(
        torch.zeros(1, 3, 64, 64)
    )

    # Several labels
    assert "task: multilabel" in (tmp_path / "output/shots/recipe.yaml").read_text()
    (scored,) = (json.loads(text) for line, text in said.items() if "--eval" in line and "shots" in line)
    log = [json.loads(line) for line in (tmp_path / "output/shots/log.txt").read_text().splitlines()]
    at_base = [record["test_map"] for record in log if record.get("eval_size") == log[-1]["eval_size"]]
    assert scored["map"] == pytest.approx(max(at_base))
    assert set(scored["ap"]) == {"red", "green"}
    (labels,) = (text for line, text in said.items() if "--threshold 0.3" in line)
    for line in map(json.loads, labels.splitlines()):
        assert all(label["probability"] >= 0.3 for label in line["labels"])


def write_shots(root, rng):
    """Images with a red half, a green half, both or neither, and their table."""
    rows = ["path,labels"]
    for k in range(44):
        image = Image.effect_noise((70, 66), 60).convert("RGB")
        names = [name for name in ("red", "green") if rng.random() < 0.5]
        for name in names:
            image.paste(
                {"red": (200, 0, 0), "green": (0, 200, 0)}[name], (0, 0, 35, 66) if name == "red" else (35, 0, 70, 66)
            )
        folder = root / ("shots" if k < 40 else "new_shots")
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{k:04d}.jpg")
        rows += [f"{k:04d}.jpg,{'|'.join(names)}"] * (k < 40)
    (root / "shots.csv").write_text("\n".join(rows) + "\n")


def test_contributing(follow, tmp_path, main_program):
    said = dict(follow("CONTRIBUTING.md"))
    (checked,) = (text for line, text in said.items() if "models.check" in line)
    assert "resamples pos_embed" in checked and "MISSING" not in checked
    plans = [text for line, text in said.items() if "--plan" in line]
    assert len(plans) == 3 and "two-steps" in plans[1] and "100 epochs" in plans[2]
    # The three together train.
    for seed, name in enumerate(("train", "val")):
        write_images(tmp_path / "images" / name, [8, 8, 8], seed)
    settings = {"data_path": "images", "output_dir": "run", "model": "my_models:patchwork", "drop_path": 0}
    reduced = flags(**settings, curriculum="my_curriculum.yaml", amp="none", warmup_epochs="10%")
    assert main_program(["--recipe", "my_recipe.yaml", *reduced]) == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert log[0]["input_size"] == 40 and log[-1]["input_size"] == 64
