"""Muon: updates against the SVD, steps against timm's, AdamW's half against torch's, and what counts as a matrix."""

import copy

import pytest
import timm
import torch
from conftest import flags, same
from timm.optim.muon import Muon as TimmMuon
from torch import nn

from config import Config
from models import param_groups
from models.cswin import CSWin  # noqa: F401 (registers the models)
from training.build import has_batch_norm, make_optimizer
from training.muon import Muon, as_matrix, newton_schulz


@pytest.mark.parametrize("shape", [(16, 16), (16, 100), (3, 400)])
def test_the_product_is_close_to_the_orthogonal_matrix_of_the_svd(shape):
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1.0, 7.0, 1e4]
    ).view(-1, 1, 1)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    got = newton_schulz(matrices @ matrices.mT) @ matrices
    if shape[1] > shape[0]:  # of a square one the smallest singular values stay small
        assert torch.allclose(torch.linalg.svdvals(got), torch.ones(()), atol=0.1)
    cosine = (got * (u @ v)).sum((-2, -1)) / got.norm(dim=(-2, -1)) / shape[0] ** 0.5
    assert cosine.min() > (0.99 if shape[1] > shape[0] else 0.93)
    assert (newton_schulz(torch.zeros(2, 8, 8)) @ torch.zeros(2, 8, 9) == 0).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_are_those_of_timm(memory_format, monkeypatch):
    """timm's iterates on X itself, in bf16 unless told otherwise, one matrix after the other."""
    exact = timm.optim.muon.zeropower_via_newtonschulz
    monkeypatch.setattr(
        timm.optim.muon, "zeropower_via_newtonschulz", lambda *a, **k: exact(*a, **k, dtype=torch.float64)
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 16, 3, 3), (32, 16, 3, 3), (48, 32), (32, 64), (8, 100), (100, 8)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    ours = [w.to(memory_format=memory_format) if w.ndim == 4 else w for w in ours]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    groups = [{"params": ours[:3], "matrix": True}, {"params": ours[3:], "matrix": True, "lr": 0.02}]
    muon = Muon(groups, **settings)
    oracle = TimmMuon([{"params": theirs[:3]}, {"params": theirs[3:], "lr": 0.02}], nesterov=True, **settings)
    before = copy.deepcopy(ours)
    for _ in range(4):
        for own, other in zip(ours, theirs):
            own.grad = torch.randn(own.shape, generator=generator)
            other.grad = own.grad.clone()
        muon.step()
        oracle.step()
    for start, own, other in zip(before, ours, theirs):
        moved = (other - start).norm()
        assert (own - other).norm() < 1e-4 * moved and moved > 0


def test_what_is_no_matrix_is_trained_as_by_adamw():
    ours = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 3))]
    theirs = copy.deepcopy(ours)
    muon = Muon([{"params": ours}], 0.01, 0.1, betas=(0.8, 0.9), eps=1e-6)
    adamw = torch.optim.AdamW(theirs, 0.01, (0.8, 0.9), 1e-6, 0.1)
    for _ in range(5):
        for own, other in zip(ours, theirs):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        muon.step()
        adamw.step()
    for own, other in zip(ours, theirs):
        torch.testing.assert_close(own, other)


ADAMW = {  # beside vectors
    "resnet18": {"conv1.weight", "fc.weight"},
    "vit_tiny_patch16_224": {"patch_embed.proj.weight", "head.weight", "pos_embed", "cls_token"},
    "deit_tiny_distilled_patch16_224": {
        "patch_embed.proj.weight",
        "head.weight",
        "head_dist.weight",
        "pos_embed",
        "cls_token",
        "dist_token",
    },
    "swin_tiny_patch4_window7_224": {"patch_embed.proj.weight", "head.fc.weight"},
    "convnext_atto": {"stem.0.weight", "head.fc.weight"},
    "cswin_tiny": {"stage1_conv_embed.0.weight", "head.weight"},
}


@pytest.mark.parametrize("name", ADAMW)
def test_stem_head_embeddings_and_depthwise_convolutions_are_no_matrices(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, 0.05, matrices=True)
    assert sum(len(group["params"]) for group in groups) == len(names)
    rest = {}
    for group in groups:
        for parameter in group["params"]:
            if group["matrix"]:
                assert parameter.ndim in (2, 4) and min(parameter.shape[:2]) > 3 and group["weight_decay"] == 0.05
            elif parameter.ndim > 1:
                rest[names[id(parameter)]] = parameter
    depthwise = {key for key, weight in rest.items() if weight.ndim == 4 and weight.shape[1] == 1}
    tables = {key for key in rest if "relative_position_bias_table" in key}
    assert set(rest) - depthwise - tables == ADAMW[name]
    assert bool(depthwise) == (name in ("convnext_atto", "cswin_tiny")) and bool(tables) == name.startswith("swin")


def test_layers_decay_as_with_any_other_optimizer():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    scales = [
        {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        for groups in (param_groups(model, 0.05, 0.7), param_groups(model, 0.05, 0.7, matrices=True))
    ]
    assert scales[0] == scales[1] and len({scale for scale, _ in scales[0].values()}) > 10


@pytest.mark.parametrize("name, scale", [("resnet18", 0.1), ("vit_tiny_patch16_224", 1.0), ("convnext_atto", 1.0)])
def test_what_adamw_trains_learns_slower_where_there_is_batch_norm(name, scale):
    with torch.device("meta"):
        model = timm.create_model(name)
    for given, right in ((None, scale), (0.5, 0.5)):
        groups = make_optimizer(Config(opt="muon", fallback_lr_scale=given), model).param_groups
        assert {group["matrix"]: group["lr_scale"] for group in groups} == {True: 1.0, False: right}


def test_a_probe_s_batch_norm_is_not_the_body_s():
    model = timm.create_model("test_vit")
    model.head = nn.Sequential(nn.BatchNorm1d(64, affine=False), nn.Linear(64, 3))
    assert not has_batch_norm(model) and has_batch_norm(timm.create_model("test_resnet"))


def test_a_convolution_is_seen_as_a_matrix_without_a_copy():
    for weight in (torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)):
        matrix = as_matrix(weight)
        assert matrix.shape == (8, 36) and matrix.data_ptr() == weight.data_ptr()
        assert torch.equal(matrix.sort().values, weight.flatten(1).sort().values)


def test_a_run_with_muon_resumes_to_the_same_weights(train):
    settings = {"opt": "muon", "model_ema": True, "save_interval": "3 steps"}
    whole = train("whole", **settings)
    train("stopped", stop_after="7 steps", **settings)
    assert same(train("stopped", **settings).result()["state"], whole.result()["state"])
    assert whole.state()["optimizer"]["param_groups"][0]["momentum"] == 0.95  # unless it is stated


def test_a_momentum_that_was_not_stated_is_no_change(train, main_program, folder, tmp_path, capsys):
    """Earlier checkpoints hold the number that was the default."""
    train("sgd", opt="sgd", stop_after="3 steps")
    train("sgd", opt="sgd", momentum=0.9)
    train("muon", opt="muon", stop_after="3 steps")
    command = flags(output_dir=tmp_path / "muon", data_path=folder, opt="muon", momentum=0.9)
    assert main_program(command) == 2
    assert "momentum was 0.95 and is 0.9" in capsys.readouterr().err
