"""--task multilabel: the loss, mixing and mAP against their formulas and scikit-learn; training, resuming, using it."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Run, flags, same
from PIL import Image, ImageDraw
from processes import world
from sklearn.metrics import average_precision_score

from config import Config
from datasets import build_source, eval_loader
from inputs.finish import Finish
from inputs.tables import read_table
from inputs.transforms import EvalTransform
from inputs.views import targets
from models import create_model
from training.tasks import MultiLabel, average_precision

COLOURS = {"red": (255, 0, 0), "grün": (0, 255, 0), "blue": (0, 0, 255)}
OURS = ["--model", TINY["model"]]  # code from outside the project is named on the command line


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """90 images with squares of none to three colours, in one folder, and a table of the colours."""
    root, rng = tmp_path_factory.mktemp("shapes"), random.Random(0)
    (root / "images").mkdir()
    rows = []
    for k in range(90):
        image = Image.effect_noise((64, 72), 30).convert("RGB").point(lambda value: value // 2)
        names = [name for name in COLOURS if rng.random() < 0.5]
        for name in names:
            x, y = rng.randint(0, 32), rng.randint(0, 32)
            ImageDraw.Draw(image).rectangle((x, y, x + 28, y + 28), fill=COLOURS[name])
        image.save(root / "images" / f"{k:02d}.jpg")
        rows.append((f"{k:02d}.jpg", names))
    with open(root / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "labels"), *((path, "|".join(names)) for path, names in rows)])
    return root, dict(rows)


def settings(root, **more):
    data = {"data_path": root / "images", "labels": root / "labels.csv", "label_separator": "|", "val_share": "30%"}
    return {"task": "multilabel", **data, "magnitude": "none", "crop_scale": "[0.6, 1.0]", "reprob": 0, **more}


@pytest.fixture(scope="module")
def trained(shapes, main_program, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run") / "a")
    words = flags(output_dir=run.output, **settings(shapes[0], epochs=14, lr=6e-3, model_ema=True, mixup=0.1, cutmix=0))
    assert main_program(words) == 0
    return run


# ---- formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1_000_000, 5, 1])  # from no ties to nothing but ties
@pytest.mark.parametrize("positives", [0.02, 0.5, 1.0])
def test_average_precision_is_scikit_learns(levels, positives):
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=300).astype(np.float32)
    hits = rng.random(300) < positives
    hits[7] = True
    value = average_precision(torch.from_numpy(scores), torch.from_numpy(hits).double())
    assert value == pytest.approx(100 * average_precision_score(hits, scores), rel=1e-12)


def test_average_precision_without_a_positive_is_none():
    assert average_precision(torch.rand(5), torch.zeros(5)) is None
    task = MultiLabel(2)
    table = {"logit 0": torch.tensor([1.0, 2.0]), "target 0": torch.tensor([1.0, 0.0]), "loss": torch.zeros(2)}
    scores = task.scores({**table, "logit 1": torch.zeros(2), "target 1": torch.zeros(2)})
    assert scores["ap"] == [50.0, None] and scores["map"] == 50.0


def test_loss_is_binary_cross_entropy_by_hand():
    logits, hot = torch.randn(4, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.3, 1, 0], [1, 1, 1]])
    loss = MultiLabel(3).loss(lambda images: logits, torch.zeros(4), hot, [0])
    p = logits.sigmoid()
    assert loss.item() == pytest.approx(-(hot * p.log() + (1 - hot) * (1 - p).log()).mean().item(), rel=1e-5)
    more = MultiLabel(3).loss(lambda images: F.pad(logits, (0, 1), value=-80.0), torch.zeros(4), hot, [0])
    assert more.item() == pytest.approx(loss.item() * 3 / 4, rel=1e-5)  # an output more is a label that is absent


def test_targets():
    assert targets(3, 5) == 3
    assert targets((0, 2), 4).tolist() == [1, 0, 1, 0] and targets((), 2).tolist() == [0, 0]


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_of_several_labels(mixup, cutmix):
    """Against timm's mixing of single labels: linear in the targets, so a sum of one-hot ones mixes as their sum."""
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    first, second = torch.randint(0, 3, (2, 8))
    second = second + 3
    finish = Finish(6, base_size=16, erasing=0, mixup=mixup, cutmix=cutmix, smoothing=0)
    hot = F.one_hot(first, 6).float() + F.one_hot(second, 6)
    parts = [finish.train(images, labels, 16, [5, 6], 4) for labels in (first, second)]
    mixed, result = finish.train(images, hot.clone(), 16, [5, 6], 4)
    assert torch.equal(mixed, parts[0][0])
    torch.testing.assert_close(result, parts[0][1] + parts[1][1])
    assert not torch.equal(result, hot)


