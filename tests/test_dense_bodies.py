"""Bodies: the detection papers' Swin against a direct oracle, and every family's maps at images of any size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer

from curriculum.skeleton import Skeleton
from dense.backbones import make_body

OBLONG = [(200, 304), (256, 320), (100, 60), (320, 200), (480, 736)]
SIZES = [(224, 224), (8, 8), *OBLONG]


def oracle_attention(attn, tokens, same):
    """Attention of one window: (49, C), and (49, 49), whether two tokens see each other."""
    area, width = tokens.shape
    queries, keys, values = attn.qkv(tokens).view(area, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    side = attn.window_size[0]
    row, column = torch.arange(area) // side, torch.arange(area) % side
    place = (row[:, None] - row + side - 1) * (2 * side - 1) + column[:, None] - column + side - 1
    bias = attn.relative_position_bias_table[place].permute(2, 0, 1)
    logits = queries @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5 + bias + (~same).float() * -100
    return attn.proj((logits.softmax(-1) @ values).transpose(0, 1).reshape(area, width))


def oracle_block(block, x, shift, window=7):
    """One block of Swin on a map (H, W, C): pad it to whole windows, roll it, then each window by itself."""
    height, width, _ = x.shape
    normed = F.pad(block.norm1(x), (0, 0, 0, -width % window, 0, -height % window))
    H, W, _ = normed.shape
    rolled = torch.zeros_like(normed)
    region = torch.zeros(H, W, dtype=torch.long)  # where a token came from, as far as the roll can mix places
    for i in range(H):
        for j in range(W):
            rolled[i, j] = normed[(i + shift) % H, (j + shift) % W]
            at = [(k >= n - window) + (k >= n - shift) if shift else 0 for k, n in ((i, H), (j, W))]
            region[i, j] = 3 * at[0] + at[1]
    out = torch.zeros_like(normed)
    for i in range(0, H, window):
        for j in range(0, W, window):
            tokens = rolled[i : i + window, j : j + window].reshape(window * window, -1)
            part = region[i : i + window, j : j + window].reshape(-1)
            result = oracle_attention(block.attn, tokens, part[:, None] == part)
            for k, value in enumerate(result):
                out[(i + k // window + shift) % H, (j + k % window + shift) % W] = value
    x = x + out[:height, :width]
    return x + block.mlp(block.norm2(x))


def oracle_merge(down, x):
    x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
    return down.reduction(down.norm(torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)))


@torch.no_grad()
def oracle_maps(model, image):
    """The four maps (C, h, w) of one image (3, H, W), written from the paper's figures."""
    x = model.patch_embed.norm(model.patch_embed.proj(image[None])[0].permute(1, 2, 0))
    maps = []
    for stage in model.layers:
        if hasattr(stage.downsample, "reduction"):
            x = oracle_merge(stage.downsample, x)
        for place, block in enumerate(stage.blocks):
            x = oracle_block(block, x, 3 if place % 2 else 0)
        maps.append(x.permute(2, 0, 1))
    return maps


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    options = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
    body = make_body("swin_tiny", **options).eval()
    with torch.no_grad():
        for parameter in body.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)  # so that attention counts: at 0.02 it hardly changes what passes by it
            else:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return body, options


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_swin_is_the_one_of_the_detection_papers_and_timms_is_not(swin, size):
    body, options = swin
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = oracle_maps(body.model, image[0])
    with torch.no_grad():
        raw = body.model.forward_intermediates(image, body.indices, intermediates_only=True)
        found = body(image)
    for level, (map_, right) in enumerate(zip(raw, expected)):
        assert relative(map_[0], right) < 1e-5, level
    for map_, right, norm in zip(found, expected, body.norms.values()):
        assert relative(map_, norm(right[None])) < 1e-5
    timms = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, num_classes=1, **options).eval()
    assert type(timms) is SwinTransformer
    timms.load_state_dict({**timms.state_dict(), **body.model.state_dict()})
    with torch.no_grad():
        others = timms.forward_intermediates(image, body.indices, intermediates_only=True)
    wrong = [relative(map_[0], right) for map_, right in zip(others, expected)]
    # timm never shifts the last stage: 15 % off at 224, where the others agree. At sizes that are not made of whole
    # windows it also rolls before it pads, so that the error grows from stage to stage, to 14-20 %.
    if size in OBLONG:
        assert wrong == sorted(wrong) and wrong[0] > 3e-3 and wrong[-1] > 0.1
    elif size == (224, 224):
        assert max(wrong[:3]) < 1e-5 and wrong[-1] > 0.1
    else:
        assert min(wrong[:3]) > 1e-3 and wrong[-1] > 0.02


