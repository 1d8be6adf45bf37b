"""Exported graphs, loaded by the library that reads them, compute what the model computes; what cannot be is said."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import checkpoint_fields

from models import checkpoints, create_model, graphs
from models.export import main

needs_onnx = pytest.mark.skipif(torch.__version__ < "2.6", reason="--format onnx needs torch 2.6")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small vision Transformer with the names of what main.py saves, as if trained at 64 pixels."""
    torch.manual_seed(0)
    model, average = (create_model("test_vit", 3, 64) for _ in range(2))
    settings = {"model": "test_vit", "model_args": None, "input_size": 64, "eval_size": None, "num_classes": None}
    content = checkpoint_fields(
        model=model.state_dict(),
        model_ema=average.state_dict(),
        step=7,
        config={**settings, "crop_pct": 0.9},
        classes=["ant", "bee", "cat"],
    )
    path = tmp_path_factory.mktemp("graphs") / "checkpoint-last.pth"
    checkpoints.save(path, content)
    return path


def model_of(checkpoint, key, size):
    from models import load_weights

    model = create_model("test_vit", 3, size).eval()
    load_weights(model, checkpoint, key=key)
    return model


@needs_onnx
def test_onnx(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    assert main([str(checkpoint), str(out), "--format", "onnx", "--size", "48", "--ema"]) == 0
    assert "48x48 pixels, any batch, 3 classes; agrees" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 48, 48)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model_of(checkpoint, "model_ema", 48)(images), atol=1e-4)
        assert np.abs(logits - model_of(checkpoint, "model", 48)(images).numpy()).max() > 1e-3  # not the raw weights
    about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
    assert about["classes"] == ["ant", "bee", "cat"]
    assert (about["input_size"], about["crop_pct"], about["mean"][0]) == (48, 0.9, 0.485)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_torch_export(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    assert main([str(checkpoint), str(out), "--format", "torch_export"]) == 0
    assert "64x64 pixels" in capsys.readouterr().out
    extra = {"about": ""}
    program = torch.export.load(out, extra_files=extra)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(images), model_of(checkpoint, "model", 64)(images), atol=1e-5, rtol=1e-5
        )
    assert json.loads(extra["about"])["input_size"] == 64


class OneByOne(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.mean((2, 3)).reshape(3)).reshape(1, -1)


def test_a_model_of_one_image_at_a_time():
    _, images = graphs._capture(OneByOne(3, 2).eval(), 8)
    assert len(images) == 1


class Undecided(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))


def test_what_cannot_be_traced_is_said():
    with pytest.raises(ValueError, match=r"torch.export cannot trace Undecided: "):
        graphs._capture(Undecided(3, 2).eval(), 8)


def test_a_wrong_graph_is_not_written(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(graphs, "_write_torch", lambda program, path, about: lambda images: images.sum((2, 3)))
    assert main([str(checkpoint), str(tmp_path / "x.pt2"), "--format", "torch_export"]) == 1
    assert "outputs differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(checkpoint, tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(graphs, "_capture", lambda model, size: (None, torch.zeros(1)))
    assert main([str(checkpoint), str(tmp_path / "x.onnx"), "--format", "onnx"]) == 1
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_wrong_usage(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint), str(tmp_path / "x"), "--size", "64"])
    assert stop.value.code == 2 and "--size" in capsys.readouterr().err
    torch.save({"head.weight": torch.zeros(2, 3)}, tmp_path / "weights.pth")
    assert main([str(tmp_path / "weights.pth"), str(tmp_path / "x"), "--format", "onnx"]) == 1
    assert "not a checkpoint of this project" in capsys.readouterr().err
    assert main([str(checkpoint), str(tmp_path / "nowhere" / "x"), "--format", "onnx"]) == 1
