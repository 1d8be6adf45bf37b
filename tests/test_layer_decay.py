"""Parameter groups: the reference's layers for ConvNeXt and CSWin, timm's own groups for the rest, linear probing."""

import copy

import pytest
import timm
import torch
from reference import golden
from timm.optim import param_groups_layer_decay
from torch import nn

import models.cswin
import models.pvt  # noqa: F401 (registers the models)
from models.heads import freeze_body
from models.layer_decay import layer_ids, param_groups

CASES = {
    "convnext_tiny": "convnext_tiny",
    "convnext_small": "convnext_small",
    "CSWin_64_12211_tiny_224": "cswin_tiny",
    "CSWin_96_24322_base_224": "cswin_base",
}


def build(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def timm_prefix(prefix):
    """A prefix of the reference's names in timm's: only ConvNeXt's differ."""
    if prefix.startswith("downsample_layers.0"):
        return "stem"
    if prefix.startswith("downsample_layers."):
        return f"stages.{prefix[-1]}.downsample"
    if prefix.startswith("stages."):
        return "stages.{}.blocks.{}".format(*prefix.split(".")[1:])
    return {"norm": "head.norm", "head": "head.fc"}[prefix]


@pytest.mark.parametrize("reference", CASES)
def test_golden_layers_and_groups(reference):
    expected = golden("layer_decay")[reference]
    model = build(CASES[reference])
    is_convnext = reference.startswith("convnext")
    prefixes = {timm_prefix(p) if is_convnext else p: i for p, i in expected["prefix_to_layer_id"].items()}
    ids = layer_ids(model)
    for name, layer in ids.items():
        matches = [p for p in prefixes if name.startswith(p + ".")]
        assert len(matches) == 1 and layer == prefixes[matches[0]], name
    assert sorted(set(ids.values())) == expected["ids_used"]

    groups = param_groups(model, 0.05, 0.8)
    assert len(groups) == expected["n_groups_with_layer_decay"]
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            power = expected["num_layers"] + 1 - ids[names[id(parameter)]]
            assert group["lr_scale"] == pytest.approx(0.8**power, rel=1e-12)
    plain = param_groups(model, 0.05)
    assert len(plain) == expected["n_groups_plain"] and {g["lr_scale"] for g in plain} == {1.0}
    sizes = {g["weight_decay"]: len(g["params"]) for g in plain}
    assert sizes == {0.05: expected["n_tensors_decay"], 0.0: expected["n_tensors_no_decay"]}


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "pit_ti_224",
        "resnet50",
        "pvt_tiny",
        "beit_base_patch16_224",
    ],
)
def test_other_models_follow_timm(name):
    """The oracle is timm's own function, per parameter."""
    model = build(name)
    ours, theirs = (
        {
            id(p): (g["lr_scale"], g["weight_decay"])
            for g in groups
            for p in g["params"]
        }
        for groups in (
            param_groups(model, 0.1, 0.65),
            param_groups_layer_decay(
                model, 0.1, no_weight_decay_list=model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),
                layer_decay=0.65,
            ),
        )
    )  # fmt: skip
    assert ours == theirs
    assert len({scale for scale, _ in ours.values()}) > 3


@pytest.mark.parametrize(
    "name, decayed, exempt",
    [
        ("resnet50", 54, 107),
        ("deit_small_patch16_224", 50, 102),
        (
            "swin_tiny_patch4_window7_224",
            65 - 12,
            108 + 12,
        ),  # the reference decays the 12 bias tables; Swin's authors do not
    ],
)
def test_what_decays(name, decayed, exempt):
    model = build(name)
    groups = {g["weight_decay"]: g["params"] for g in param_groups(model, 0.05)}
    assert (len(groups[0.05]), len(groups[0.0])) == (decayed, exempt)
    free = {id(p) for p in groups[0.0]}
    for key, parameter in model.named_parameters():
        if "relative_position_bias_table" in key or key in ("cls_token", "pos_embed") or key.endswith(".bias"):
            assert id(parameter) in free, key


def test_metaformer_has_a_layer_per_block():
    model = build("caformer_s18")
    ids = layer_ids(model)
    blocks = [f"stages.{i}.blocks.{k}" for i, depth in enumerate((3, 3, 9, 3)) for k in range(depth)]
    for name, layer in ids.items():
        block = next((k for k, b in enumerate(blocks, 1) if name.startswith(b + ".")), None)
        if name.startswith("stem"):
            assert layer == 0
        elif "downsample" in name:
            assert layer == ids[name[: name.index("downsample")] + "blocks.0.norm1.weight"]
        else:
            assert layer == (block or 19), name
    assert ids["head.norm.weight"] == 19


def test_every_parameter_once_and_frozen_ones_never():
    model = build("cswin_tiny")
    for parameter in model.stage1.parameters():
        parameter.requires_grad_(False)
    listed = [id(p) for g in param_groups(model, 0.05, 0.9) for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(listed) < len(list(model.parameters()))


def test_optimizer_follows_the_scales():
    """With equal gradients, SGD moves a parameter by its scale."""
    model = timm.create_model("cswin_tiny", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), num_classes=3)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(param_groups(model, 0.0, 0.5), lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {key: (before[key] - value).mean().item() for key, value in model.state_dict().items()}
    assert moved["head.bias"] == pytest.approx(1)
    assert moved["stage4.0.proj.bias"] == pytest.approx(0.5)
    assert moved["stage3.0.proj.bias"] == pytest.approx(0.5**17)
    assert moved["merge3.norm.bias"] == pytest.approx(0.5)


def test_bad_settings():
    for decay in (0.0, -0.5, 1.2):
        with pytest.raises(ValueError, match="layer_decay"):
            param_groups(build("cswin_tiny"), 0.05, decay)
    own = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer_id"):
        param_groups(own, 0.05, 0.9)
    assert [len(g["params"]) for g in param_groups(own, 0.05)] == [1, 1]


@pytest.mark.parametrize("name", ["resnet18", "cswin_tiny", "deit_tiny_distilled_patch16_224"])
def test_linear_probing_trains_the_head_alone(name):
    torch.manual_seed(0)
    small = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)} if name == "cswin_tiny" else {}
    if name.startswith("deit"):
        small = {"img_size": 32, "depth": 2}
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.5, **small)
    freeze_body(model)
    model = copy.deepcopy(model).train()  # as an EMA or a wrapper would
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(param_groups(model, 0.0), lr=1.0)
    x = torch.randn(4, 3, 32, 32)
    out = model(x)
    assert torch.equal(model.train()(x), out)  # no drop path, no batch statistics
    out.square().sum().backward()
    optimizer.step()
    changed = {
        key.rpartition(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    heads = {"resnet18": {"fc"}, "cswin_tiny": {"head"}, "deit_tiny_distilled_patch16_224": {"head", "head_dist"}}
    assert changed == heads[name]


def test_linear_probing_needs_a_head():
    with pytest.raises(ValueError, match="no classifier"):
        freeze_body(build("resnet18", num_classes=0))
