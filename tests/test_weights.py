"""Weights in and out: every code base's names, sizes, heads and files; what does not fit; files that lie."""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import checkpoint_fields
from huggingface_hub.utils import EntryNotFoundError
from reference import filled, golden, logit_error, official_shapes
from safetensors.torch import save_file
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from models import checkpoints, create_model, load_weights
from models.export import main as export
from models.formats import to_official
from models.reading import _allowing, read_weights

extended = pytest.mark.extended
GOLDEN = {  # the reference's name: ours
    "resnet50": "resnet50",
    "convnext_tiny": "convnext_tiny",
    "convnext_small": "convnext_small",
    "convnext_base": "convnext_base",
    "deit_tiny_patch16_224": "deit_tiny",
    "deit_small_patch16_224": "deit_small",
    "swin_tiny": "swin_tiny",
    "swin_small": "swin_small",
    "swin_base": "swin_base",
    "CSWin_64_12211_tiny_224": "cswin_tiny",
    "caformer_s18": "caformer_s18",
    "caformer_s36": "caformer_s36",
    "caformer_m36": "caformer_m36",
}
QUICK = [
    ("resnet50", 96),
    ("convnext_tiny", 160),
    ("deit_tiny_patch16_224", 96),
    ("swin_tiny", 96),
    ("CSWin_64_12211_tiny_224", 96),
    ("caformer_s18", 160),
]
ALL = [(name, int(size)) for name in GOLDEN for size in golden("forward")["models"][name]]
DEIT = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def official_state(name, size):
    return filled(official_shapes(name, size if name.startswith(("deit", "swin")) else None))


def saved(path, content):
    torch.save(content, path)
    return path


def ours(path, model, ema=None):
    checkpoints.save(path, checkpoint_fields(model=model, model_ema=ema, step=1))


def deit(**kwargs):
    torch.manual_seed(kwargs.pop("seed", 0))
    return timm.create_model("deit_tiny_patch16_224", **{**DEIT, **kwargs}).eval()


def swin(**kwargs):
    torch.manual_seed(0)
    small = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2), "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", **{**small, **kwargs}).eval()


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", QUICK + [pytest.param(*c, marks=extended) for c in ALL if c not in QUICK])
def test_golden_logits_and_the_way_back(name, size, tmp_path):
    """The authors' names in, the reference's logits, the same names and tensors out, the same logits again."""
    state = official_state(name, size)
    source = saved(tmp_path / "a.pth", {"model": state})
    model = create_model(GOLDEN[name], input_size=size)
    report = load_weights(model, source)
    assert logit_error(model, name, size) < 1e-4
    assert not report.random and not report.resized
    made = {key for key in state if key.endswith(("relative_position_index", "attn_mask"))}
    assert set(report.dropped) == made
    assert len(report.loaded) == len(state) - len(made)

    _, official = to_official(model.state_dict())
    assert {k: tuple(v.shape) for k, v in official.items()} == {k: tuple(v.shape) for k, v in state.items()}
    assert all(torch.equal(official[key], state[key]) for key in state if key not in made)
    assert all(official[key].dtype == state[key].dtype for key in state)

    saved(source, {"model": official})
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, source)
    assert logit_error(model, name, size) < 1e-4


@pytest.mark.parametrize("size", [96, 224])
def test_swin_buffers_are_those_of_the_model(size):
    """timm computes the same indices and masks; the authors keep them in the state dict."""
    model = create_model("swin_tiny", input_size=size)
    _, official = to_official(model.state_dict())
    checked = 0
    for name, buffer in model.named_buffers():
        if name.endswith("relative_position_index") or buffer.ndim == 3:
            torch.testing.assert_close(official[name], buffer, atol=0, rtol=0)
            checked += 1
    assert checked == 12 + 5


def test_torchvision_convnext(tmp_path):
    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 1)]
    theirs = torchvision.models.ConvNeXt(settings, num_classes=5).eval()
    ours = timm.create_model("convnext_tiny", dims=(8, 16, 24, 32), depths=(2, 1, 2, 1), num_classes=5).eval()
    same_logits(theirs, ours, tmp_path, 64, "ConvNeXt (torchvision)")


def test_torchvision_swin(tmp_path):
    theirs = torchvision.models.SwinTransformer([4, 4], 8, [2, 1, 1, 2], [1, 2, 2, 4], [2, 2], num_classes=5).eval()
    ours = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64, window_size=2, embed_dim=8, depths=(2, 1, 1, 2), num_heads=(1, 2, 2, 4), num_classes=5,
    ).eval()  # fmt: skip
    same_logits(theirs, ours, tmp_path, 64, "Swin (torchvision)")