def test_without_mixing_targets_stay():
    finish, hot = Finish(3, base_size=8, erasing=0, mixup=0, cutmix=0), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(finish.train(images, hot, 8, [1], 2)[1], hot)


# ---- data --------------------------------------------------------------------------------------------------------


def test_one_column_per_class(tmp_path):
    (tmp_path / "hot.csv").write_text("image,split,cat,dog\na.jpg,train,1,0\nb.jpg,train,1,1.0\nc.jpg,val,0,\n")
    table = read_table(tmp_path / "hot.csv", several=True)
    assert table.classes == ["cat", "dog"] and table.numbers.tolist() == [0, 0, 1] and table.starts.tolist()[-1] == 3
    assert table.splits == ["train", "val"]
    with pytest.raises(ValueError, match="none of its columns"):
        read_table(tmp_path / "hot.csv")
    (tmp_path / "hot.csv").write_text("image,cat,age\na.jpg,1,7\n")
    with pytest.raises(ValueError, match=r"row 1 has age '7'.*marked 0 or 1"):
        read_table(tmp_path / "hot.csv", several=True)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"labels": None, "label_separator": None}, "needs several labels per image"),
        ({"data_set": "cifar10", "labels": None, "label_separator": None}, "needs several labels per image"),
        ({"eval_data": "x"}, "--eval_data is for --task supervised"),
        ({"task": "supervised"}, "--task multilabel"),
    ],
)
def test_what_cannot_be_learned(shapes, wrong, words, main_program, tmp_path, capsys):
    assert main_program(flags(output_dir=tmp_path / "run", **{**settings(shapes[0]), **wrong})) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# ---- a run -------------------------------------------------------------------------------------------------------


def test_the_map_is_scikit_learns_of_the_models_scores(trained, shapes):
    state, last = trained.state(), trained.log()[-1]
    config = Config(**{key: state["config"][key] for key in ("task", "data_path", "labels", "label_separator")})
    config.val_share = "30%"
    source = build_source(config, train=False)
    model = create_model("tests.tiny_models:convnet", 3, 64).eval()
    model.load_state_dict(state["model"])
    loader = eval_loader(source, EvalTransform(64, 64, "lanczos"), 7, 0, 1, 0, False)
    with torch.no_grad():
        scores = torch.cat([model(Finish(3).evaluate(images, 64)) for images, _, _ in loader]).numpy()
    truth = np.array([[name in shapes[1][source.name(i)[-6:]] for name in source.classes] for i in range(len(source))])
    each = [100 * average_precision_score(truth[:, k], scores[:, k]) for k in range(3)]
    assert last["test_map"] == pytest.approx(np.mean(each), abs=1e-3)
    assert last["eval_images"] == len(source) and "test_acc1" not in last
    assert last["test_map"] > 75 > 100 * truth.mean() + 15  # far above the share of positives, which chance gives
    found = json.loads((trained.output / "validation.json").read_text(encoding="utf-8"))
    assert [line["ap"] for line in found["classes"]] == pytest.approx(each, abs=1e-3)
    assert [line["images"] for line in found["classes"]] == truth.sum(0).tolist()


def test_two_processes_score_each_image_once(trained, main_program, tmp_path, capsys):
    words = ["--recipe", str(trained.output / "config.yaml"), *OURS, "--eval", "true", "--val_share", "35%"]
    words += ["--resume", str(trained.output / "checkpoint-last.pth")]
    capsys.readouterr()
    assert main_program(words) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first, second = world(words, tmp_path / "log", 2)
    assert first.wait() == second.wait() == 0, first.output
    both = [json.loads(line) for line in first.output.splitlines() if line.startswith("{")]
    for one, two in zip(alone, both, strict=True):
        assert two["ap"] == pytest.approx(one["ap"], abs=1e-6)
    assert both[0]["images"] == alone[0]["images"] != trained.log()[-1]["eval_images"]


