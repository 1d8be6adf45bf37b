"""Model cards, and the hub: what is pushed is loaded by timm alone, and the card says what the run's own files say."""

import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub.constants
import pytest
import safetensors
import timm
import torch
import yaml
from conftest import Run, checkpoint_fields, flags
from hub_server import hub_server

from models import checkpoints, create_model, load_weights
from models.card import card, facts
from models.export import main
from models.flops import count_flops
from models.hub import describe
from models.rebuilt import rebuild

CHECKPOINT = "checkpoint-last.pth"
TIMM_ALONE = """
import sys, timm, torch
model = timm.create_model("hf-hub:someone/tiny", pretrained=True).eval()
assert "models" not in sys.modules
with torch.no_grad():
    torch.save([model(torch.load("images.pt")), model.pretrained_cfg["label_names"]], "logits.pt")
"""


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory, main_program):
    """A run of a vision Transformer to its end, with a moving average."""
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = {"model": "test_vit", "model_ema": True, "model_ema_decay": 0.5, "drop_path": 0.1}
    assert main_program(flags(output_dir=output, data_path=folder, **settings)) == 0
    return Run(output)


def images(size=64):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def ours(path, key, size=64, name="test_vit"):
    model = create_model(name, 3, size).eval()
    load_weights(model, path, key=key)
    with torch.no_grad():
        return model(images(size))


def metadata(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["training"])


