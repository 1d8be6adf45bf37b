"""Changing the input size of a live model: golden values, optimizers, EMA, wrappers, and every way to resize."""

import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from fake_cuda import CUDA, fake_device, to_fake
from timm.optim import Lamb
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from curriculum import check_input_sizes, resize, set_input_size
from curriculum.resample import resample
from curriculum.resize import InputSizeError
from models import create_model
from models.list import PAPER_MODELS

GOLDEN = Path(__file__).parent / "golden"
# Small models of each kind of size dependence. All dimensions are tiny; structure is the real one.
DEIT = ("deit_tiny", {"embed_dim": 16, "depth": 2, "num_heads": 2})
SWIN = ("swin_tiny", {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)})
PVT = ("pvt_tiny", {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)})
CONVNEXT = ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)})


def build(kind, size, **kwargs):
    name, settings = kind
    torch.manual_seed(0)
    return create_model(name, num_classes=5, input_size=size, **settings, **kwargs)


def optimizers(params):
    return {
        "adamw": lambda: torch.optim.AdamW(params, lr=1e-3, fused=True),
        "adamw_foreach": lambda: torch.optim.AdamW(params, lr=1e-3, foreach=True),
        "lamb": lambda: Lamb(params, lr=1e-3),
        "sgd": lambda: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    }


def step(model, optimizer, size, ema=None):
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if ema is not None:
        ema.update(model)
    return loss


# Values


def wave(spec, shape):
    values = torch.sin(spec["a"] * torch.arange(math.prod(shape), dtype=torch.float64) + spec["b"]).float()
    return (values.abs() if spec.get("abs") else values).reshape(shape)


def with_state(parameter, model, spec):
    """An AdamW over the model whose moments of one parameter are the golden inputs, after three steps."""
    optimizer = torch.optim.AdamW(model.parameters())
    for other in model.parameters():
        other.grad = torch.ones_like(other)
    for _ in range(3):
        optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[parameter][name] = wave(spec[name], parameter.shape)
    return optimizer


def check_golden(model, parameter, ema_parameter, ema, optimizer, size, want, names):
    untouched = {p: copy.deepcopy(s) for p, s in optimizer.state.items() if p.shape != parameter.shape}
    assert set_input_size(model, size, optimizer, ema)
    got = [parameter, ema_parameter, *(optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))]
    for tensor, name in zip(got, names, strict=True):
        expected = torch.tensor(want[name]).reshape(want["shape"])
        assert tensor.shape == expected.shape and (tensor - expected).abs().max() < 1e-6, name
    assert optimizer.state[parameter]["step"] == 3 and (optimizer.state[parameter]["exp_avg_sq"] >= 0).all()
    for other, state in untouched.items():
        if other.shape == optimizer.state[other]["exp_avg"].shape == state["exp_avg"].shape:
            assert all(torch.equal(value, optimizer.state[other][key]) for key, value in state.items())


@pytest.mark.parametrize("case", json.loads((GOLDEN / "deit_pos_embed_resize.json").read_text())["cases"])
def test_deit_position_embedding_is_golden(case):
    old, new = 16 * case["pre_grid"], case["input_size"]
    model = build(("deit_tiny", {"embed_dim": 4, "depth": 1, "num_heads": 1}), old)
    ema = ModelEmaV3(model)
    shape = case["in"]["pos_embed"]["shape"]
    model.pos_embed.data = wave(case["in"]["pos_embed"], shape)
    ema.module.pos_embed.data = wave(case["in"]["ema_pos_embed"], shape)
    optimizer = with_state(model.pos_embed, model, case["in"])
    model.pos_embed.data = wave(case["in"]["pos_embed"], shape)
    names = ("pos_embed", "ema_pos_embed", "exp_avg", "exp_avg_sq")
    check_golden(model, model.pos_embed, ema.module.pos_embed, ema, optimizer, new, case["out"], names)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "swin_bias_resize.json").read_text())["cases"])
def test_swin_bias_table_is_golden(case):
    heads, old, new = case["num_heads"], 32 * case["pre_window"], 32 * case["new_window"]
    settings = {"embed_dim": 2 * heads, "depths": (1, 1, 1, 1), "num_heads": (heads, heads, heads, heads)}
    model = build(("swin_tiny", settings), old)
    ema = ModelEmaV3(model)
    attn, ema_attn = model.layers[1].blocks[0].attn, ema.module.layers[1].blocks[0].attn
    table, averaged = attn.relative_position_bias_table, ema_attn.relative_position_bias_table
    optimizer = with_state(table, model, case["in"])
    table.data = wave(case["in"]["table"], table.shape)
    averaged.data = 0.5 * table.data
    check_golden(
        model, table, averaged, ema, optimizer, new, case["out"], ("table", "ema_table", "exp_avg", "exp_avg_sq")
    )
    assert attn.relative_position_bias_table is table


