"""--predict: the same answers as the model by hand, as JSON lines and CSV; images that cannot be used are named."""

import csv
import json
import shutil

import pytest
import torch

from inputs.finish import Finish
from inputs.transforms import EvalTransform
from models import create_model

OWN = ("--model", "tests.tiny_models:convnet")  # which no file may name


@pytest.fixture(scope="module")
def checkpoint(folder, main_program, tmp_path_factory):
    from conftest import Run, flags

    output = tmp_path_factory.mktemp("trained")
    settings = {"model_ema": True, "model_ema_decay": 0.5, "epochs": 2}
    assert main_program(flags(output_dir=output, data_path=folder, **settings)) == 0
    return Run(output)


@pytest.fixture
def photos(folder, tmp_path):
    """Three images in nested folders, and something that is none."""
    target = tmp_path / "photos"
    (target / "deeper").mkdir(parents=True)
    for number, name in enumerate(("b.jpg", "a.JPG", "deeper/c.jpeg")):
        shutil.copy(folder / "val" / f"class_{number}" / "00.jpg", target / name)
    (target / "notes.txt").write_text("no image")
    (target / ".hidden.jpg").write_text("no image")
    return target


@pytest.fixture
def predict(main_program, checkpoint, capsys):
    """``predict(where, *flags)`` -> (exit code, JSON lines, standard error); model and size are the checkpoint's."""

    def call(where, *words, resume=checkpoint.output / "checkpoint-last.pth"):
        capsys.readouterr()
        code = main_program(
            ["--predict", str(where), "--resume", str(resume), "--device", "cpu", *OWN, *map(str, words)]
        )
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return call


def by_hand(path, state):
    """Probabilities of the three classes, by the model's own forward pass."""
    model = create_model("tests.tiny_models:convnet", 3, 64).eval()
    model.load_state_dict(state)
    images = EvalTransform(64, 64, "lanczos")(path.read_bytes())[None]
    with torch.no_grad():
        return model(Finish(3, base_size=64).evaluate(images, 64))[0].softmax(0)


@pytest.mark.parametrize("flag, key", [("true", "model_ema"), ("false", "model")])
def test_answers_are_the_models(predict, checkpoint, photos, flag, key):
    code, lines, err = predict(photos, "--model_ema", flag, "--top_k", 2)
    assert code == 0 and f"3 images labelled by {key} of step " in err
    assert [line["image"] for line in lines] == [str(photos / name) for name in ("a.JPG", "b.jpg", "deeper/c.jpeg")]
    for line in lines:
        expected = by_hand(photos / line["image"], checkpoint.state()[key])
        values, labels = expected.topk(2)
        assert [top["label"] for top in line["top"]] == [f"class_{label}" for label in labels]
        assert [top["probability"] for top in line["top"]] == pytest.approx(values.tolist(), abs=2e-6)


def test_default_weights_are_those_that_scored_best(predict, checkpoint, photos):
    best = checkpoint.state()["best"]["weights"]
    assert f" by {best} of step" in predict(photos)[2]


def test_an_image_and_a_pattern(predict, photos):
    assert [line["image"] for line in predict(photos / "b.jpg")[1]] == [str(photos / "b.jpg")]
    assert len(predict(photos / "*.jp*g")[1]) == 1
    code, _, err = predict(photos / "nothing*.jpg")
    assert code == 1 and "no images there" in err


def test_csv_by_the_files_name(predict, photos, tmp_path):
    target = tmp_path / "labels.csv"
    (photos / "broken.jpg").write_bytes((photos / "b.jpg").read_bytes()[:100])
    code, lines, _ = predict(photos, "--predict_to", target, "--top_k", 9)
    assert code == 1 and lines == []
    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and set(rows[0]) == {
        "image",
        "error",
        *(f"{a}_{k}" for a in ("label", "probability") for k in (1, 2, 3)),
    }
    (broken,) = [row for row in rows if row["error"]]
    assert broken["image"].endswith("broken.jpg") and broken["label_1"] == ""
    good = rows[0]
    assert sum(float(good[f"probability_{k}"]) for k in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    lines = tmp_path / "labels.jsonl"
    predict(photos, "--predict_to", lines)
    assert len([json.loads(line) for line in lines.read_text().splitlines()]) == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_bad_images_are_named_and_the_rest_goes_on(predict, photos):
    (photos / "a.JPG").write_bytes(b"not an image")
    code, lines, err = predict(photos)
    assert code == 1 and len(lines) == 3
    assert "cannot decode" in lines[0]["error"] and "top" not in lines[0] and "top" in lines[1]
    assert f"error: 1 of 3 images cannot be used, the first: {photos / 'a.JPG'} (" in err
    code, lines, _ = predict(photos / "a.JPG")
    assert code == 1 and list(lines[0]) == ["image", "error"]


def test_in_batches_with_workers(predict, folder):
    code, lines, _ = predict(folder / "train", "--num_workers", 1)
    assert code == 0 and len(lines) == 48
    assert lines[40] == predict(lines[40]["image"])[1][0]


def test_what_cannot_be_predicted_with(predict, photos, tmp_path, main_program, capsys):
    torch.save(create_model("tests.tiny_models:convnet", 3, 64).state_dict(), tmp_path / "weights.pth")
    code, _, err = predict(photos, resume=tmp_path / "weights.pth")
    assert code == 1 and "is not a checkpoint of this project" in err
    assert main_program(["--predict", str(photos)]) == 2 and "--resume" in capsys.readouterr().err


def test_no_average_to_predict_with(predict, photos, train):
    run = train("raw", epochs=1)
    code, _, err = predict(photos, "--model_ema", "true", resume=run.output / "checkpoint-last.pth")
    assert code == 1 and "holds no moving average" in err