def test_torchvision_vit(tmp_path):
    theirs = torchvision.models.VisionTransformer(64, 16, 2, 2, 24, 96, num_classes=5).eval()
    same_logits(theirs, deit(), tmp_path, 64, "ViT (torchvision)")


def same_logits(theirs, ours, folder, size, layout):
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    report = load_weights(ours, saved(folder / "tv.pth", theirs.state_dict()))
    x = torch.randn(2, 3, size, size)
    assert report.layout == layout and not report.random
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_mae_pretraining(tmp_path):
    """The decoder is dropped; a model that averages tokens has a norm that the encoder has not."""
    state = deit(num_classes=0, seed=1).state_dict()
    extra = {
        "mask_token": torch.ones(1, 1, 24),
        "decoder_embed.weight": torch.ones(8, 24),
        "decoder_norm.bias": torch.ones(8),
    }
    source = saved(tmp_path / "mae.pth", {"model": {**state, **extra}, "args": argparse.Namespace(model="mae")})

    token = deit()
    report = load_weights(token, source)
    assert (report.layout, sorted(report.dropped)) == ("MAE pre-training (authors')", sorted(extra))
    assert report.random == ["head.weight", "head.bias"] and torch.equal(token.norm.weight, state["norm.weight"])

    average = deit(global_pool="avg")
    report = load_weights(average, source)
    assert sorted(report.dropped) == sorted([*extra, "norm.weight", "norm.bias"])
    assert sorted(report.random) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]

    finetuned = saved(tmp_path / "ft.pth", {"model": average.state_dict()})
    assert not load_weights(deit(global_pool="avg"), finetuned).random
    with pytest.raises(ValueError, match=r"lacks: 2 \(norm.weight, norm.bias\); that the model lacks: 2 \(fc_norm"):
        load_weights(deit(), finetuned)


# Files ---------------------------------------------------------------------------------------------------------------


def test_release_checkpoint(tmp_path):
    """As the release's main_buffer.py saves: Namespace, NumPy scalars in the optimizer, wrapper prefixes, an EMA."""
    raw, ema = deit(seed=1), deit(seed=2)
    content = {
        "model": {f"module.{k}": v for k, v in raw.state_dict().items()},
        "model_ema": {f"module._orig_mod.{k}": v for k, v in ema.state_dict().items()},
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3)}},
            "param_groups": [{"lr": np.float64(4e-3), "n": np.int64(3)}],
        },
        "scaler": {"scale": 65536.0},
        "epoch": 3,
        "args": argparse.Namespace(lr=4e-3, model="deit_tiny", device="cuda"),
    }
    source = saved(tmp_path / "checkpoint-3.pth", content)
    with pytest.raises(Exception, match="numpy"), _allowing([argparse.Namespace]):
        torch.load(source, weights_only=True)  # what the scalars do to a stricter reader
    modules = [b"numpy._core.multiarray", b"numpy.core.multiarray"]  # since NumPy 2, and before
    other = rewrite(source, tmp_path / "other.pth", *(modules if np.__version__ >= "2" else modules[::-1]))
    x = torch.randn(1, 3, 64, 64)
    for path in (source, other):
        model = deit()
        report = load_weights(model, path)
        assert report.key == "model" and report.others == ["model_ema"] and len(report.loaded) == len(raw.state_dict())
        assert torch.equal(model(x), raw(x))
        assert load_weights(model, path, key="model_ema").others == ["model"]
        assert torch.equal(model(x), ema(x))
    content = read_weights(source)
    assert content["args"].device == "cuda" and not isinstance(
        content["optimizer"]["param_groups"][0]["lr"], np.generic
    )


def test_older_torch(tmp_path, monkeypatch):
    """torch 2.4 has neither safe_globals nor the list of what a file asks for."""
    if not hasattr(torch.serialization, "safe_globals"):
        pytest.skip("this is such a torch")
    before = set(torch.serialization.get_safe_globals())
    monkeypatch.delattr(torch.serialization, "safe_globals")
    monkeypatch.delattr(torch.serialization, "get_unsafe_globals_in_checkpoint", raising=False)
    content = {"model": deit(seed=1).state_dict(), "args": argparse.Namespace(lr=np.float64(1))}
    assert not load_weights(deit(), saved(tmp_path / "x.pth", content)).random
    with pytest.raises(ValueError, match=r"refused, it asks for pathlib\S+Path; only"):
        load_weights(deit(), saved(tmp_path / "x.pth", {**content, "more": Path("/")}))
    assert set(torch.serialization.get_safe_globals()) == before


