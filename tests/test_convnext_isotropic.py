"""Isotropic ConvNeXt: against a plain re-implementation over the authors' key names, and the published sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import load_weights
from models.formats import to_official
from models.layer_decay import layer_ids

SMALL = {"dim": 8, "depth": 3, "num_classes": 5}


def small(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("convnext_isotropic_small", **{**SMALL, **kwargs}).eval()
    for parameter in model.parameters():  # no zeros and ones: every tensor must matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def by_hand(state, x, depth):
    """The published architecture over a state dict in the authors' names; x (B, 3, H, W)."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = F.conv2d(x, state["stem.weight"], state["stem.bias"], stride=16)
    for k in range(depth):
        b = f"blocks.{k}"
        y = F.conv2d(x, state[f"{b}.dwconv.weight"], state[f"{b}.dwconv.bias"], padding=3, groups=x.shape[1])
        y = linear(f"{b}.pwconv2", F.gelu(linear(f"{b}.pwconv1", norm(f"{b}.norm", y.permute(0, 2, 3, 1)))))
        x = x + state.get(f"{b}.gamma", torch.ones(x.shape[1]))[:, None, None] * y.permute(0, 3, 1, 2)
    return linear("head", norm("norm", x.mean((2, 3))))


@pytest.mark.parametrize("gamma", [None, 1e-6])
def test_equals_a_plain_implementation_in_the_authors_names(gamma, tmp_path):
    model, x = small(ls_init_value=gamma), torch.randn(2, 3, 96, 64)
    layout, state = to_official(model.state_dict())
    assert layout.name == "isotropic ConvNeXt (authors')" and ("blocks.0.gamma" in state) == (gamma is not None)
    torch.testing.assert_close(model(x), by_hand(state, x, 3), atol=1e-5, rtol=1e-5)
    torch.save({"model": state}, tmp_path / "x.pth")
    again = timm.create_model("convnext_isotropic_small", ls_init_value=gamma, **SMALL).eval()
    assert load_weights(again, tmp_path / "x.pth").layout == layout.name
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("size, millions, giga", [("small", 22, 4.3), ("base", 87, 16.9), ("large", 306, 59.7)])
def test_published_parameters_and_multiply_adds(size, millions, giga):
    """Table 2 of the paper."""
    with torch.device("meta"):
        model = timm.create_model(f"convnext_isotropic_{size}").eval()
        with FlopCounterMode(display=False) as flops:
            model(torch.zeros(1, 3, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert round(flops.get_total_flops() / 2e9, 1) == giga


def test_conventions():
    model, x = small(drop_path_rate=0.4), torch.randn(2, 3, 64, 64)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0, 0.2, 0.4])
    assert torch.equal(model.get_classifier()(model.forward_head(model.forward_features(x), pre_logits=True)), model(x))
    ids = layer_ids(model)
    assert [ids[f"{n}.weight"] for n in ("stem", "blocks.0.norm", "blocks.2.mlp.fc2", "norm", "head")] == [
        0,
        1,
        3,
        4,
        4,
    ]
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 4, 4, 8)
    gradients = []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
