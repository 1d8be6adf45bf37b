"""Own models and weights: what a run makes of models and files that are a user's own."""

import http.server
import json
import os
import threading
from functools import partial

import pytest
import timm
import torch
from conftest import Run, flags, write_images
from test_predict import OWN
from torch import nn

from models import create_model, load_weights
from models.reading import read_weights

RELEASE = [f"{kind}_{size}" for kind in ("identityformer", "randformer", "poolformerv2") for size in
           ("s12", "s24", "s36", "m36", "m48")]  # fmt: skip
for _kind in ("caformer", "convformer"):
    RELEASE += [f"{_kind}_{size}{end}" for size in ("s18", "s36", "m36", "b36") for end in ("", "_384")]
    RELEASE += [f"{_kind}_b36{end}" for end in ("_in21k", "_in21ft1k", "_384_in21ft1k")]
RELEASE += ["CSWin_64_12211_tiny_224", "CSWin_64_24322_small_224", "CSWin_96_24322_base_224", "CSWin_96_24322_base_384"]
RELEASE += [
    "CSWin_144_24322_large_224",
    "CSWin_144_24322_large_384",
    "resnet50",
    "swin_tiny",
    "swin_small",
    "swin_base",
]
RELEASE += [f"deit_{size}_{end}patch16_224" for size in ("tiny", "small", "base") for end in ("", "distilled_")]
RELEASE += ["deit_base_patch16_384", "deit_base_distilled_patch16_384"]
RELEASE += [f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")]
RELEASE += [f"convnext_isotropic_{size}" for size in ("small", "base", "large")]


def test_all_names_of_the_release_resolve():
    assert len(set(RELEASE)) == 63
    for name in RELEASE:
        with torch.device("meta"):
            model = create_model(name, 7, 384 if "384" in name else 224, 0.1)
        assert model.num_classes == 7, name
    with pytest.raises(ValueError, match="no such model"):
        create_model("CSWin_96_24322_base_225")


def test_caformers_head_is_its_authors():
    """Dropout between the MLP head's norm (epsilon 1e-5) and its last layer, by the formula."""
    torch.manual_seed(0)
    model = create_model("caformer_s18", 5, 64, drop_rate=0.5).eval()
    features = torch.randn(2, 512, 2, 2)
    head = model.head
    x = nn.functional.layer_norm(features.mean((2, 3)), (512,), head.norm.weight, head.norm.bias, 1e-6)
    x = torch.relu(head.fc.fc1(x)).square()
    x = nn.functional.layer_norm(x, (2048,), head.fc.norm.weight, head.fc.norm.bias, 1e-5)
    assert torch.allclose(model.forward_head(features), head.fc.fc2(x), atol=1e-6)
    model.train()
    torch.manual_seed(1)
    dropped = model.forward_head(features)
    torch.manual_seed(1)
    assert torch.allclose(dropped, head.fc.fc2(nn.functional.dropout(x, 0.5)), atol=1e-6)
    plain = timm.create_model("caformer_s18", num_classes=5, drop_rate=0.5)
    assert plain.head.drop.p == 0.5 and plain.head.fc.head_drop.p == 0  # the control: timm drops elsewhere
    assert model.rebuild(96).head.fc.head_drop.p == 0.5


# ---- models that do not train ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "function, words",
    [("unused", "get no gradient (spare)"), ("pair_in_training", "returns a tuple"), ("seven", "shape (2, 7)")],
)
def test_the_check_stops_main_before_training(main_program, folder, tmp_path, capsys, function, words):
    settings = {"model": f"tests.test_own_weights:{function}", "output_dir": tmp_path / "run", "epochs": 1}
    assert main_program(flags(data_path=folder, **settings)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and not (tmp_path / "run").exists()


def test_the_check_stops_runs_of_several_labels_too(main_program, folder, tmp_path, capsys):
    rows = [f"{path.relative_to(folder)},{path.parts[-3]},{path.parent.name}" for path in folder.glob("*/*/*.jpg")]
    (tmp_path / "labels.csv").write_text("\n".join(["path,split,label", *rows]))
    settings = {"model": "tests.test_own_weights:unused", "task": "multilabel", "labels": tmp_path / "labels.csv"}
    assert main_program(flags(data_path=folder, output_dir=tmp_path / "run", **settings)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "get no gradient (spare)" in err and not (tmp_path / "run").exists()


class PairInTraining(nn.Linear):
    def forward(self, x):
        logits = super().forward(x.mean((2, 3)))
        return (logits, logits) if self.training else logits


def pair_in_training(num_classes):
    return PairInTraining(3, num_classes)


def seven(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))


def unused(num_classes):
    from test_check import Unused

    return Unused(3, num_classes)


# ---- normalisation ---------------------------------------------------------------------------------------------------
def scores(capsys, main_program, argv):
    capsys.readouterr()
    assert main_program(argv) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_a_models_own_normalisation_reaches_every_command(main_program, folder, tmp_path, capsys):
    """timm's test_vit is noted with 0.5; a run from its weights keeps that, and so do evaluation and prediction."""
    own = timm.create_model("test_vit", num_classes=3, img_size=64)
    assert tuple(own.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    base = {"model": "test_vit", "data_path": folder, "epochs": 1}
    evaluation = flags(**base, eval=True, finetune=tmp_path / "own.pth")
    kept, err = scores(capsys, main_program, evaluation)
    assert "mean 0.5/0.5/0.5" in err and "tensors loaded" in err  # --eval prints its report
    said, _ = scores(capsys, main_program, [*evaluation, "--mean", "[0.5,0.5,0.5]", "--std", "[0.5,0.5,0.5]"])
    imagenet, err = scores(
        capsys, main_program, [*evaluation, "--mean", "[0.485,0.456,0.406]", "--std", "[0.229,0.224,0.225]"]
    )
    assert kept["loss"] == said["loss"] != imagenet["loss"]
    assert main_program(flags(**base, output_dir=tmp_path / "run", finetune=tmp_path / "own.pth")) == 0
    state = Run(tmp_path / "run").state()
    assert list(state["config"]["mean"]) == list(state["config"]["std"]) == [0.5, 0.5, 0.5]
    path = tmp_path / "run" / "checkpoint-last.pth"
    kept, err = scores(capsys, main_program, flags(**base, eval=True, resume=path))
    assert "mean 0.5/0.5/0.5" in err
    last = Run(tmp_path / "run").log()[-1]
    assert kept["loss"] == pytest.approx(last["test_loss"], rel=1e-4)
    from models.export import main as export

    assert export([str(path), str(tmp_path / "x.pt2"), "--format", "torch_export"]) == 0
    extra = {"about": ""}
    torch.export.load(tmp_path / "x.pt2", extra_files=extra)
    assert json.loads(extra["about"])["mean"] == [0.5, 0.5, 0.5]


def test_authors_files_are_imagenets_whatever_timm_notes(tmp_path):
    """A ViT in torchvision's names, and MAE's fine-tuned with its norm behind the average; timm's own: timm's note."""
    torch.manual_seed(0)
    for options, mean in (({}, 0.5), ({"global_pool": "avg"}, 0.485)):
        model = create_model("vit_tiny_patch16_224", 3, 64, **options)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        assert load_weights(model, tmp_path / "w.pth").mean[0] == mean


# ---- other classes ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def source(folder, main_program, tmp_path_factory):
    output = tmp_path_factory.mktemp("source") / "run"
    assert main_program(flags(output_dir=output, data_path=folder, epochs=1)) == 0
    return output / "checkpoint-last.pth"


def test_other_classes_get_a_new_head_and_the_same_ones_keep_theirs(source):
    state = read_weights(source)["model"]
    for names, words in (
        (["class_0", "class_1", "class_2"], ""),
        (["class_2", "class_0", "class_1"], "into this run's order"),
        (["x", "y", "z"], "a new head"),
        (["class_0", "class_1", "z"], "a new head"),
    ):
        model = create_model(OWN[1], 3, 64)
        before = model.head.weight.clone()
        report = load_weights(model, source, classes=names)
        assert words in str(report) and torch.equal(model.stem.weight, state["stem.weight"])
        if words == "a new head":
            assert torch.equal(model.head.weight, before) and report.random == ["head.weight", "head.bias"]
        else:
            rows = [int(name[-1]) for name in names]
            assert torch.equal(model.head.weight, state["head.weight"][rows]) and not report.random
            assert torch.equal(model.head.bias, state["head.bias"][rows])


def test_fine_tuning_on_as_many_other_classes_says_so(source, main_program, tmp_path, capsys):
    write_images(tmp_path / "data" / "train", [8, 8, 8])
    write_images(tmp_path / "data" / "val", [2, 2, 2])
    for split in ("train", "val"):
        (tmp_path / "data" / split / "class_1").rename(tmp_path / "data" / split / "otter")
    settings = {"finetune": source, "output_dir": tmp_path / "run", "data_path": tmp_path / "data", "epochs": 2}
    assert main_program(flags(**settings)) == 0
    assert "a new head: checkpoint-last.pth knows other classes" in capsys.readouterr().out


# ---- URLs ------------------------------------------------------------------------------------------------------------
def test_a_url_of_any_name_loads_and_a_changed_file_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=served)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/vit-b.pth"  # torch.hub would read "b" as the file's hash
        torch.save({"a": torch.ones(1)}, served / "vit-b.pth")
        assert read_weights(url)["a"] == 1 and read_weights(url)["a"] == 1
        torch.save({"a": torch.full((1,), 2.0)}, served / "vit-b.pth")
        os.utime(served / "vit-b.pth", (2e9, 2e9))
        capsys.readouterr()
        assert read_weights(url)["a"] == 2 and "has changed" in capsys.readouterr().out
        server.shutdown()
    assert read_weights(url)["a"] == 2 and "does not answer" in capsys.readouterr().out  # the copy
    with pytest.raises(ValueError, match="cannot be downloaded"):
        read_weights(url + "2")


def test_names_that_look_like_the_hubs(monkeypatch):
    assert create_model("timm/test_vit.r160_in1k", 3, 64).num_classes == 3
    with pytest.raises(ValueError, match="cannot import hfmodels"):
        create_model("hfmodels:build")
