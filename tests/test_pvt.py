"""PVT v1: against a plain re-implementation over the authors' key names, and timm's conventions."""

import cv2
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import models.pvt  # noqa: F401 (registers the models)

SMALL = {"embed_dims": (8, 16, 20, 32), "num_heads": (1, 2, 5, 8), "depths": (1, 2, 1, 2), "num_classes": 5}


def small(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model("pvt_tiny", **{**SMALL, **kwargs})
    for parameter in model.parameters():  # no zeros and ones: every tensor must matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def by_hand(state, x, depths, heads, reductions=(8, 4, 2, 1)):
    """The published architecture written over a state dict: no modules, explicit loops over images and heads."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def patches(name, x, size):
        """A convolution of that size and stride as a linear layer over unfolded patches; x (C, H, W) -> (N, D)."""
        weight = state[f"{name}.weight"]
        return F.unfold(x[None], size, stride=size)[0].T @ weight.flatten(1).T + state[f"{name}.bias"]

    def attention(name, x, grid, heads, reduction):
        q, source = linear(f"{name}.q", x), x
        if reduction > 1:
            source = patches(f"{name}.sr", x.T.reshape(-1, *grid), reduction)
            source = norm(f"{name}.norm", source, 1e-5)
        k, v = linear(f"{name}.kv", source).chunk(2, dim=-1)
        width = x.shape[-1] // heads
        mixed = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            mixed.append(torch.softmax(q[:, part] @ k[:, part].T / width**0.5, dim=-1) @ v[:, part])
        return linear(f"{name}.proj", torch.cat(mixed, dim=-1))

    logits = []
    for img in x:
        for stage in range(4):
            patch = 2 if stage else 4
            grid = img.shape[1] // patch, img.shape[2] // patch
            tokens = patches(f"patch_embed{stage + 1}.proj", img, patch)
            tokens = norm(f"patch_embed{stage + 1}.norm", tokens, 1e-5)
            if stage == 3:
                tokens = torch.cat([state["cls_token"][0], tokens])
            tokens = tokens + state[f"pos_embed{stage + 1}"][0]
            for k in range(depths[stage]):
                b = f"block{stage + 1}.{k}"
                tokens = tokens + attention(
                    f"{b}.attn", norm(f"{b}.norm1", tokens, 1e-6), grid, heads[stage], reductions[stage]
                )
                hidden = F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", tokens, 1e-6)))
                tokens = tokens + linear(f"{b}.mlp.fc2", hidden)
            if stage < 3:
                img = tokens.T.reshape(-1, *grid)
        logits.append(linear("head", norm("norm", tokens, 1e-6)[0]))
    return torch.stack(logits)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_equals_a_plain_implementation(size):
    """In float64, so that the two epsilons of the norms count too."""
    model, x = small(img_size=size).double(), torch.randn(2, 3, *size).double()
    with torch.no_grad():
        expected = by_hand(model.state_dict(), x, SMALL["depths"], SMALL["num_heads"])
        torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=0)
        wrong = by_hand(model.state_dict(), x, SMALL["depths"], (1, 4, 5, 8))
        assert (wrong - expected).abs().max() > 1e-4
        model.norm.eps = 1e-5
        assert (model(x) - expected).abs().max() > 1e-8


@pytest.mark.parametrize(
    "name, millions, giga",
    [("pvt_tiny", 13.2, 1.9), ("pvt_small", 24.5, 3.8), ("pvt_medium", 44.2, 6.7), ("pvt_large", 61.4, 9.8)],
)
def test_published_parameters_and_multiply_adds(name, millions, giga):
    """Table 1 and section 4.1 of the paper."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as flops:
            model(torch.zeros(1, 3, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert round(flops.get_total_flops() / 2e9, 1) == giga


def test_key_names_are_the_authors():
    shapes = {key: tuple(value.shape) for key, value in timm.create_model("pvt_tiny").state_dict().items()}
    expected = {
        "cls_token": (1, 1, 512),
        "pos_embed1": (1, 3136, 64),
        "pos_embed2": (1, 784, 128),
        "pos_embed3": (1, 196, 320),
        "pos_embed4": (1, 50, 512),
        "patch_embed1.proj.weight": (64, 3, 4, 4),
        "patch_embed4.proj.weight": (512, 320, 2, 2),
        "patch_embed4.norm.bias": (512,),
        "block1.0.attn.q.weight": (64, 64),
        "block1.0.attn.kv.bias": (128,),
        "block1.1.attn.sr.weight": (64, 64, 8, 8),
        "block1.1.attn.norm.weight": (64,),
        "block3.0.attn.sr.bias": (320,),
        "block2.1.mlp.fc1.weight": (1024, 128),
        "block4.1.mlp.fc2.weight": (512, 2048),
        "block4.0.norm2.weight": (512,),
        "norm.weight": (512,),
        "head.bias": (1000,),
    }
    assert {key: shapes[key] for key in expected} == expected
    assert "block4.0.attn.sr.weight" not in shapes
    assert {key.split(".")[0].rstrip("1234") for key in shapes} == {
        "cls_token", "pos_embed", "patch_embed", "block", "norm", "head"
    }  # fmt: skip


def cv2_resize(table, prefix, old, new):
    """The same resize by OpenCV, whose INTER_LINEAR is bilinear with half-pixel centres and no antialiasing."""
    grid = table[0, prefix:].reshape(old, old, -1).numpy()
    planes = [cv2.resize(grid[:, :, c], (new, new), interpolation=cv2.INTER_LINEAR) for c in range(grid.shape[2])]
    moved = torch.from_numpy(cv2.merge(planes)).reshape(1, new * new, -1)
    return torch.cat([table[:, :prefix], moved], dim=1)


def test_another_size_interpolates_the_positions():
    """In the forward pass and by set_input_size: the same logits, and the values OpenCV finds."""
    model, x = small(img_size=64), torch.randn(2, 3, 96, 96)
    before = {i: getattr(model, f"pos_embed{i}").detach().clone() for i in (1, 2, 3, 4)}
    on_the_fly = model(x)
    model.set_input_size(img_size=(96, 96))
    torch.testing.assert_close(model(x), on_the_fly, atol=1e-6, rtol=0)
    for i in (1, 2, 3, 4):
        expected = cv2_resize(before[i], int(i == 4), 64 // (2 * 2**i), 96 // (2 * 2**i))
        torch.testing.assert_close(getattr(model, f"pos_embed{i}").data, expected, atol=1e-6, rtol=0)
    model.pos_embed1.data.zero_()
    assert (model(x) - on_the_fly).abs().max() > 1e-3


def test_sizes_are_multiples_of_32():
    model = small(img_size=64)
    for size in (80, (64, 48), 0):
        with pytest.raises(ValueError, match="multiples of 32, for example"):
            model.set_input_size(img_size=size)
    with pytest.raises(ValueError, match="input size 48 x 64"):
        model(torch.randn(1, 3, 48, 64))
    with pytest.raises(ValueError, match="input size 100 x 100"):
        timm.create_model("pvt_tiny", img_size=100)


def test_features_and_heads():
    net = timm.create_model("pvt_tiny", features_only=True, out_indices=(0, 3), img_size=64, **SMALL)
    assert [tuple(f.shape) for f in net(torch.randn(1, 3, 96, 64))] == [(1, 8, 24, 16), (1, 32, 3, 2)]
    model, x = small(img_size=64), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 5, 32)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
    maps = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(maps[0].flatten(2).transpose(1, 2), features[:, 1:])
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 1:].mean(1))
    assert model(x).shape == (2, 3)


def test_checkpointing_gives_the_same_gradients():
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = small(img_size=64).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast_and_drop_path():
    model, x = small(img_size=64), torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max() + 0.02
    model = small(drop_path_rate=0.5)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in (1, 2, 3, 4) for b in getattr(model, f"block{s}")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