def test_resample_reads_layouts():
    """Class tokens in front of embeddings, at the end of BEiT's tables; lengths that look like squares; two axes."""
    embedding = torch.randn(1, 5 + 49, 6)
    out = resample(embedding, embedding.shape, (1, 5 + 9, 6), 3 / 7)
    assert torch.equal(out[:, :5], embedding[:, :5])
    table = torch.randn(13**2 + 3, 2)
    out = resample(table, table.shape, (5**2 + 3, 2), 3 / 7)
    assert torch.equal(out[-3:], table[-3:])
    grid = nn.functional.interpolate(table[:-3].T.reshape(1, 2, 13, 13), (5, 5), mode="bilinear").reshape(2, 25).T
    assert torch.allclose(out[:-3], grid)
    line = torch.linspace(0, 1, 27)[
        :, None
    ]  # 27 = 5^2 + 2 and 11 = 3^2 + 2, but the sizes say 2 * 14 - 1 and 2 * 6 - 1
    out = resample(line, (27, 1), (11, 1), 6 / 14)
    assert torch.equal(out, nn.functional.interpolate(line.T[None], 11, mode="linear")[0].T)
    assert resample(torch.ones(1, 8, 14, 14), (1, 8, 14, 14), (1, 8, 6, 6)).eq(1).all()
    half = torch.randn(1, 49, 4, dtype=torch.bfloat16)
    assert resample(half, half.shape, (1, 9, 4)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no rule"):
        resample(torch.ones(3, 2, 4), (3, 2, 4), (4, 2, 5))


# Training


@pytest.mark.parametrize("name", ["adamw", "adamw_foreach", "lamb", "sgd"])
@pytest.mark.parametrize("kind", [DEIT, SWIN, CONVNEXT], ids=lambda kind: kind[0])
def test_training_goes_on_at_another_size(kind, name):
    model = build(kind, 96)
    parameters, named = list(model.parameters()), list(model.named_parameters())
    optimizer, ema = optimizers(parameters)[name](), ModelEmaV3(model)
    kept = [step(model, optimizer, 96, ema)]  # a loss that is still referenced keeps its graph's accumulators
    for size, changes in ((160, True), (96, True), (96, False)):
        changed = set_input_size(model, size, optimizer, ema)
        assert changed == (changes and kind is not CONVNEXT)
        assert list(model.parameters()) == parameters and all(a is b for a, b in zip(model.parameters(), parameters))
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in named]
        for parameter, averaged in zip(parameters, ema.module.parameters()):
            assert parameter.grad is None and averaged.shape == parameter.shape
            tensors = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value) and value.dim()]
            assert tensors and all(value.shape == parameter.shape for value in tensors)
        kept.append(step(model, optimizer, size, ema))
        ema(torch.randn(1, 3, size, size))
    assert all(loss.isfinite() for loss in kept)


def test_without_the_optimizer_training_breaks():
    """Negative control of the test above: moments that do not follow are noticed."""
    model = build(DEIT, 96)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, 96)
    set_input_size(model, 160)
    with pytest.raises(RuntimeError):
        step(model, optimizer, 160)


def test_factored_state_starts_anew():
    model = build(("deit_tiny", {"embed_dim": 32, "depth": 1, "num_heads": 2}), 96)
    optimizer = timm.optim.create_optimizer_v2(model, "adafactor", lr=1e-3)
    step(model, optimizer, 96)
    set_input_size(model, 160, optimizer)
    assert model.pos_embed not in optimizer.state and model.cls_token in optimizer.state
    assert step(model, optimizer, 160).isfinite()


def test_resizing_draws_no_random_numbers_and_keeps_modes():
    model = build(("tests.sized_models:levit", {}), 192).eval()
    model(torch.randn(1, 3, 192, 192))  # fills its cache
    model.stages[0].train()
    modes = [part.training for part in model.modules()]
    before = torch.get_rng_state()
    assert set_input_size(model, 128)
    assert torch.equal(before, torch.get_rng_state()) and modes == [part.training for part in model.modules()]
    model.eval()(torch.randn(1, 3, 128, 128))


# Every way of resizing gives the model that construction at the new size gives

