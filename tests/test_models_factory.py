"""Models by name: the papers', timm's and one's own, at any input size; the listing and the survey."""

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch

from curriculum.skeleton import Skeleton
from models import ALIASES, create_model, survey
from models.list import PAPER_MODELS, describe

SMALL_SWIN = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}


def structure(name, **kwargs):
    with torch.device("meta"), Skeleton():
        return create_model(name, **kwargs)


# Names


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_papers_models(name):
    model = structure(name, num_classes=7, input_size=96, drop_path=0.1)
    multiple = 32 if name.startswith(("swin", "cswin", "pvt")) else 16
    assert model.size_multiple == multiple and model.input_size == 96
    with torch.no_grad():
        assert model.eval()(torch.empty(1, 3, 96, 96, device="meta")).shape == (1, 7)


def test_aliases_are_timm_models():
    assert all(timm.is_model(name) for name in ALIASES.values())
    assert structure("deit_tiny").patch_embed.patch_size == (16, 16)


@pytest.mark.parametrize(
    "name, near",
    [("resnt50", "resnet50"), ("swin_tinny", "swin_tiny"), ("deit-small", "deit_small"), ("cswin_tini", "cswin_tiny")],
)
def test_misspelt_names_get_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"--model {name}: no such model; the nearest names are .*\b{near}\b"):
        create_model(name)


def test_a_name_like_no_other():
    with pytest.raises(ValueError, match=r"no such model\. Your own is written package.module:function"):
        create_model("zzzzzzzzzzzzzzz")


