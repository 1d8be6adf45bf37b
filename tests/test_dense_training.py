"""Detection and segmentation as runs of main.py: they learn, resume to the bit, and agree on one and two processes."""

import json
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import Run, same
from dense_data import CLASSES, scenes, write_coco, write_masks
from processes import Program, world

from commands import autobatch, doctor
from training import scenes as scenes_module
from training.build import make_model
from training.session import Session

COMMON = {
    "curriculum": "none",
    "magnitude": "none",
    "mixup": 0,
    "cutmix": 0,
    "reprob": 0,
    "smoothing": 0,
    "num_workers": 0,
    "device": "cpu",
    "batch_size": 4,
    "micro_batch": 2,
    "lr": 1e-3,
    "max_side": 192,
    "test_side": 96,
    "log_interval": "2 steps",
    "eval_interval": "100%",
    "save_interval": 0,
    "model": "convnext_atto",
}
DETECTION = {
    "task": "detection",
    "data_set": "coco",
    "train_sides": "[64, 96]",
    "crop_prob": 0,
    "head_args": '{"channels": 16, "width": 32, "sampled": 32}',
}
SEGMENTATION = {
    "task": "segmentation",
    "data_set": "masks",
    "crop": 64,
    "head_args": '{"width": 16, "auxiliary_width": 8}',
}
TASKS = {"detection": DETECTION, "segmentation": SEGMENTATION}