def run_code(text, folder):
    """Runs the card's own lines in a folder; returns what they name."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names, before = {}, os.getcwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names


def test_pushed_and_loaded_by_timm_alone(finished, tmp_path, monkeypatch, capsys):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "token").write_text("hf_of_the_store")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    source, out = str(finished.output / CHECKPOINT), tmp_path / "out"
    with hub_server("hf_of_the_store") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        assert main([source, str(out), "--push", "someone/tiny", "--ema", "--license", "mit"]) == 0
        assert f"pushed to {hub.url}/someone/tiny" in capsys.readouterr().out
        assert set(hub.tokens) == {"Bearer hf_of_the_store"}
        files = hub.files["someone/tiny"]
        assert files == {path.name: path.read_bytes() for path in out.iterdir()} and len(files) == 3
        torch.save(images(), tmp_path / "images.pt")
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", TIMM_ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        logits, classes = torch.load(tmp_path / "logits.pt", weights_only=False)
        torch.testing.assert_close(logits, ours(source, "model_ema"))
        assert (logits - ours(source, "model")).abs().max() > 1e-3  # a negative control: not the raw weights
        assert list(classes) == ["class_0", "class_1", "class_2"]
        # Without the right token nothing is pushed, and the export stays.
        (tmp_path / "token").write_text("hf_wrong")
        assert main([source, str(tmp_path / "other"), "--push", "someone/other"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: --push someone/other: not pushed (") and error.count("\n") == 1
        assert "hf auth login" in error and len(list((tmp_path / "other").iterdir())) == 3
        assert "someone/other" not in hub.files
    readme = files["README.md"].decode()
    head = yaml.safe_load(readme.split("---")[1])
    assert (head["license"], head["library_name"]) == ("mit", "timm") and "Licence of the weights: mit." in readme
    assert 'timm.create_model("hf-hub:someone/tiny", pretrained=True)' in readme


def test_the_card_says_what_the_run_s_files_say(finished, tmp_path, capsys):
    source, out = finished.output / CHECKPOINT, tmp_path / "mine"
    assert main([str(source), str(out), "--format", "hub"]) == 0
    assert "timm loads it" in capsys.readouterr().out
    about, log, state = metadata(out / "model.safetensors"), finished.log(), finished.state()
    cost = about["cost"]
    assert cost["hours"] == pytest.approx(sum(record["seconds"] for record in log) / 3600)
    assert cost["device_hours"] == cost["hours"] and cost["devices"].startswith("1 x cpu")
    flops, _ = count_flops(lambda size: create_model("test_vit", 3, size), (32, 48, 64))
    trained = {size: sum(r["images"] for r in log if r["input_size"] == size) for size in flops}
    assert {int(size): count for size, count in cost["images"].items()} == trained
    assert cost["flops"] == 6 * sum(trained[size] * flops[size] for size in flops)
    (scores,) = about["accuracy"]
    assert (scores["eval_size"], scores["acc1"]) == (log[-1]["eval_size"], log[-1]["test_acc1"])
    assert about["data"]["data"] == state["identity"]["data"] and about["step"] == state["step"]
    assert about["recipe"]["lr"] == 1e-3 and "output_dir" not in about["recipe"] and "opt" not in about["recipe"]
    readme = (out / "README.md").read_text()
    for text in (state["identity"]["data"]["digest"], f"{scores['acc1']:.2f}", "lr: 0.001", "not stated"):
        assert text in readme
    assert str(finished.output.parent) not in readme  # nobody's paths
    with torch.no_grad():  # the card's own lines
        logits = run_code(readme, tmp_path)["model"](images())
    torch.testing.assert_close(logits, ours(source, "model"))


def test_other_formats_say_it_too(finished, tmp_path):
    source = str(finished.output / CHECKPOINT)
    assert main([source, str(tmp_path / "x.safetensors"), "--ema"]) == 0
    assert main([source, str(tmp_path / "x.pth"), "--format", "official"]) == 0
    about = metadata(tmp_path / "x.safetensors")
    official = json.loads(torch.load(tmp_path / "x.pth", weights_only=True)["training"])
    assert (about["weights"], official["weights"]) == ("model_ema", "model")
    assert about["cost"] == official["cost"] and about["cost"]["hours"] > 0
    assert about["accuracy"][0]["acc1"] == finished.log()[-1]["test_acc1_ema"]


def test_accuracy_at_more_sizes(finished, tmp_path, capsys):
    lines = [
        {"weights": key, "eval_size": size, "acc1": size / 10 + len(key), "images": 15, "images_per_s": 1.0}
        for size in (48, 80)
        for key in ("model", "model_ema")
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [str(finished.output / CHECKPOINT), str(tmp_path / "mine"), "--format", "hub", "--ema"]
    assert main([*command, "--accuracy", str(tmp_path / "eval.jsonl")]) == 0
    assert "| 80 | 17.00 |" in (tmp_path / "mine" / "README.md").read_text()
    (tmp_path / "eval.jsonl").write_text("evaluation at 64: ...\n")
    assert main([*command, "--accuracy", str(tmp_path / "eval.jsonl")]) == 1
    assert "eval.jsonl, line 1: not a line that main.py --eval prints" in capsys.readouterr().err


def test_the_log_of_another_run_is_not_taken(finished, tmp_path):
    """A checkpoint alone, and one among the files of a run with another recipe."""
    (tmp_path / "alone").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    for name in ("log.txt", "plan.json", "environment.json"):
        (other / name).write_bytes((finished.output / name).read_bytes())
    settings = yaml.safe_load((finished.output / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**settings, "lr": 0.5}))
    for folder in (tmp_path / "alone", other):
        cost = facts(str(folder / CHECKPOINT), finished.state(), "model")["cost"]
        assert cost["hours"] is None and cost["flops"] is None
        assert sum(cost["images"].values()) == sum(record["images"] for record in finished.log())


# -- what timm does not know -------------------------------------------------------------------------------------------


def checkpoint(path, name, model, size, arguments=None):
    settings = {"model": name, "model_args": arguments, "input_size": size, "eval_size": None, "num_classes": None}
    content = checkpoint_fields(
        model=model.state_dict(), step=7, config={**settings, "crop_pct": 0.9}, classes=["ant", "bee", "cat"]
    )
    checkpoints.save(path, content)
    return str(path)


def test_a_model_that_timm_lacks_is_said_so_and_loads_here(tmp_path, capsys):
    small = {"embed_dims": [8, 16, 20, 32], "depths": [1, 1, 1, 1]}
    torch.manual_seed(0)
    model = create_model("pvt_tiny", 3, 64, **small).eval()
    source = checkpoint(tmp_path / "c.pth", "pvt_tiny", model, 64, small)
    assert main([source, str(tmp_path / "mine"), "--format", "hub"]) == 0
    assert "for this project alone (timm does not know this model)" in capsys.readouterr().out
    readme = (tmp_path / "mine" / "README.md").read_text()
    assert "timm alone cannot load this: timm does not know this model." in readme
    assert yaml.safe_load(readme.split("---")[1])["library_name"] == "pytorch"
    with torch.no_grad():
        torch.testing.assert_close(run_code(readme, tmp_path)["model"](images()), model(images()))
        # This project registers its models in timm, so with it timm's own way works as well.
        again = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
        torch.testing.assert_close(again(images()), model(images()))


def test_a_model_of_one_s_own(tmp_path, capsys):
    name = "tests.tiny_models:convnet"
    model = create_model(name, 3, 64).eval()
    source = checkpoint(tmp_path / "c.pth", name, model, 64)
    assert main([source, str(tmp_path / "mine"), "--format", "hub"]) == 1  # it is named on the command line alone
    assert "--model" in capsys.readouterr().err and not (tmp_path / "mine").exists()
    assert main([source, str(tmp_path / "mine"), "--format", "hub", "--model", name]) == 0
    readme = (tmp_path / "mine" / "README.md").read_text()
    assert f'create_model("{name}", num_classes=3, input_size=64)' in readme
    assert "timm alone cannot load this" in readme


@pytest.mark.parametrize(
    "name, size, arguments, expected",
    [
        ("test_resnet", 96, {}, {}),
        ("test_vit", 64, {}, {"img_size": 64}),
        ("test_vit", 160, {}, {}),  # its native size
        (
            "swin_tiny",
            96,
            {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
            {"img_size": 96, "window_size": 3},
        ),
    ],
)
def test_what_timm_is_told(tmp_path, name, size, arguments, expected):
    """timm's own defaults where they serve, else the size and the window; the folder then loads by them alone."""
    torch.manual_seed(0)
    model = create_model(name, 3, size, **arguments).eval()
    source = checkpoint(tmp_path / "c.pth", name, model, size, arguments)
    config, refusal = describe(rebuild(source))
    assert refusal is None and config["model_args"] == {**arguments, **expected}
    assert main([source, str(tmp_path / "mine"), "--format", "hub"]) == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images(size)), model(images(size)), atol=1e-4, rtol=1e-4)
    data = timm.data.resolve_data_config({}, model=again)
    assert (tuple(data["input_size"]), data["crop_pct"], data["interpolation"]) == ((3, size, size), 0.9, "lanczos")


