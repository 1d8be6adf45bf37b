"""CSWin: the reference's logits and key lists, timm's conventions, any multiple of 32."""

import pytest
import timm
import torch
from reference import filled, golden, logit_error, official_shapes

import models.cswin  # noqa: F401 (registers the models)

SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "num_classes": 5}
extended = pytest.mark.extended


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("cswin_tiny", **{**SMALL, **kwargs})


def golden_model(name, reference):
    with torch.device("meta"):
        model = timm.create_model(name)
    model.load_state_dict(filled(official_shapes(reference)), assign=True)
    return model


@pytest.mark.parametrize(
    "name, reference, sizes",
    [
        ("cswin_tiny", "CSWin_64_12211_tiny_224", (224, 160, 96)),
        pytest.param("cswin_small", "CSWin_64_24322_small_224", (224, 96), marks=extended),
        pytest.param("cswin_base", "CSWin_96_24322_base_224", (224, 96), marks=extended),
        pytest.param("cswin_base_384", "CSWin_96_24322_base_384", (384,), marks=extended),
        pytest.param("cswin_large", "CSWin_144_24322_large_224", (224,), marks=extended),
        pytest.param("cswin_large_384", "CSWin_144_24322_large_384", (384,), marks=extended),
    ],
)
def test_golden_logits(name, reference, sizes):
    model = golden_model(name, reference)
    assert max(logit_error(model, reference, size) for size in sizes) < 1e-5


def test_golden_logits_notice_another_stripe():
    model = golden_model("cswin_tiny", "CSWin_64_12211_tiny_224")
    model.stage2[0].stripe = 4
    assert logit_error(model, "CSWin_64_12211_tiny_224", 96) > 1e-2


@pytest.mark.parametrize(
    "name, reference",
    [
        ("cswin_tiny", "CSWin_64_12211_tiny_224"),
        ("cswin_small", "CSWin_64_24322_small_224"),
        ("cswin_base", "CSWin_96_24322_base_224"),
        ("cswin_base_384", "CSWin_96_24322_base_384"),
        ("cswin_large", "CSWin_144_24322_large_224"),
        ("cswin_large_384", "CSWin_144_24322_large_384"),
    ],
)
def test_keys_and_parameters(name, reference):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == official_shapes(reference)
    expected = golden("state_dicts")[reference.replace("_384", "_224")]["n_params"]
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.img_size == ((384, 384) if name.endswith("384") else (224, 224))
    assert model.pretrained_cfg["input_size"] == (3, *model.img_size)


def test_features_at_every_stride():
    net = timm.create_model("cswin_tiny", features_only=True, **SMALL)
    assert net.feature_info.channels() == [16, 32, 64, 128]
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(f.shape) for f in net(torch.randn(2, 3, 64, 96))] == [
        (2, 16, 16, 24),
        (2, 32, 8, 12),
        (2, 64, 4, 6),
        (2, 128, 2, 3),
    ]
    first = timm.create_model("cswin_tiny", features_only=True, out_indices=(1,), **SMALL)
    assert [tuple(f.shape) for f in first(torch.randn(1, 3, 64, 64))] == [(1, 32, 8, 8)]
    assert not any(key.startswith(("stage3", "head", "model.stage3", "model.head")) for key in first.state_dict())


def test_intermediates_are_those_of_the_forward_pass():
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    last, maps = model.forward_intermediates(x, indices=[0, 3], norm=True)
    assert torch.equal(maps[1].permute(0, 2, 3, 1), model.forward_features(x))
    assert len(maps) == 2 and last.shape == maps[1].shape
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, 128) and torch.equal(model.get_classifier()(pooled), model(x))


def test_new_classifier():
    model = small().train()
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.head.weight.std() < 0.03 and not model.head.bias.any()
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 2, 2, 128)
    with pytest.raises(ValueError, match="global_pool='max'"):
        model.reset_classifier(3, "max")


def test_checkpointing_gives_the_same_gradients():
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_channels_last_and_autocast():
    model, x = small().eval(), torch.randn(2, 3, 96, 96)
    expected = model(x)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max() + 0.01


def test_sizes():
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(img_size=(96, 96))
    assert model.img_size == (96, 96)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for size in (144, (64, 80), 16):
        with pytest.raises(ValueError, match="multiples of 32, for example"):
            model.set_input_size(img_size=size)
    assert model.img_size == (96, 96)
    with pytest.raises(ValueError, match="input size 144 x 144"):
        model(torch.randn(1, 3, 144, 144))


def test_stripes_are_local():
    """A change in one corner reaches, after the first block, only the stripes and 3 x 3 neighbours it should."""
    model, x = small().eval(), torch.randn(1, 3, 64, 64)
    y = x.clone()
    y[..., :4, :4] += 1
    with torch.no_grad():
        moved = (model.stage(0, x) != model.stage(0, y)).any(1)[0]
    # The stem's 7 x 7 kernel spreads the corner over 2 x 2 tokens: two rows and two columns of 16 follow.
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[:2] = expected[:, :2] = True
    assert torch.equal(moved, expected)


def test_drop_path_grows_linearly():
    model = small(drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in (1, 2, 3, 4) for b in getattr(model, f"stage{s}")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