def test_best_is_by_map(trained):
    best, log = trained.state()["best"], trained.log()
    values = [line[key] for line in log if line.get("eval_size") == 64 for key in ("test_map", "test_map_ema")]
    assert best["map"] == max(values) and (trained.output / "checkpoint-best.pth").exists()


def test_eval_and_report(trained, main_program, capsys):
    words = ["--recipe", str(trained.output / "config.yaml"), *OURS, "--eval", "true"]
    assert main_program([*words, "--resume", str(trained.output / "checkpoint-last.pth")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    last = trained.log()[-1]
    assert [line["map"] for line in lines] == pytest.approx([last["test_map"], last["test_map_ema"]])
    assert set(lines[0]["ap"]) == set(COLOURS) and np.mean(list(lines[0]["ap"].values())) == pytest.approx(
        lines[0]["map"]
    )
    page = (trained.output / "report.html").read_text(encoding="utf-8")
    for words in ("best mAP at 64 pixels", "average precision, %", "Images with the highest loss", "grün", "mAP, %"):
        assert words in page, words
    assert "top-1" not in page.split("All settings")[0]


@pytest.mark.parametrize("threshold", [0.5, 0.0, 1.0])
def test_predict(trained, shapes, threshold, main_program, capsys, tmp_path):
    images = shapes[0] / "images" / "0*.jpg"
    words = ["--predict", str(images), "--resume", str(trained.output / "checkpoint-last.pth"), *OURS]
    words += ["--device", "cpu"]
    words += ["--num_workers", "0", "--model_ema", "false", "--threshold", str(threshold)]
    capsys.readouterr()
    assert main_program(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 10 and all(label["probability"] >= threshold for line in lines for label in line["labels"])
    model = create_model("tests.tiny_models:convnet", 3, 64).eval()
    model.load_state_dict(trained.state()["model"])
    for line in lines:
        image = EvalTransform(64, 64, "lanczos")(Path(line["image"]).read_bytes())
        with torch.no_grad():
            p = model(Finish(3).evaluate(image[None], 64))[0].sigmoid()
        expected = {name: float(p[k]) for k, name in enumerate(trained.state()["classes"]) if p[k] >= threshold}
        assert {label["label"]: label["probability"] for label in line["labels"]} == pytest.approx(expected, abs=2e-6)
    # The CSV is a table that --labels reads.
    assert main_program([*words, "--predict_to", str(tmp_path / "labels.csv")]) == 0
    if threshold < 1:
        table = read_table(tmp_path / "labels.csv", several=True)
        assert len(table) == 10 and len(table.numbers) == sum(len(line["labels"]) for line in lines)


def test_real_characters(trained, shapes, main_program, capsys):
    words = ["--predict", str(shapes[0] / "images" / "00.jpg"), "--resume", str(trained.output / "checkpoint-last.pth")]
    words += OURS
    assert main_program([*words, "--device", "cpu", "--threshold", "0", "--num_workers", "0"]) == 0
    assert "grün" in capsys.readouterr().out


def test_resumes_bit_identically(shapes, main_program, tmp_path):
    common = settings(shapes[0], epochs=1, save_interval="1 steps")
    assert main_program(flags(output_dir=tmp_path / "whole", **common)) == 0
    stopped = flags(output_dir=tmp_path / "parts", stop_after="3 steps", **common)
    assert main_program(stopped) == 0
    assert main_program(flags(output_dir=tmp_path / "parts", **common)) == 0
    whole, parts = (Run(tmp_path / name) for name in ("whole", "parts"))
    assert same(whole.state()["model"], parts.state()["model"]) and whole.log()[-1]["test_map"] == pytest.approx(
        parts.log()[-1]["test_map"]
    )
    assert whole.state()["identity"]["model"]["task"] == "multilabel"


def test_fine_tuning_a_classifier(shapes, trained, main_program, tmp_path, capsys):
    words = settings(
        shapes[0], epochs=1, finetune=trained.output / "checkpoint-best.pth", lr=1e-9, min_lr=0, mixup=0, cutmix=0
    )
    assert main_program(flags(output_dir=tmp_path / "run", **words)) == 0
    best = trained.state()["best"]["map"]
    assert Run(tmp_path / "run").log()[-1]["test_map"] == pytest.approx(best, abs=15)