def test_own_model_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "backbones_of_mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.Flatten(1), nn.LazyLinear(num_classes))\n"
        "def sized(num_classes, img_size, drop_path_rate):\n"
        "    model = nn.Linear(img_size, num_classes)\n"
        "    model.rate = drop_path_rate\n"
        "    return model\n"
        "def broken(classes):\n"
        "    return nn.Linear(1, classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model = create_model("backbones_of_mine:net", 3, 32, width=6)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3) and model[0].out_channels == 6
    assert (model.size_multiple, model.takes_size) == (16, False)
    model = create_model("backbones_of_mine:sized", 3, 64, drop_path=0.2)
    assert (model.in_features, model.rate, model.takes_size) == (64, 0.2, True)
    assert model.rebuild(96).in_features == 96
    assert sys.path == path
    for name, message in (
        ("backbones_of_mine:nothing", "has no function 'nothing'"),
        ("not_there:net", "cannot import not_there"),
        ("backbones_of_mine:broken", "num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(name, 3)
    with pytest.raises(ValueError, match=r"--drop_path 0\.1: backbones_of_mine:net has none"):
        create_model("backbones_of_mine:net", 3, drop_path=0.1)


# Settings


def test_drop_path_reaches_the_last_block():
    model = structure("convnext_tiny", drop_path=0.3)
    assert model.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    # Swin's own default is 0.1: no drop path means none.
    assert not any(getattr(part, "drop_prob", 0) for part in structure("swin_tiny").modules())


@pytest.mark.parametrize("name", ["vgg11", "densenet121"])  # one refuses the setting, the other would ignore it
def test_drop_path_where_there_is_none(name):
    assert structure(name).takes_size is False
    with pytest.raises(ValueError, match=f"--drop_path 0.1: {name} has none; use --drop_path 0"):
        create_model(name, drop_path=0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_is_a_rate(rate):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        create_model("resnet18", drop_path=rate)


def test_settings_reach_the_model():
    assert structure("convnext_tiny", drop_rate=0.25).head.drop.p == 0.25
    model = create_model("convnext_atto", ls_init_value=0.5, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert model.stages[0].blocks[0].gamma.eq(0.5).all()
    assert create_model("convnext_atto", depths=(1, 1, 1, 1)).stages[0].blocks[0].gamma.eq(1e-6).all()
    with pytest.raises(ValueError, match="resnet18 does not let one set ls_init_value"):
        create_model("resnet18", ls_init_value=0.1)


def test_resnet_starts_as_torchvisions_does():
    """The last norm of a block starts at 1, as the papers' code had it; timm's default of 0 is a setting away."""
    assert create_model("resnet18").layer1[0].bn2.weight.eq(1).all()
    assert create_model("resnet18", zero_init_last=True).layer1[0].bn2.weight.eq(0).all()


# Sizes


def test_position_embeddings_start_at_their_spread():
    """Built at another size than the native one, embeddings and tables are drawn at it, not interpolated to it."""
    torch.manual_seed(0)
    assert create_model("deit_tiny", input_size=96, depth=1).pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    model = create_model("swin_tiny", input_size=160, **{**SMALL_SWIN, "num_heads": (2, 4, 8, 8), "embed_dim": 16})
    tables = [p.flatten() for name, p in model.named_parameters() if name.endswith("bias_table")]
    assert torch.cat(tables).std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("size", [96, 160, 224, 384])
def test_swin_windows_do_not_pad(size):
    model = structure("swin_tiny", input_size=size, **SMALL_SWIN)
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert {block.window_size for block in blocks} == {(size // 32, size // 32)}
    # Control: timm's own construction keeps windows of 7, or what the map holds.
    plain = timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **SMALL_SWIN)
    assert (plain.layers[0].blocks[0].window_size == (size // 32, size // 32)) == (size == 224)


def test_rebuild_is_the_same_construction_at_another_size():
    model = create_model("deit_tiny", 3, 96, drop_path=0.1, depth=2, embed_dim=24)
    other = copy.deepcopy(model).rebuild(160)
    assert other.pos_embed.shape == (1, 101, 24) and other.head.out_features == 3 and other.input_size == 160
    assert other.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name, multiple",
    [
        ("vit_base_patch32_224", 32),
        ("eva02_tiny_patch14_224", 14),
        ("xcit_nano_12_p8_224", 8),
        ("swinv2_tiny_window8_256", 32),
        ("efficientnet_b0", 16),
        ("levit_128s", 32),
    ],
)
def test_size_multiples(name, multiple):
    assert structure(name, input_size=timm.get_pretrained_cfg(name).input_size[-1]).size_multiple == multiple


def test_a_size_it_cannot_be_built_for():
    with pytest.raises(ValueError, match="100"):
        create_model("cswin_tiny", input_size=100)


# Listing and survey


def test_listing():
    row = describe("swin_tiny")
    assert row["params"] == 28288354 and row["size_multiple"] == 32
    assert row["flops"][224] == pytest.approx(4.5e9, rel=0.01) and row["flops"][384] == pytest.approx(14e9, rel=0.01)
    assert row["resizing"] == "resamples 12 x relative_position_bias_table"
    assert describe("resnet18")["resizing"] == "changes no parameter"


def test_survey_of_a_few_families(capsys, monkeypatch):
    families = ["convnext", "mlp_mixer", "vision_transformer", "vision_transformer_relpos"]
    monkeypatch.setattr(sys, "argv", ["survey", "--json", *families])
    assert survey.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["families"], result["passed"]) == (4, 3)
    assert "mixes positions" in result["failed"]["mlp_mixer"] and "in training" not in result["failed"]["mlp_mixer"]


def test_survey_knows_what_breaks_in_training(monkeypatch):
    """Negative control: a resize that forgets the optimizer is seen, and told from a refusal."""
    resize = survey.set_input_size
    monkeypatch.setattr(survey, "set_input_size", lambda model, size, optimizer, ema: resize(model, size))
    failed, broken = survey.survey({"vision_transformer": "test_vit"})
    assert broken == ["vision_transformer"] and failed["vision_transformer"].startswith("in training")


@pytest.mark.extended
def test_survey_of_all_families():
    done = subprocess.run(
        [sys.executable, "-m", "models.survey", "--json"], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["passed"] >= 92 and result["passed"] + len(result["failed"]) == result["families"] >= 98
