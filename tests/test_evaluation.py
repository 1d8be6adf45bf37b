"""--eval true: the same figures as in training, other sizes, subsets of classes, ReaL labels, missing heads."""

import json
import random

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from tests.conftest import flags

WNIDS = ImageNetInfo("imagenet-1k").label_names()


def evaluate(main_program, capsys, **settings):
    """Runs --eval true and returns its JSON lines."""
    assert main_program(flags(eval=True, **settings)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def write_photos(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((70, 64), random.Random(name).uniform(20, 90)).convert("RGB").save(path, "JPEG")
    return folder


def test_evaluation_repeats_what_training_logged(main_program, train, folder, capsys):
    run = train(model_ema=True, model_ema_decay=0.8)
    last = run.log()[-1]
    raw, averaged = evaluate(main_program, capsys, data_path=folder, resume=run.output / "checkpoint-last.pth")
    for line, suffix in ((raw, ""), (averaged, "_ema")):
        assert line["acc1"] == pytest.approx(last[f"test_acc1{suffix}"])
        assert line["loss"] == pytest.approx(last[f"test_loss{suffix}"], rel=1e-5)
        assert line["images"] == 15 and line["eval_size"] == 64 and line["images_per_s"] > 0
    assert (raw["weights"], averaged["weights"]) == ("model", "model_ema")
    assert raw["loss"] != averaged["loss"]


def test_another_size_gives_another_loss(main_program, train, folder, capsys):
    run = train(epochs=1)
    settings = {"data_path": folder, "resume": run.output / "checkpoint-last.pth"}
    (same,) = evaluate(main_program, capsys, **settings)
    (larger,) = evaluate(main_program, capsys, eval_size=96, **settings)
    assert larger["eval_size"] == 96 and larger["loss"] != same["loss"]


def test_a_subset_of_classes_competes_among_itself(main_program, train, folder, tmp_path, capsys):
    """Two of three classes, in folders of their own: the logits of the third must not count."""
    run = train(epochs=1)
    subset = tmp_path / "subset"
    for name in ("class_0", "class_2"):
        (subset / name).mkdir(parents=True)
        for path in (folder / "val" / name).iterdir():
            (subset / name / path.name).write_bytes(path.read_bytes())
    settings = {"data_path": None, "eval_data": subset, "resume": run.output / "checkpoint-last.pth"}
    (line,) = evaluate(main_program, capsys, **settings)
    assert line["images"] == 10 and line["acc5"] == 100.0

    # The oracle: the checkpoint's weights on the same pixels, by hand.
    from inputs.finish import Finish
    from inputs.transforms import EvalTransform
    from models import checkpoints, create_model

    model = create_model("tests.tiny_models:convnet", 3, 64).eval()
    model.load_state_dict(checkpoints.load(settings["resume"])["model"])
    transform, finish = EvalTransform(64, 64, "lanczos"), Finish(3, base_size=64)
    right = 0
    for label, name in ((0, "class_0"), (2, "class_2")):
        for path in sorted((subset / name).iterdir()):
            with torch.no_grad():
                logits = model(finish.evaluate(transform(path.read_bytes())[None], 64))[0]
            right += (0 if logits[0] > logits[2] else 2) == label
    assert line["acc1"] == pytest.approx(100 * right / 10)


def test_a_class_the_model_does_not_know(main_program, train, tmp_path, capsys):
    run = train(epochs=1)
    strange = write_photos(tmp_path / "strange", ["class_0/a.jpg", "zebra/b.jpg"])
    code = main_program(flags(eval=True, data_path=None, eval_data=strange, resume=run.output / "checkpoint-last.pth"))
    assert code != 0 and "'zebra'" in capsys.readouterr().err


@pytest.fixture
def imagenet_weights(tmp_path):
    """A model with ImageNet's 1000 outputs, saved as anyone would."""
    from models import create_model

    torch.manual_seed(0)
    model = create_model("tests.tiny_models:convnet", 1000, 64)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_imagenet_variants_and_real_labels(main_program, imagenet_weights, tmp_path, capsys):
    """Class folders named by wnid (a subset), or by number as ImageNet-V2's; ReaL labels by file name."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 7)]
    by_wnid = write_photos(tmp_path / "a", [f"{WNIDS[65 + 100 * (i % 2)]}/{name}" for i, name in enumerate(names)])
    settings = {"data_path": None, "finetune": imagenet_weights}
    (line,) = evaluate(main_program, capsys, eval_data=by_wnid, real_labels=True, **settings)
    assert line["images"] == 6 and 0 <= line["real_acc1"] <= 100
    by_number = write_photos(tmp_path / "v2", ["0/a.jpg", "7/b.jpg", "999/c.jpg"])
    (line,) = evaluate(main_program, capsys, eval_data=by_number, num_classes=1000, **settings)
    assert line["images"] == 3
    assert main_program(flags(eval=True, eval_data=by_number, real_labels=True, **settings)) != 0
    assert "--real_labels" in capsys.readouterr().err


def test_real_accuracy_leaves_out_images_without_labels():
    from commands.evaluate import real_accuracy

    assert real_accuracy([3, 4, 5, 6], [[3], [], [1, 5], [7]]) == pytest.approx(200 / 3)


def test_numbered_folders_are_the_classes_of_that_number():
    from commands.evaluate import _columns

    class Numbered:
        classes = ("0", "10", "2")  # as a file system sorts them

    assert _columns(Numbered(), WNIDS).tolist() == [0, 10, 2]


def test_a_random_head_is_not_evaluated(main_program, imagenet_weights, folder, capsys):
    assert main_program(flags(eval=True, data_path=folder, finetune=imagenet_weights)) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "head" in error and "--num_classes" in error


def test_weights_are_named(main_program, folder, capsys):
    assert main_program(flags(eval=True, data_path=folder)) != 0
    assert "--resume" in capsys.readouterr().err