def argv(task, output, data, **more):
    settings = {**COMMON, **TASKS[task], "data_path": data / task, "output_dir": output, **more}
    return [
        text
        for key, value in settings.items()
        for text in (f"--{key}", str(value).lower() if value is True else str(value))
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    for split, count, seed in (("train", 13, 0), ("val", 5, 1)):
        write_coco(root / "detection", scenes(count, seed), split)
        write_masks(root / "segmentation", scenes(count, seed), split)
    return root


@pytest.fixture(scope="module")
def whole(data, main_program, tmp_path_factory):
    """A run of six steps of each task, over two passes, with a moving average."""
    runs = {}
    for task in TASKS:
        output = tmp_path_factory.mktemp(task)
        assert main_program(argv(task, output, data, epochs="6 steps", model_ema=True, model_ema_decay=0.5)) == 0
        runs[task] = Run(output)
    return runs


METRICS = {"detection": ("box_AP", "mask_AP", "box_AP50"), "segmentation": ("mIoU", "mAcc", "aAcc")}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_logs_scores_of_every_image_and_class_and_shows_what_it_sees(whole, task):
    run = whole[task]
    last = run.log()[-1]
    assert last["eval_images"] == 5 and last["progress"] == 1
    for metric in METRICS[task]:
        assert last[f"test_{metric}"] is not None and last[f"test_{metric}_ema"] is not None
    assert set(CLASSES) <= set(last["per_class"])
    names = {path.name for path in (run.output / "samples").iterdir()}
    assert names == {"stage-1.png", "stage-1-answers.png"}
    page = (run.output / "report.html").read_text()
    assert f"best {METRICS[task][0].replace('_', ' ')}" in page and "triangle" in page
    assert "top-1" not in page
    plan = json.loads((run.output / "plan.json").read_text())
    assert plan["total"]["steps"] == 6 and plan["total"]["params"] > 3e6 and plan["total"]["flops"] > 1e9


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_to_the_bit(whole, data, main_program, tmp_path, task):
    more = {"epochs": "6 steps", "model_ema": True, "model_ema_decay": 0.5}
    assert main_program(argv(task, tmp_path, data, stop_after="2 steps", **more)) == 0
    half = Run(tmp_path).state()
    assert half["step"] == 2
    assert main_program(argv(task, tmp_path, data, **more)) == 0
    undisturbed, resumed = whole[task].result(), Run(tmp_path).result()
    assert same(undisturbed["state"]["model"], resumed["state"]["model"])
    assert same(undisturbed["state"]["model_ema"], resumed["state"]["model_ema"])
    assert undisturbed["log"] == resumed["log"]
    assert not same(undisturbed["state"]["model"], half["model"])  # negative control: they were others on the way


def kill_at(step):
    """From now on a run of this process is killed when it has done so many steps, before it saves them."""
    after_step = Session.after_step

    def killed(self, lr, images):
        if self.training.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return after_step(self, lr, images)

    Session.after_step = killed


def kill_and_resume(whole, data, main_program, folder, task, step):
    run = argv(task, folder, data, epochs="6 steps", model_ema=True, model_ema_decay=0.5, save_interval="1 steps")
    assert Program(run, folder / "log", fault=partial(kill_at, step)).wait() == -signal.SIGKILL
    if step > 1:
        assert Run(folder).state()["step"] == step - 1
    assert main_program(run) == 0
    assert same(whole[task].result(), Run(folder).result())


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_resumes_to_the_bit(whole, data, main_program, tmp_path, task):
    kill_and_resume(whole, data, main_program, tmp_path, task, 5)


@pytest.mark.extended
@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_killed_at_any_step_resumes_to_the_bit(whole, data, main_program, tmp_path, task, step):
    kill_and_resume(whole, data, main_program, tmp_path, task, step)


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_end_like_one(data, main_program, tmp_path, task):
    more = {"epochs": "2 steps", "opt": "sgd", "lr": 1e-3}
    assert main_program(argv(task, tmp_path / "one", data, **more)) == 0
    programs = world(argv(task, tmp_path / "two", data, **more), tmp_path / "log", 2)
    assert [program.wait() for program in programs] == [0, 0], programs[0].output
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    weights = two.state()["model"]
    for name, value in one.state()["model"].items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, weights[name], rtol=2e-4, atol=2e-5, msg=name)
    assert one.log()[-1]["train_loss"] == pytest.approx(two.log()[-1]["train_loss"], rel=1e-4)
    assert two.log()[-1]["eval_images"] == 5


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_and_predictions_of_a_checkpoint(whole, data, main_program, tmp_path, capsys, task):
    checkpoint = whole[task].output / "checkpoint-last.pth"
    capsys.readouterr()
    assert main_program(argv(task, tmp_path, data, eval=True, resume=checkpoint)) == 0
    raw, averaged = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    last = whole[task].log()[-1]
    for metric in METRICS[task]:
        assert raw[metric] == pytest.approx(last[f"test_{metric}"]) and averaged["weights"] == "model_ema"
    folder = data / task / ("val" if task == "detection" else "images/val")
    command = ["--predict", folder, "--resume", checkpoint, "--predict_to", tmp_path / "out", "--pictures", "true"]
    assert main_program([*map(str, command), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 5
    if task == "detection":
        content = json.loads((tmp_path / "out" / "predictions.json").read_text())
        assert len(content["images"]) == 5 and [one["name"] for one in content["categories"]] == list(CLASSES)
    else:
        assert len(list((tmp_path / "out").glob("*.png"))) == 5


def test_a_run_resumes_and_is_evaluated_on_its_own_scenes_alone(whole, data, main_program, tmp_path, capsys):
    other, checkpoint = tmp_path / "other", whole["detection"].output / "checkpoint-last.pth"
    write_coco(other / "detection", scenes(13, 0), "train")
    write_coco(other / "detection", scenes(5, 2), "val")
    assert main_program(argv("detection", tmp_path / "a", other, eval=True, resume=checkpoint)) == 0
    assert "the validation images are not those of the run" in capsys.readouterr().err
    more = {"epochs": "6 steps", "model_ema": True, "model_ema_decay": 0.5, "resume": checkpoint}
    assert main_program(argv("detection", tmp_path / "b", other, **more)) == 2
    err = capsys.readouterr().err
    assert "is of another run: validation digest was" in err and "--allow_change data" in err


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("detection", {"mixup": 0.8, "smoothing": 0.1}, "set --mixup 0 --smoothing 0"),
        ("detection", {"head": "upernet"}, "--head upernet does not fit --task detection"),
        ("detection", {"data_set": "ade20k"}, "--data_set ade20k does not fit --task detection"),
        ("detection", {"head_args": '{"chanels": 3}'}, "chanels"),
        ("detection", {"model": "deit_tiny_patch16_224", "model_args": '{"patch_size": 14}'}, "make no pyramid"),
        ("segmentation", {"micro_batch": 1}, "--micro_batch 1: UperNet pools the whole image to one value"),
        ("segmentation", {"schedule": "steps"}, "--schedule steps needs --lr_steps"),
        ("segmentation", {"epochs": "20 passes"}, "--epochs is '20 passes'"),
        ("segmentation", {"model": "mixer_s32_224"}, "--model mixer_s32_224: its feature maps have strides 32"),
    ],
)
def test_settings_that_cannot_work_are_wrong_usage(data, main_program, tmp_path, capsys, task, more, message):
    assert main_program(argv(task, tmp_path / "out", data, **more)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "images have no box" not in line]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("checkpoint*"))


@pytest.mark.parametrize(("task", "shape"), [("detection", (192, 192)), ("segmentation", (64, 64))])
def test_groups_are_found_and_a_machine_measured_with_the_largest_scenes(
    data, main_program, monkeypatch, tmp_path, capsys, task, shape
):
    blank, seen = scenes_module.blank_scenes, []

    def watched(*args):
        images, made = blank(*args)
        seen.append((tuple(images.shape[-2:]), len(made.sizes)))
        return images, made

    for module in (autobatch, doctor):
        monkeypatch.setattr(module, "blank_scenes", watched)
    monkeypatch.setattr(doctor, "SECONDS", 0.01)
    assert main_program(argv(task, tmp_path, data, micro_batch="auto", epochs="1 steps")) == 0
    assert "--micro_batch auto: groups of 4" in capsys.readouterr().out
    assert main_program(argv(task, tmp_path / "doctor", data, micro_batch="auto", doctor=True, epochs="1 steps")) == 0
    said = capsys.readouterr().out
    assert "training step" in said and "the whole run: " in said and "--pipeline fast" not in said
    assert list(json.loads((tmp_path / "doctor/speeds.json").read_text())["images_per_s"]) == [str(min(shape[0], 96))]
    assert {size for size, _ in seen} == {shape} and {count for _, count in seen} == {2, 4}