def rewrite(source, target, old, new):
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for entry in archive.infolist():
            data = archive.read(entry)
            assert entry.filename.endswith("data.pkl") <= (old in data)
            out.writestr(entry.filename, data.replace(old, new) if entry.filename.endswith("data.pkl") else data)
    return target


def test_our_own_checkpoint_is_verified(tmp_path):
    model = deit(seed=1)
    path = tmp_path / "checkpoint-last.pth"
    ours(path, model.state_dict())
    report = load_weights(deit(), path)
    assert report.key == "model" and not report.others
    with pytest.raises(ValueError, match="no weights under 'model_ema'; it has "):
        load_weights(deit(), path, key="model_ema")
    data = bytearray(path.read_bytes())
    where = data.index(model.state_dict()["blocks.0.mlp.fc1.weight"].numpy().tobytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_weights(deit(), path)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {"state_dict_ema": s}]
)
def test_containers(tmp_path, wrap):
    model = deit(seed=1)
    load_weights(other := deit(), saved(tmp_path / "x.bin", wrap(model.state_dict())))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_the_file_name_says_nothing(tmp_path):
    model = deit(seed=1)
    save_file(model.state_dict(), tmp_path / "a.pth")
    saved(tmp_path / "b.safetensors", model.state_dict())
    torch.save(model.state_dict(), tmp_path / "swin_tiny.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.safetensors", "swin_tiny.pth"):
        load_weights(other := deit(), tmp_path / name)
        assert torch.equal(other.head.weight, model.head.weight)


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_MARK']}",)


@pytest.mark.parametrize("where", ["zip", "pickle", "legacy", "state", "getattr"])
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, where):
    mark, path = tmp_path / "mark", tmp_path / "x.pth"
    monkeypatch.setenv("EVIL_MARK", str(mark))
    state = deit(seed=1).state_dict()
    if where == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif where == "getattr":
        path.write_bytes(b"\x80\x02cbuiltins\neval\nX\x05\x00\x00\x001 + 1\x85R.")
    else:
        content = {**state, "x": Evil()} if where == "state" else {"model": state, "args": argparse.Namespace(x=Evil())}
        torch.save(content, path, _use_new_zipfile_serialization=where != "legacy")
    model = deit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"refused, it asks for (posix\.system|(builtins\.)?eval|something .*); only"
    ) as error:
        load_weights(model, path)
    assert "\n" not in str(error.value) and not mark.exists()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if where != "getattr":
        pickle.loads(pickle.dumps(Evil()))
        assert mark.exists()  # the weapon works


@pytest.mark.parametrize("thing", [np.arange(3), {1, 2}, torch.nn.Linear(2, 2), Path("/")])
def test_other_objects_are_refused(tmp_path, thing):
    source = saved(tmp_path / "x.pth", {"model": deit().state_dict(), "more": thing})
    if isinstance(thing, set):
        load_weights(deit(), source)  # a plain Python value
        return
    with pytest.raises(ValueError, match="refused, it asks for"):
        load_weights(deit(), source)