WAYS = [
    (*DEIT, 96, 160),  # timm's method: position embedding
    (*SWIN, 224, 96),  # windows
    ("swinv2_tiny_window8_256", {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}, 256, 128),
    ("beit_base_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2}, 224, 96),
    ("vit_relpos_small_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2}, 224, 96),
    ("eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, 224, 112),  # rotary
    ("cait_xxs24_224", {"embed_dim": 16, "depth": 1, "num_heads": 2}, 224, 96),  # from here on: rebuilt
    ("samvit_base_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2, "global_attn_indexes": (0,)}, 224, 96),
    ("tests.sized_models:volo", {}, 224, 160),
    ("tests.sized_models:nest", {}, 224, 96),
    ("tests.sized_models:mvit", {}, 224, 96),
    ("tests.sized_models:levit", {}, 224, 128),
    ("tests.sized_models:gcvit", {}, 224, 96),
    ("tests.sized_models:crossvit", {}, 240, 120),
    ("cswin_tiny", {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}, 224, 96),
    (*PVT, 224, 96),
    ("twins_svt_small", {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)}, 224, 96),
    ("tests.sized_models:ignorant", {}, 224, 96),
    ("tests.sized_models:masked", {}, 96, 64),
    ("tests.sized_models:masked", {}, 64, 128),
]


@pytest.mark.parametrize("name, settings, old, new", WAYS, ids=[way[0] for way in WAYS])
def test_resized_equals_built(name, settings, old, new):
    model = build((name, settings), old).eval()
    set_input_size(model, new)
    fresh = build((name, settings), new).eval()
    fresh.load_state_dict(model.state_dict())  # strict: same names, same shapes
    images = torch.randn(2, 3, new, new)
    with torch.no_grad():
        assert torch.equal(model(images), fresh(images))
    assert model.input_size == new


@pytest.mark.parametrize("name, settings, old, new", WAYS, ids=[way[0] for way in WAYS])
def test_a_model_on_a_gpu_is_resized_there(name, settings, old, new, monkeypatch):
    """Every parameter and buffer, and the moments, lie on the device afterwards, and a forward pass finds no other."""
    model = build((name, settings), old).eval()
    rebuild, equal = model.rebuild, torch.equal
    monkeypatch.setattr(model, "rebuild", lambda size: real(rebuild, size), raising=False)
    monkeypatch.setattr(torch, "equal", lambda a, b: real(equal, a, b))
    check_input_sizes(model, [new])
    monkeypatch.setattr(resize, "check_input_sizes", lambda model, sizes: None)  # on copies without values
    with fake_device():
        to_fake(model)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for parameter in model.parameters():
            optimizer.state[parameter] = {"exp_avg": torch.empty_like(parameter)}
        set_input_size(model, new, optimizer)
        tensors = [*model.parameters(), *model.buffers(), *(state["exp_avg"] for state in optimizer.state.values())]
        assert {tensor.device for tensor in tensors} == {CUDA}
        model(torch.empty(2, 3, new, new, device=CUDA))


def real(function, *arguments):
    with unset_fake_temporarily():
        return function(*arguments)


def test_timm_resamples_nothing_on_a_gpu(monkeypatch):
    """It cannot before timm 1.0.30: parts of its interpolation lie on the CPU."""
    model, given = build(SWIN, 224), []
    resample_table = timm.models.swin_transformer.resize_rel_pos_bias_table
    monkeypatch.setattr(
        timm.models.swin_transformer, "resize_rel_pos_bias_table",
        lambda table, **options: given.append(table.device.type) or resample_table(table, **options),
    )  # fmt: skip
    with fake_device():
        set_input_size(to_fake(model), 96)
    assert set(given) == {"meta", "cpu"}  # the check on a copy without values, and the change


class OwnWay(nn.Module):
    """Changes its size itself, and makes tensors of every kind beside its position embedding."""

    input_size = 32

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, 4))
        self.stays = torch.zeros(3)

    def set_input_size(self, img_size):
        device, side = self.pos_embed.device, img_size[0] // 8
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2, 4, device=device))
        self.scale = nn.Parameter(torch.ones(side, device=device))
        self.register_buffer("index", torch.arange(side, device=device))
        self.mask = torch.ones(side, side, device=device)


def test_what_a_model_makes_beside_its_parameters_is_on_the_device(monkeypatch):
    monkeypatch.setattr(resize, "check_input_sizes", lambda model, sizes: None)
    with fake_device():
        model = to_fake(OwnWay())
        set_input_size(model, 64)
        assert model.pos_embed.shape == (1, 64, 4) and isinstance(model.scale, nn.Parameter)
        assert {x.device for x in (model.pos_embed, model.scale, model.index, model.mask)} == {CUDA}
        assert model.stays.device.type == "cpu"  # as it was