FAMILIES = {
    "swin_tiny": (4, 8, 16, 32),
    "convnext_tiny": (4, 8, 16, 32),
    "pvt_tiny": (4, 8, 16, 32),
    "cswin_tiny": (4, 8, 16, 32),
    "caformer_s18": (4, 8, 16, 32),
    "resnet18": (4, 8, 16, 32),
    "deit_tiny": (16, 16, 16, 16),
    "efficientnet_b0": (4, 8, 16, 32),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_have_the_strides_they_claim_at_any_size(name):
    with torch.device("meta"), Skeleton():
        body = make_body(name)
        for height, width in ((224, 224), (200, 304), (37, 70)):
            maps = body(torch.zeros(2, 3, height, width))
            assert body.strides == FAMILIES[name]
            for x, channels, stride in zip(maps, body.channels, body.strides):
                assert x.shape[:2] == (2, channels)
                # Padded at the end to what the model needs: never less than the image, never a whole multiple more.
                for pixels, cells in zip((height, width), x.shape[-2:]):
                    padded = -(-pixels // body.multiple) * body.multiple
                    assert -(-pixels // stride) <= cells <= -(-padded // stride)


def test_padding_never_changes_what_a_convnet_makes_of_an_image_of_whole_strides():
    torch.manual_seed(0)
    body = make_body("convnext_atto").eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for cut, whole in zip(body(image[..., :90]), body(F.pad(image[..., :90], (0, 6)))):
            torch.testing.assert_close(cut, whole)


def test_a_vit_gives_four_blocks_without_norm_or_a_pyramid_of_the_last():
    body = make_body("deit_tiny").eval()
    assert body.indices == [2, 5, 8, 11]
    seen = []
    hooks = [body.model.blocks[place].register_forward_hook(lambda m, i, o: seen.append(o)) for place in body.indices]
    with torch.no_grad():
        maps = body(torch.randn(1, 3, 64, 96))
    for hook in hooks:
        hook.remove()
    for tokens, x in zip(seen, maps):
        assert torch.equal(tokens[:, 1:].transpose(1, 2).view(1, 192, 4, 6), x)
    with torch.device("meta"), Skeleton():
        pyramid = make_body("deit_tiny", pyramid=True)
        shapes = [tuple(x.shape[-2:]) for x in pyramid(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(16, 24), (8, 12), (4, 6), (2, 3)] and pyramid.strides == (4, 8, 16, 32)


def test_batch_norm_keeps_its_statistics_and_has_no_norms_after_it():
    body = make_body("resnet18").train()
    before = body.model.bn1.running_mean.clone()
    body(torch.randn(2, 3, 64, 64) + 5)
    assert torch.equal(body.model.bn1.running_mean, before)
    assert not list(body.norms.parameters()) and body.model.bn1.weight.requires_grad


def own_pyramid(num_classes=1, drop_path_rate=0.0):
    return timm.create_model("convnext_atto", num_classes=num_classes, drop_path_rate=drop_path_rate)


def own_without_maps(num_classes=1):
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, num_classes))


def test_ones_own_model_is_a_body_if_it_gives_maps():
    body = make_body(f"{__name__}:own_pyramid", drop_path=0.1)
    assert [tuple(x.shape[-2:]) for x in body(torch.randn(1, 3, 64, 64))] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    with pytest.raises(ValueError, match="own_without_maps: Sequential gives no feature maps: it lacks feature_info"):
        make_body(f"{__name__}:own_without_maps")
    with pytest.raises(ValueError, match="its feature maps have strides 2, 4, 8, 16, 32, but 64 is needed too"):
        make_body("resnet18", strides=(4, 64))


def test_layers_and_weight_decay_follow_the_body():
    from dense.upernet import upernet
    from models import param_groups

    with torch.device("meta"), Skeleton():
        model = upernet(make_body("convnext_tiny"), 5, 32, 16)
    # ConvNeXt's detection code has 6 layers for the tiny model, and the rest is one more.
    layers = {"body.model.stem.0.weight": 0, "body.model.stages.0.blocks.0.conv_dw.weight": 1}
    layers |= {"body.model.stages.2.blocks.8.conv_dw.weight": 5, "body.model.stages.3.blocks.0.conv_dw.weight": 6}
    layers |= {"body.norms.0.weight": 7, "head.fuse.0.weight": 7}
    for name, layer in layers.items():
        assert model.layer_id(name) == layer, name
    scales = {group["lr_scale"] for group in param_groups(model, 0.05, 0.7)}
    assert min(scales) == pytest.approx(0.7**7) and max(scales) == 1
    with torch.device("meta"), Skeleton():
        model = upernet(make_body("swin_tiny"), 5, 32, 16)
    decayed = {id(p) for group in param_groups(model, 0.05) if group["weight_decay"] for p in group["params"]}
    named = dict(model.named_parameters())
    assert id(named["head.fuse.0.weight"]) in decayed
    assert id(named["body.model.layers.0.blocks.0.attn.relative_position_bias_table"]) not in decayed