@pytest.mark.parametrize("safe", [False, True])
def test_damaged_files(tmp_path, safe):
    path = tmp_path / "x"
    save_file(deit().state_dict(), path) if safe else saved(path, {"model": deit().state_dict()})
    whole = path.read_bytes()
    for length in (0, 1, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut short|neither a PyTorch nor|refused") as error:
            load_weights(deit(), path)
        assert "\n" not in str(error.value)
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(ValueError, match="neither a PyTorch nor a safetensors file"):
        load_weights(deit(), path)
    with pytest.raises(ValueError, match=r"missing\.pth: cannot be read \(No such file"):
        load_weights(deit(), tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="holds no weights; it has epoch"):
        load_weights(deit(), saved(path, {"epoch": 1}))
    with pytest.raises(ValueError, match="holds a list"):
        load_weights(deit(), saved(path, [1]))


def test_urls_and_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = deit(seed=1)
    source = saved(tmp_path / "w.pth", {"model": model.state_dict()})
    load_weights(other := deit(), source.as_uri())
    assert torch.equal(other.head.weight, model.head.weight)
    assert len(list((tmp_path / "cache/hub/checkpoints").glob("*-w.pth"))) == 1
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_weights(deit(), (tmp_path / "gone.pth").as_uri())

    asked = []

    def hub(repository, name, revision=None):
        asked.append((repository, name, revision))
        if name == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(source)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    load_weights(deit(), "hf_hub:someone/model@v2")
    load_weights(deit(), "hf-hub:someone/model/sub/file.pth")
    assert asked == [
        ("someone/model", "model.safetensors", "v2"),
        ("someone/model", "pytorch_model.bin", "v2"),
        ("someone/model", "config.json", "v2"),  # which says how images were normalised
        ("someone/model", "sub/file.pth", None),
    ]
    with pytest.raises(ValueError, match=r"hf_hub:someone/model/model.safetensors: cannot be downloaded \(404\)"):
        load_weights(deit(), "hf_hub:someone/model/model.safetensors")


# Sizes, heads, and what does not fit ----------------------------------------------------------------------------------


def cv2_grid(values, old, new):
    """(old^2, C) -> (new^2, C), bilinear with half-pixel centres and no antialiasing, by OpenCV."""
    planes = values.reshape(old, old, -1).numpy()
    out = [cv2.resize(planes[:, :, c], (new, new), interpolation=cv2.INTER_LINEAR) for c in range(planes.shape[2])]
    return torch.from_numpy(np.stack(out, -1)).reshape(new * new, -1)


@pytest.mark.parametrize("name, prefix", [("deit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)])
@pytest.mark.parametrize("size", [96, 192])
def test_position_embeddings_are_resampled(tmp_path, name, prefix, size):
    torch.manual_seed(0)
    small = timm.create_model(name, **DEIT)
    large = timm.create_model(name, **{**DEIT, "img_size": size})
    report = load_weights(large, saved(tmp_path / "x.pth", small.state_dict()))
    grid, old = size // 16, small.pos_embed.detach()
    assert report.resized == {"pos_embed": ((1, 16 + prefix, 24), (1, grid**2 + prefix, 24))}
    assert torch.equal(large.pos_embed[:, :prefix], old[:, :prefix])
    torch.testing.assert_close(large.pos_embed[0, prefix:].detach(), cv2_grid(old[0, prefix:], 4, grid))
    antialiased = timm.layers.resample_abs_pos_embed(old, (grid, grid), num_prefix_tokens=prefix)
    assert (large.pos_embed - antialiased).abs().max() > 1e-3  # timm's own is another


def test_bias_tables_are_resampled(tmp_path):
    old, new = swin(img_size=96, window_size=3), swin(img_size=160, window_size=5)
    report = load_weights(new, saved(tmp_path / "x.pth", old.state_dict()))
    tables = [key for key in old.state_dict() if key.endswith("bias_table")]
    assert sorted(report.resized) == sorted(tables) and len(tables) == 5
    for key in tables:
        torch.testing.assert_close(new.state_dict()[key], cv2_grid(old.state_dict()[key], 5, 9))


def test_pvt_positions_are_resampled(tmp_path):
    small = {"embed_dims": (8, 16, 20, 32), "depths": (1, 1, 1, 1), "num_classes": 5}
    old, new = (timm.create_model("pvt_tiny", img_size=size, **small).eval() for size in (64, 96))
    report = load_weights(new, saved(tmp_path / "x.pth", old.state_dict()))
    assert sorted(report.resized) == ["pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4"]
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(new(x), old(x), atol=1e-5, rtol=0)  # which interpolates in its forward pass


@pytest.mark.parametrize(
    "name, head, options",
    [
        ("convnext_tiny", "head.fc", {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}),
        ("caformer_s18", "head.fc.fc2", {}),
        ("resnet18", "fc", {"channels": (8, 16, 24, 32)}),
        ("cswin_tiny", "head", {"embed_dim": 8, "depths": (1, 1, 1, 1)}),
    ],
)
def test_a_new_head(tmp_path, name, head, options):
    """22K classes to 1K: the body is loaded whole, the head stays as drawn, scaled."""
    torch.manual_seed(0)
    source = saved(tmp_path / "x.pth", {"model": timm.create_model(name, num_classes=7, **options).state_dict()})
    model = timm.create_model(name, num_classes=5, **options)
    model.get_submodule(head).bias.data.fill_(1)
    drawn = model.get_submodule(head).weight.detach().clone()
    report = load_weights(model, source, head_init_scale=0.001)
    assert report.random == [f"{head}.weight", f"{head}.bias"] and report.dropped == report.random
    torch.testing.assert_close(model.get_submodule(head).weight.detach(), drawn * 0.001)
    assert torch.equal(model.get_submodule(head).bias.detach(), torch.full((5,), 0.001))
    accounted = sorted([*report.loaded, *report.random])
    assert accounted == sorted(model.state_dict())
    assert f"2 ({head}.weight, {head}.bias) left random" in str(report) and "\n" not in str(report)

    same = timm.create_model(name, num_classes=7, **options)
    assert not load_weights(same, source, head_init_scale=0.001).random  # the file's head is kept as it is
    assert torch.equal(same.get_submodule(head).weight, torch.load(source)["model"][f"{head}.weight"])

    bare = timm.create_model(name, num_classes=0, **options)
    dropped = load_weights(bare, source).dropped
    assert {f"{head}.weight", f"{head}.bias"} <= set(dropped) and all(key.startswith(("head", "fc")) for key in dropped)


def test_what_does_not_fit_is_an_error(tmp_path):
    state = deit(seed=1).state_dict()
    model = deit()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(changed, *parts):
        with pytest.raises(ValueError) as error:
            load_weights(model, saved(tmp_path / "x.pth", changed))
        for part in ("x.pth does not fit VisionTransformer", *parts):
            assert part in str(error.value)
        assert "\n" not in str(error.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing was changed

    refused({k: v for k, v in state.items() if k != "norm.bias"}, "the file lacks: 1 (norm.bias)")
    refused({**state, "blocks.2.norm1.weight": torch.ones(24)}, "the model lacks: 1 (blocks.2.norm1.weight)")
    refused({**state, "norm.bias": torch.ones(25)}, "another shape in the file: 1 (norm.bias (25,), not (24,))")
    refused({**state, "pos_embed": torch.ones(1, 18, 24)}, "pos_embed (1, 18, 24), not (1, 17, 24)")  # no square grid
    refused({**state, "pos_embed": torch.ones(1, 17, 48)}, "pos_embed (1, 17, 48), not (1, 17, 24)")
    refused(deit(depth=3).state_dict(), "blocks.2.", "12 (")
    refused(deit(embed_dim=32).state_dict(), "cls_token (1, 1, 32), not (1, 1, 24)")
    refused({f"prefix.{k}": v for k, v in state.items()}, "the file lacks", "the model lacks", "prefix.cls_token")
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **DEIT)
    refused(distilled.state_dict(), "dist_token", "pos_embed (1, 18, 24)")
    refused(swin().state_dict(), "layers.0.blocks.0.norm1.weight")


# Out -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["timm", "official"])
@pytest.mark.parametrize(
    "name, options, size",
    [
        ("convnext_tiny", {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}, 64),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}, 224),
        ("deit_tiny_patch16_224", DEIT, 64),
        ("cswin_tiny", {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}, 64),
        ("pvt_tiny", {"embed_dims": (8, 16, 20, 32), "depths": (1, 1, 1, 1), "img_size": 64}, 64),
        pytest.param("caformer_s18", {}, 64, marks=extended),
        ("resnet18", {"channels": (8, 16, 24, 32)}, 64),
    ],
)
def test_export_round_trip(tmp_path, name, options, size, form, capsys):
    torch.manual_seed(0)
    options = {**options, "num_classes": 5}
    raw, ema = (timm.create_model(name, **options).eval() for _ in range(2))
    source, out = tmp_path / "checkpoint-last.pth", tmp_path / "out"
    ours(source, raw.state_dict(), ema.state_dict())
    x = torch.randn(1, 3, size, size)
    for flags, expected in (([], raw), (["--ema"], ema)):
        assert export([str(source), str(out), "--format", form, *flags]) == 0
        assert str(out) in capsys.readouterr().out
        load_weights(again := timm.create_model(name, **options).eval(), out)
        assert torch.equal(again(x), expected(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-last.pth", "out"]
    if form == "timm":
        out = out.rename(tmp_path / "out.safetensors")
        again = timm.create_model(name, checkpoint_path=str(out), **options).eval()  # timm reads it alone
        assert torch.equal(again(x), ema(x))
        assert export([str(out), str(tmp_path / "official"), "--format", "official"]) == 0
        assert export([str(tmp_path / "official"), str(tmp_path / "back")]) == 0
        back, first = read_weights(tmp_path / "back"), read_weights(out)
        assert back.keys() == first.keys() and all(torch.equal(back[key], first[key]) for key in first)


def test_export_says_what_is_wrong(tmp_path, capsys):
    source = saved(tmp_path / "x.pth", {"model": {"a.weight": torch.ones(2)}})
    for arguments, message in [
        ([source, tmp_path / "out", "--format", "official"], "no official layout is known"),
        ([source, tmp_path / "out", "--ema"], "no weights under 'model_ema'"),
        ([source, tmp_path / "no/out"], "there is no folder"),
        ([tmp_path / "gone", tmp_path / "out"], "cannot be read"),
    ]:
        assert export([str(a) for a in arguments]) == 1
        captured = capsys.readouterr()
        assert re.fullmatch(rf"error: .*{message}.*\n", captured.err) and not captured.out
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as error:
        export([str(source), "out", "--format", "keras"])
    assert error.value.code == 2