def test_a_model_whose_own_change_fails_is_as_it_was(monkeypatch):
    model = build(DEIT, 96)
    before = dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}

    def fails(img_size):
        raise RuntimeError("no memory")

    monkeypatch.setattr(resize, "check_input_sizes", lambda model, sizes: None)
    monkeypatch.setattr(model, "set_input_size", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        set_input_size(model, 160)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


def test_swin_windows_follow_the_size():
    model = build(SWIN, 96)
    for size in (96, 160, 192, 224, 384):
        set_input_size(model, size)
        blocks = [block for stage in model.layers for block in stage.blocks]
        assert {block.window_size for block in blocks} == {(size // 32, size // 32)}
        assert all(side % (size // 32) == 0 for block in blocks for side in block.input_resolution)


def test_a_rebuilt_model_keeps_statistics_and_another_head():
    model = build(("tests.sized_models:levit", {}), 224)
    model(torch.randn(2, 3, 224, 224) + 1)  # moves the running statistics
    statistics = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    assert statistics and not any(value.eq(0).all() for value in statistics.values())
    model.reset_classifier(9)
    assert set_input_size(model, 128)
    assert all(torch.equal(model.get_buffer(n), value) for n, value in statistics.items() if not n.startswith("head"))
    assert model(torch.randn(2, 3, 128, 128)).shape == (2, 9)


# Refusals


def test_wrapped_models_are_refused():
    model = build(DEIT, 96)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match="wrap"):
            set_input_size(wrapped, 160)


@pytest.mark.parametrize(
    "kind, size, message",
    [
        (DEIT, 100, "input size 100: VisionTransformer .size multiple 16. .*nearest that work: 96 and 112"),
        (SWIN, 144, "input size 144: SwinTransformer .size multiple 32. .*nearest that work: 128 and 160"),
        (CONVNEXT, 0, "positive"),
        (("tests.sized_models:mixer", {}), 128, "mixes positions.*nearest that work: 224"),
    ],
    ids=["deit", "swin", "zero", "mixer"],
)
def test_sizes_that_do_not_fit_are_refused_and_nothing_changes(kind, size, message):
    model = build(kind, 224)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for refuse in (lambda: check_input_sizes(model, [224, size]), lambda: set_input_size(model, size)):
        with pytest.raises(ValueError, match=message):
            refuse()
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_nearest_sizes_are_at_hand():
    with pytest.raises(InputSizeError) as refused:
        check_input_sizes(build(("tests.sized_models:crossvit", {}), 240), [171])
    assert refused.value.nearest == [120, 240]


def test_an_assertion_without_a_message_is_quoted():
    with pytest.raises(
        ValueError, match=r"AssertionError at assert x.shape\[-1\] in \(32, 64\).*nearest that work: 32 and 64"
    ):
        check_input_sizes(build(("tests.sized_models:picky", {}), 32), [48])


# Wrappers


def train_across_sizes(rank, world_size, wrap, kind, rendezvous, results):
    """SGD steps at 96 and 160 on this rank's share of a batch of 8, the model wrapped anew for each size."""
    torch.set_num_threads(1)
    if rendezvous:
        torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
    model = build(kind, 96)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for size in (96, 160):
        set_input_size(model, size, optimizer)
        wrapped = WRAPPERS[wrap](model)
        images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(size))[rank::world_size]
        labels = (torch.arange(8) % 5)[rank::world_size]
        for _ in range(2):
            nn.functional.cross_entropy(wrapped(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        del wrapped  # its hooks on the parameters go with it
    if rendezvous:
        torch.distributed.destroy_process_group()
    torch.save(model.state_dict(), f"{results}/{wrap}-{rank}.pt")


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "ddp": nn.parallel.DistributedDataParallel,
}


def same_weights(results, *names):
    plain = torch.load(results / "plain-0.pt")
    for name in names:
        other = torch.load(results / f"{name}.pt")
        for key, value in plain.items():
            assert torch.allclose(value, other[key], atol=1e-5), (name, key)


def test_wrappers_are_renewed_for_each_size(tmp_path):
    train_across_sizes(0, 1, "plain", DEIT, None, tmp_path)
    train_across_sizes(0, 1, "compiled", DEIT, None, tmp_path)
    train_across_sizes(0, 1, "ddp", DEIT, tmp_path / "meet", tmp_path)
    same_weights(tmp_path, "compiled-0", "ddp-0")


@pytest.mark.extended
@pytest.mark.parametrize("kind", [DEIT, SWIN, CONVNEXT], ids=lambda kind: kind[0])
def test_two_processes_end_with_the_weights_of_one(kind, tmp_path):
    train_across_sizes(0, 1, "plain", kind, None, tmp_path)
    torch.multiprocessing.spawn(train_across_sizes, (2, "ddp", kind, tmp_path / "meet", tmp_path), nprocs=2)
    same_weights(tmp_path, "ddp-0", "ddp-1")


@pytest.mark.extended
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("name", [name for name in PAPER_MODELS if not name.endswith("large")])
def test_the_papers_models_train_across_sizes(name, optimizer):
    """Three steps at each size; the large ones are their base models with more channels."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, input_size=96, drop_path=0.1)
    optimizer, ema = optimizers(model.parameters())[optimizer](), ModelEmaV3(model)
    for size in (96, 160, 224):
        set_input_size(model, size, optimizer, ema)
        assert all(step(model, optimizer, size, ema).isfinite() for _ in range(3))