def test_memory_is_foreseen_for_the_fullest_scene():
    """What autograd keeps of the largest batch decides; with less memory, groups are smaller."""
    from config import Config
    from curriculum import build_plan
    from utils import Topology

    options = {"channels": 16, "width": 32, "sampled": 32}
    config = Config(task="detection", model="resnet18", head_args=options, train_sides=[64], test_side=64, max_side=96)
    config = replace(config, mixup=0, cutmix=0)
    plan = build_plan("none", epochs=1, num_images=8, batch_size=4, base_size=64, size_multiple=32)
    build = partial(make_model, config, 3)
    fixed, each = autobatch.kept_bytes(build(64), autobatch.dense_call(config, plan))
    assert fixed == 4 * sum(parameter.nbytes for parameter in build(64).parameters()) and each > 4 * 3 * 96 * 96
    topology = Topology(0, 1, torch.device("cpu"))
    for room, groups in ((4.5, 4), (3.5, 2), (1.5, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(autobatch, "free_memory", lambda device, room=room: fixed + room * each)
            assert autobatch.find(config, plan, build, topology)[0] == groups


OVERFIT = {
    "segmentation": {
        "epochs": "60 steps",
        "head_args": '{"width": 32, "auxiliary_width": 16}',
        "crop": 96,
        "lr": 2e-3,
    },
    "detection": {
        "epochs": "160 steps",
        "head": "cascade",
        "head_args": '{"channels": 32, "width": 128, "sampled": 48}',
        "train_sides": "[128]",
        "test_side": 128,
        "lr": 1e-3,
        "schedule": "steps",
        "lr_steps": '["75%", "92%"]',
        "clip_grad": 10,
    },
}


def learn(main_program, root, task, shuffled=False, **more):
    """The last scores of a run on eight scenes, evaluated on the same; if shuffled, taught the labels of others."""
    made = [scene for scene in scenes(14, seed=3, smallest=96, largest=96) if scene.objects][:8]
    write = write_coco if task == "detection" else write_masks
    write(root / task, made, "val")
    objects = [scene.objects for scene in made]
    for place, scene in enumerate(made if shuffled else ()):
        scene.objects = objects[(place + 3) % len(made)]
    write(root / task, made, "train")
    settings = {"model": "resnet18", "micro_batch": 4, **OVERFIT[task], **more}
    assert main_program(argv(task, root / "out", root, **settings)) == 0
    return Run(root / "out").log()[-1]


def test_a_segmenter_learns_eight_scenes(main_program, tmp_path):
    assert learn(main_program, tmp_path, "segmentation")["test_mIoU"] > 35  # background everywhere: 21


@pytest.mark.extended
def test_a_segmenter_learns_what_it_is_taught(main_program, tmp_path):
    assert learn(main_program, tmp_path / "a", "segmentation", epochs="600 steps")["test_mIoU"] > 95
    assert learn(main_program, tmp_path / "b", "segmentation", shuffled=True, epochs="600 steps")["test_mIoU"] < 30


@pytest.mark.extended
def test_a_detector_learns_what_it_is_taught(main_program, tmp_path):
    found = learn(main_program, tmp_path / "a", "detection", epochs="260 steps")
    assert found["test_box_AP"] > 90 and found["test_mask_AP"] > 80
    assert learn(main_program, tmp_path / "b", "detection", shuffled=True)["test_box_AP"] < 30


@pytest.mark.parametrize(("task", "form"), [("detection", "authors"), ("segmentation", "torch_export")])
def test_a_checkpoint_is_exported_and_read_back(whole, tmp_path, capsys, task, form):
    from dense.export import main as export

    checkpoint, out = whole[task].output / "checkpoint-last.pth", tmp_path / "out"
    more = ["--size", "64", "96"] if form == "torch_export" else []
    assert export([str(checkpoint), str(out), "--format", form, "--ema", *more]) == 0
    assert "out: " in capsys.readouterr().out
    if form == "authors":
        names = torch.load(out, weights_only=True)["state_dict"]
        assert "roi_head.bbox_head.fc_cls.weight" in names and "backbone.downsample_layers.0.0.weight" in names
    else:
        (logits,) = [torch.export.load(out).module()(torch.zeros(1, 3, 64, 96))]
        assert logits.shape == (1, len(CLASSES) + 1, 64, 96)
    assert export([str(checkpoint), str(out), "--format", "torch_export", "--size", "60", "96"]) == 1
    assert "multiples of 32" in capsys.readouterr().err