def test_a_model_that_computes_something_else_in_timm_is_noticed(tmp_path, monkeypatch):
    model = create_model("test_resnet", 3, 64).eval()
    built = rebuild(checkpoint(tmp_path / "c.pth", "test_resnet", model, 64))
    built.model.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert describe(built)[1] == "timm's test_resnet does not compute what this model does"


# -- what cannot work --------------------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_left_alone(finished, tmp_path, capsys):
    source = str(finished.output / CHECKPOINT)
    (tmp_path / "README.md").write_text("mine")
    assert main([source, str(tmp_path), "--format", "hub"]) == 1
    assert "holds other files, such as README.md" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    assert main([source, str(finished.output), "--format", "hub"]) == 1
    assert main([source, str(tmp_path / "mine"), "--format", "hub"]) == 0
    assert main([source, str(tmp_path / "mine"), "--format", "hub", "--ema"]) == 0  # an export of before is replaced
    assert metadata(tmp_path / "mine" / "model.safetensors")["weights"] == "model_ema"


@pytest.mark.parametrize("flag", ["--push", "--license", "--accuracy"])
def test_flags_of_the_hub_alone(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["c.pth", str(tmp_path / "x"), "--format", "timm", flag, "x"])
    assert stop.value.code == 2 and f"{flag} is for the hub" in capsys.readouterr().err


def test_weights_without_a_classifier_are_refused(tmp_path, capsys):
    model = create_model("test_resnet", 5, 64)
    source = checkpoint(tmp_path / "c.pth", "test_resnet", model, 64)  # names 3 classes
    assert main([source, str(tmp_path / "mine"), "--format", "hub"]) == 1
    assert "has no classifier" in capsys.readouterr().err and not (tmp_path / "mine").exists()


def test_odd_contents_make_a_card_all_the_same():
    """A checkpoint may come from anyone: what is not of the kind is shown as text or not at all."""
    content = {
        "step": 1,
        "classes": ["a|b"],
        "config": {"model": "x", "model_args": {"a": torch.zeros(2)}, "finetune": "/home/me/secret/weights.pth"},
        "identity": {"data": {"images": torch.zeros(1), "digest": "a|b", "more": 1}},
        "trained": [[32], [48, 8, 5, 7]],
    }
    about = facts("nowhere/checkpoint.pth", content, "model")
    text = card("x", json.loads(json.dumps(about)), "", True)
    assert about["recipe"]["finetune"] == "weights.pth" and "secret" not in text
    assert "a\\|b" in text and about["cost"]["images"] == {"32": 0, "48": 40}


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe not text\n", b"[" * 100_000 + b"\n", b"3\n", b"{}\n", b'{"progress": NaN}\n']
)
def test_damaged_lines_of_a_log_are_passed_over_as_everywhere(finished, tmp_path, capsys, damage):
    shutil.copytree(finished.output, tmp_path / "run")
    source, state = str(tmp_path / "run" / CHECKPOINT), finished.state()
    before = facts(source, state, "model")
    lines = (tmp_path / "run/log.txt").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/log.txt").write_bytes(b"".join([lines[0], damage, *lines[1:]]))
    assert facts(source, state, "model") == before and before["accuracy"] and before["cost"]["hours"]
    assert "log.txt line 2 is damaged and passed over" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log.txt", "plan.json", "config.yaml", "environment.json"])
def test_a_damaged_run_is_told_by_its_checkpoint_alone_and_that_is_said(finished, tmp_path, capsys, name):
    shutil.copytree(finished.output, tmp_path / "run")
    (tmp_path / "run" / name).write_text("[1]\n" if name == "config.yaml" else '{"progress": 0.5}\n')
    about = facts(str(tmp_path / "run" / CHECKPOINT), finished.state(), "model")
    assert about["accuracy"] == [] and about["cost"]["hours"] is None and about["cost"]["images"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "warning: of the run only its checkpoint is told" in err and name in err
