"""Masked autoencoders: the model, HOG, training through main.py, and what becomes of the result."""

import json
import math
import signal
from functools import partial

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Run, flags, same
from PIL import Image
from processes import Program, kill_after_step, world
from skimage.feature import hog as skimage_hog
from tensorboardX.proto.event_pb2 import Event
from test_report import Page

from curriculum import set_input_size
from curriculum.sampler import derive_seed
from curriculum.skeleton import Skeleton
from inputs.finish import Finish
from inputs.transforms import EvalTransform
from models import create_mae, create_model, load_weights
from models.export import export
from models.hog import histograms, hog, hog_picture, sobel
from models.mae import from_patches, position_embedding, to_patches
from training.tasks import Reconstruction

MAE = {
    "task": "mae",
    "model": "test_vit",
    "decoder": "[1,32,2]",
    "mixup": 0,
    "cutmix": 0,
    "reprob": 0,
    "magnitude": "none",
    "opt_betas": "[0.9,0.95]",
}


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory, main_program):
    """The output of one whole run, sizes 32, 48 and 64."""
    output = tmp_path_factory.mktemp("mae")
    assert main_program(flags(output_dir=output, data_path=folder, **MAE)) == 0
    return Run(output)


def tiny(size=64, **options):
    torch.manual_seed(0)
    return create_mae("test_vit", size, decoder=(2, 32, 4), **options).eval()


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, encoder, total",
    [("vit_base_patch16_224", 85_798_656, 111_907_840), ("vit_large_patch16_224", 303_301_632, 329_541_888)],
)
def test_as_many_parameters_as_the_authors(name, encoder, total):
    """Their position embeddings are parameters that do not train, ours are buffers; both are in the checkpoint."""
    with torch.device("meta"), Skeleton():
        state = create_mae(name).state_dict()
    decoder = {key: value for key, value in state.items() if key.startswith("decoder_") or key == "mask_token"}
    assert sum(value.numel() for value in state.values()) == total
    assert sum(value.numel() for value in state.values()) - sum(value.numel() for value in decoder.values()) == encoder


def test_names_are_the_authors():
    with torch.device("meta"), Skeleton():
        state = create_mae("vit_base_patch16_224").state_dict()
    block = {f"{part}.{leaf}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for leaf in ("weight", "bias")}  # fmt: skip
    single = ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
    names = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    names |= {f"{part}.{leaf}" for part in single for leaf in ("weight", "bias")}
    names |= {f"blocks.{i}.{name}" for i in range(12) for name in block}
    names |= {f"decoder_blocks.{i}.{name}" for i in range(8) for name in block}
    assert state.keys() == names
    assert state["decoder_pred.weight"].shape == (768, 512) and state["pos_embed"].shape == (1, 197, 768)


def attend(x, state, name, heads):
    """A Transformer's block, written out: x + attention(norm(x)), then x + mlp(norm(x))."""

    def linear(x, part):
        return x @ state[f"{name}.{part}.weight"].T + state[f"{name}.{part}.bias"]

    def norm(x, part):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * state[f"{name}.{part}.weight"] + state[f"{name}.{part}.bias"]

    n, t, d = x.shape
    q, k, v = linear(norm(x, "norm1"), "attn.qkv").view(n, t, 3, heads, d // heads).unbind(2)
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div((d // heads) ** 0.5).softmax(-1)
    x = x + linear(torch.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, t, d), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def reference_loss(state, images, noise, targets, side=16, ratio=0.75, encoder_heads=2, decoder_heads=4):
    """MAE as its paper says, one image after the other, tokens gathered by Python lists."""
    losses = []
    last = partial(F.layer_norm, eps=1e-6)
    for image, numbers, target in zip(images, noise.tolist(), targets):
        boxes = [box for row in image.split(side, 1) for box in row.split(side, 2)]
        kernel = state["patch_embed.proj.weight"]
        tokens = torch.stack([(kernel * box).sum((1, 2, 3)) for box in boxes]) + state["patch_embed.proj.bias"]
        order = sorted(range(len(boxes)), key=numbers.__getitem__)
        seen = order[: int(len(boxes) * (1 - ratio))]
        x = torch.stack([state["cls_token"][0, 0], *(tokens[i] + state["pos_embed"][0, 1 + i] for i in seen)])[None]
        for i in range(6):
            x = attend(x, state, f"blocks.{i}", encoder_heads)
        x = last(x, x.shape[-1:], state["norm.weight"], state["norm.bias"])
        x = x @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
        full = [x[0, 1 + seen.index(i)] if i in seen else state["mask_token"][0, 0] for i in range(len(boxes))]
        x = (torch.stack([x[0, 0], *full]) + state["decoder_pos_embed"][0])[None]
        for i in range(2):
            x = attend(x, state, f"decoder_blocks.{i}", decoder_heads)
        x = last(x, x.shape[-1:], state["decoder_norm.weight"], state["decoder_norm.bias"])
        predicted = (x @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])[0, 1:]
        errors = [(predicted[i] - target(boxes[i], i)).square().mean() for i in range(len(boxes)) if i not in seen]
        losses.append(torch.stack(errors).mean())
    return torch.stack(losses)


def normalised_pixels(box, place):
    """Of one patch (3, 16, 16): row by row, the three channels of a pixel together, mean 0 and deviation 1."""
    values = torch.stack([box[:, y, x] for y in range(16) for x in range(16)]).flatten()
    return (values - values.mean()) / (values.var() + 1e-6).sqrt()


def test_loss_is_that_of_an_independent_implementation():
    model = tiny()
    with torch.no_grad():  # what starts at 0 or 1 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    images, noise = torch.randn(3, 3, 64, 64), torch.rand(3, 16)
    expected = reference_loss(model.state_dict(), images, noise, [normalised_pixels] * 3)
    with torch.no_grad():
        torch.testing.assert_close(model(images, noise), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(model(images, noise.flip(1)), expected, rtol=1e-3)  # another mask


def test_loss_on_hog():
    model = tiny(target="hog")
    images, noise = torch.rand(2, 3, 64, 64), torch.rand(2, 16)
    features = [slow_hog(image) for image in images]  # (3, 9, 8, 8)

    def target(image):
        def of(box, place):
            y, x = 2 * (place // 4), 2 * (place % 4)
            cells = [features[image][:, :, y + i, x + j].reshape(-1) for i in range(2) for j in range(2)]
            return torch.cat(cells)

        return of

    expected = reference_loss(model.state_dict(), images, noise, [target(0), target(1)])
    with torch.no_grad():
        torch.testing.assert_close(model(images, noise), expected, rtol=1e-4, atol=1e-6)


def test_a_quarter_is_seen_and_the_rest_learnt_from():
    model = tiny()
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    predicted, masked = model.predict(images, torch.rand(2, 16))
    assert predicted.shape == (2, 16, 768) and masked.sum(1).tolist() == [12, 12]
    predicted.sum().backward()
    used = to_patches(images.grad, 16).abs().sum(-1) > 0
    assert torch.equal(used, ~masked)  # not one pixel of a masked patch is seen


def test_masks_do_not_depend_on_processes_and_differ_by_seed():
    task, images = Reconstruction(16), torch.zeros(8, 3, 64, 64)
    whole = task.noise(images, [11, 12, 13, 14])
    assert torch.equal(whole[2:6], task.noise(images[:4], [12, 13]))
    assert not torch.equal(whole[:2], whole[2:4]) and not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("row, column, number", [(0, 0, 0), (3, 2, 5), (13, 7, 200), (9, 13, 450), (1, 12, 767)])
def test_position_embedding(row, column, number):
    """sin of the column, cos of the column, sin of the row, cos of the row: a quarter of the numbers each."""
    quarter, index = divmod(number, 192)
    angle = (column, row)[quarter // 2] / 10000 ** (index / 192)
    expected = (math.sin, math.cos)[quarter % 2](angle)
    table = position_embedding(768, (14, 14), prefix=1)
    assert table.shape == (1, 197, 768) and not table[0, 0].any()
    assert table[0, 1 + 14 * row + column, number].item() == pytest.approx(expected, abs=1e-6)


def test_patches_and_back():
    images = torch.randn(2, 3, 48, 48)
    patches = to_patches(images, 16)
    assert torch.equal(patches[1, 5].view(16, 16, 3), images[1, :, 16:32, 32:48].permute(1, 2, 0))
    assert torch.equal(from_patches(patches, 16), images)


def test_another_size_keeps_weights_and_moments():
    model = tiny(48)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 48, 48)).mean().backward()
    optimizer.step()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    assert set_input_size(model, 64, optimizer) is False
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) and torch.equal(
            optimizer.state[parameter]["exp_avg"], moments[name]
        )
    fresh = tiny(64)
    assert torch.equal(model.pos_embed, fresh.pos_embed) and torch.equal(
        model.decoder_pos_embed, fresh.decoder_pos_embed
    )
    assert model(torch.randn(2, 3, 64, 64)).shape == (2,)


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}])
def test_other_plain_transformers(options):
    """Without a class token, and with one that has no position: what is pre-trained fits the model it came from."""
    model = tiny(**options)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2,)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder_") and k != "mask_token"}
    plain = create_model("test_vit", 0, 64, **options, fc_norm=False)
    plain.load_state_dict(state)


# -- HOG ---------------------------------------------------------------------------------------------------------------


def slow_hog(image):
    """HOG of (C, H, W) by loops over pixels, from the definition: MaskFeat's 9 bins, cells of 8, window of 16."""
    image = image.double().numpy()
    channels, height, width = image.shape
    result = np.zeros((channels, 9, height // 8, width // 8))
    for channel in range(channels):
        padded = np.pad(image[channel], 1, mode="reflect")
        for y in range(height):
            for x in range(width):
                near = padded[y : y + 3, x : x + 3]
                along_x = (near[:, 2] - near[:, 0]) @ [1, 2, 1]
                along_y = (near[2] - near[0]) @ [1, 2, 1]
                window = math.exp(-(((x % 16 - 7.5) / 8) ** 2 + ((y % 16 - 7.5) / 8) ** 2) / 2)
                direction = math.floor(math.atan2(along_x, along_y) / math.pi * 9) % 9
                result[channel, direction, y // 8, x // 8] += math.hypot(along_x, along_y) * window
    return torch.from_numpy(result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)).float()


@pytest.mark.parametrize("shape", [(16, 16), (24, 40)])
def test_hog_by_its_definition(shape):
    images = torch.rand(2, 3, *shape)
    got = hog(images)
    assert got.shape == (2, 3, 9, shape[0] // 8, shape[1] // 8)
    torch.testing.assert_close(got, torch.stack([slow_hog(image) for image in images]), rtol=1e-4, atol=1e-5)
    scaled = hog(3.5 * images - 1)
    torch.testing.assert_close(scaled, got, rtol=1e-3, atol=1e-3)  # normalised images have the same


@pytest.mark.parametrize("side", [48, 96])
def test_histograms_are_scikit_image_s(side):
    """On its own gradients (central differences, 0 at the border), transposed: its directions are from the x axis."""
    image = np.random.default_rng(0).random((side, side))
    along_y, along_x = np.zeros_like(image), np.zeros_like(image)
    along_y[1:-1], along_x[:, 1:-1] = image[2:] - image[:-2], image[:, 2:] - image[:, :-2]
    got = histograms(*(torch.from_numpy(values)[None, None] for values in (along_x, along_y)))[0, 0]
    cells = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (1, 1), "block_norm": "L2"}
    want = skimage_hog(image.T, **cells, feature_vector=False)[:, :, 0, 0].transpose(2, 1, 0)
    assert np.abs(got.numpy() - want).max() < 1e-3  # it adds 1e-5 to the length of a mean of 64
    assert np.abs(got.flip(0).numpy() - want).max() > 0.1


def test_sobel_is_opencv_s():
    image = np.random.default_rng(0).random((24, 32))
    for got, order in zip(sobel(torch.from_numpy(image)[None, None]), ((1, 0), (0, 1))):
        want = cv2.Sobel(image, cv2.CV_64F, *order, ksize=3, borderType=cv2.BORDER_REFLECT_101)
        assert np.allclose(got[0, 0].numpy(), want)


def test_hog_of_a_flat_image_is_zero_and_sizes_are_checked():
    assert not hog(torch.full((1, 3, 16, 16), 0.5)).any()
    with pytest.raises(ValueError, match="20 x 16"):
        hog(torch.zeros(1, 3, 20, 16))


def test_hog_picture_shows_edges():
    """A vertical edge is drawn as an upright line, a horizontal one as a line that lies."""
    step = (torch.arange(8) >= 4).float()
    upright, lying = (hog_picture(hog(image.expand(1, 3, 8, 8).contiguous()))[0, 0] for image in (step, step[:, None]))
    assert upright[:, 3:5].float().mean() > 3 * upright[:, :2].float().mean()
    assert lying[3:5].float().mean() > 3 * lying[:2].float().mean()


# -- training ----------------------------------------------------------------------------------------------------------


def test_log_checkpoint_and_pictures(pretrained):
    records = pretrained.log()
    evaluated = [record for record in records if "eval_size" in record]
    assert [record["eval_size"] for record in evaluated] == [48, 64]
    for record in evaluated:
        assert record["eval_images"] == 15 and math.isfinite(record["test_loss"])
        assert not [key for key in record if "acc" in key]
    assert {record["magnitude"] for record in records} == {None}
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert pretrained.state()["best"] == {} and not (pretrained.output / "checkpoint-best.pth").exists()
    pictures = sorted(path.name for path in (pretrained.output / "samples").iterdir())
    assert pictures == ["stage-1.png", "stage-2-answers.png", "stage-2.png", "stage-3-answers.png", "stage-3.png"]
    page = Page(pretrained.output / "report.html")
    assert page.tags.count("img") == 6
    assert f"{evaluated[-1]['test_loss']:.4f} reconstruction loss at 64 pixels" in page.text
    assert "what it predicted" in page.text and "top-1" not in page.text
    shown = [tag for path in (pretrained.output / "tensorboard").iterdir() for tag in images_in(path)]
    assert shown == ["pictures/stage-2", "pictures/stage-3"]


def images_in(path):
    """The tags of the pictures in an event file."""
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        summary = Event.FromString(data[12 : 12 + length]).summary
        yield from (value.tag for value in summary.value if value.HasField("image"))
        data = data[16 + length :]


def test_test_loss_is_that_of_fixed_masks(pretrained, folder):
    """The last record's, image by image, in another order and batch."""
    model = create_mae("test_vit", 64, decoder=(1, 32, 2))
    model.load_state_dict(pretrained.state()["model"])
    model.eval()
    transform, finish = EvalTransform(64, 64, "lanczos"), Finish(3, mixup=0, cutmix=0)
    paths = sorted((folder / "val").rglob("*.jpg"))
    losses = []
    for index in reversed(range(len(paths))):
        image = finish.evaluate(transform(paths[index].read_bytes())[None], 64)
        noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(derive_seed(index)))
        with torch.no_grad():
            losses.append(model(image, noise).item())
    assert pretrained.log()[-1]["test_loss"] == pytest.approx(sum(losses) / 15, rel=1e-5)


def test_picture(pretrained):
    """Rows of images, of what is seen and of what is predicted; what is seen is left as it is."""
    model = create_mae("test_vit", 64, decoder=(1, 32, 2))
    model.load_state_dict(pretrained.state()["model"])
    finish = Finish(3, mixup=0, cutmix=0)
    shown = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    noise = torch.rand(2, 16)
    images = finish.normalise(shown)
    picture = model.eval().picture(images, noise, finish.pixels)
    assert picture.shape == (3, 3 * 64, 2 * 64)
    rows = [torch.stack(list(row.split(64, 2))) for row in picture.split(64, 1)]
    masked = model.predict(images, noise)[1]
    original, seen, guess = (to_patches(row.int(), 16) for row in rows)
    assert torch.equal(original, to_patches(shown.int(), 16))
    assert torch.equal(seen[~masked], original[~masked]) and torch.equal(guess[~masked], original[~masked])
    assert (seen[masked].float().std(1) < 30).all() and not torch.equal(guess[masked], original[masked])
    on_hog = tiny(target="hog").picture(images, noise, finish.pixels)
    assert on_hog.shape == (3, 4 * 64, 2 * 64)


def test_hog_trains_under_both_curricula(train, pretrained):
    run = train("hog", **MAE, mae_target="hog", curriculum="efficienttrain", epochs=4, operator="fourier")
    losses = [record["train_loss"] for record in run.log()]
    assert losses[-1] < losses[0] < 1.5
    assert run.state()["model"]["decoder_pred.weight"].shape[0] == 108
    size = Image.open(run.output / "samples" / "stage-2-answers.png").size
    assert size == (8 * 64, 4 * 64)


BOUNDARY = 9  # optimizer steps of the first stage


@pytest.mark.parametrize("step, resumed_from", [(BOUNDARY - 1, 6), (BOUNDARY + 5, BOUNDARY + 3)])
def test_killed_and_resumed_it_ends_the_same(folder, tmp_path, pretrained, step, resumed_from):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**MAE, "save_interval": "3 steps"})
    assert Program(argv, tmp_path / "first", fault=partial(kill_after_step, step)).wait() == -signal.SIGKILL
    assert Run(tmp_path / "run").state()["step"] == resumed_from
    assert Program(argv, tmp_path / "second").wait() == 0
    assert same(Run(tmp_path / "run").result(), pretrained.result())


def test_two_processes_train_as_one(folder, tmp_path, main_program, pretrained):
    settings = {**MAE, "micro_batch": 2, "clip_grad": 1.0}
    for program in world(flags(output_dir=tmp_path / "two", data_path=folder, **settings), tmp_path / "log", 2):
        assert program.wait() == 0, program.output
    assert main_program(flags(output_dir=tmp_path / "one", data_path=folder, **settings)) == 0
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    weights = one.state()["model"], two.state()["model"]
    for name in weights[0]:
        # The keys' bias changes nothing: AdamW makes its steps of rounding errors.
        parts = (state[name].view(3, -1)[::2] if name.endswith("qkv.bias") else state[name] for state in weights)
        torch.testing.assert_close(*parts, rtol=2e-4, atol=2e-5, msg=name)
    assert one.log()[-1]["test_loss"] == pytest.approx(two.log()[-1]["test_loss"], rel=1e-4)
    # Other groups have other masks: the tolerance is far from that.
    assert one.log()[-1]["test_loss"] != pytest.approx(pretrained.log()[-1]["test_loss"], rel=1e-4)


def test_micro_batch_is_found_and_the_plan_counts_encoder_and_decoder(main_program, folder, capsys, train):
    run = train(**{**MAE, "micro_batch": "auto", "epochs": 1})
    plan = json.loads((run.output / "plan.json").read_text())
    d, w, n = 64, 32, 4  # width of encoder and decoder, visible patches at 64 pixels
    block = 4 * d * d + 2 * 3 * d * d + 2 * (n + 1) * d  # timm's test_vit has an MLP of 3 times the width
    decoder = 12 * w * w + 2 * 17 * w
    expected = 16 * 768 * d + 6 * (n + 1) * block + (n + 1) * d * w + 17 * decoder + 17 * w * 768
    # The class token is predicted from too, and cut off after.
    assert plan["total"]["flops"] == pytest.approx(expected, abs=w * 768)


# -- what becomes of it ------------------------------------------------------------------------------------------------


def test_fine_tuning(pretrained, train, capsys):
    """With layer decay, at a learning rate of almost 0: the encoder is the pre-trained one."""
    weights = pretrained.output / "checkpoint-last.pth"
    settings = {"model": "test_vit", "curriculum": "none", "epochs": 1, "lr": 1e-12, "min_lr": 0, "layer_decay": 0.65}
    run = train("finetuned", **settings, finetune=weights, drop_path=0.1, model_args='{"global_pool": "avg"}')
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights:"))
    assert "MAE pre-training (authors') names" in said and "4 (head.weight, head.bias, fc_norm" in said
    before, after = pretrained.state()["model"], run.state()["model"]
    for name in ("pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.5.mlp.fc2.weight"):
        torch.testing.assert_close(after[name], before[name], atol=1e-9, rtol=0)
    larger = create_model("test_vit", 3, 96)
    assert "pos_embed" in load_weights(larger, weights).resized


@pytest.fixture(scope="module")
def probed(pretrained, folder, tmp_path_factory, main_program):
    output = tmp_path_factory.mktemp("probe")
    weights = pretrained.output / "checkpoint-last.pth"
    settings = {"model": "test_vit", "curriculum": "none", "epochs": 3, "lr": 1e-2, "finetune": weights}
    argv = flags(output_dir=output, data_path=folder, linear_probe="batchnorm", **settings)
    assert main_program(argv) == 0
    return Run(output)


def test_probe_behind_a_batchnorm(pretrained, probed, folder, main_program, capsys):
    before, after = pretrained.state()["model"], probed.state()["model"]
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {"head.0", "head.1"}
    # Evaluated by itself, the BatchNorm is part of the classifier: a plain model with the same answers.
    argv = flags(data_path=folder, model="test_vit", eval=True, resume=probed.output / "checkpoint-last.pth")
    assert main_program(argv) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = probed.log()[-1]
    assert line["acc1"] == last["test_acc1"] and line["loss"] == pytest.approx(last["test_loss"], rel=1e-4)


@pytest.mark.parametrize("form", ["timm", "official"])
def test_export(pretrained, probed, tmp_path, form):
    """The encoder for timm and for others; the classifier of a probe comes along."""
    suffix = "safetensors" if form == "timm" else "pth"
    for run, classes in ((pretrained, 0), (probed, 3)):
        out = tmp_path / f"{classes}.{suffix}"
        export(str(run.output / "checkpoint-last.pth"), out, form)
        model = timm.create_model("test_vit", img_size=64, num_classes=classes, dynamic_img_size=False)
        if form == "timm":
            timm.models.load_checkpoint(model, str(out))
        else:
            model.load_state_dict(torch.load(out, weights_only=True)["model"])
        state = run.state()["model"]
        assert torch.equal(model.blocks[5].mlp.fc2.weight, state["blocks.5.mlp.fc2.weight"])
        if classes:
            weight = state["head.1.weight"] / (state["head.0.running_var"] + 1e-6).sqrt()
            torch.testing.assert_close(model.head.weight, weight)


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "resnet10t"}, ["--task mae", "resnet10t (ResNet)", "vit_base_patch16_224"]),
        ({"model": "deit_tiny_distilled_patch16_224"}, ["deit_tiny_distilled_patch16_224", "is no plain"]),
        ({"model_args": '{"reg_tokens": 2}'}, ["test_vit", "is no plain"]),
        ({"mixup": 0.8}, ["set --mixup 0", "recipes/mae"]),
        ({"cutmix": 1, "reprob": 0.1}, ["set --cutmix 0 --reprob 0"]),
        ({"magnitude": None}, ["set --magnitude none"]),
        ({"mask_ratio": 1}, ["--mask_ratio is 1"]),
        ({"mask_ratio": 0.9}, ["--mask_ratio 0.9", "leaves 0 visible"]),
        ({"mask_ratio": 0}, ["--mask_ratio is 0"]),
        ({"decoder": "[1,30,4]"}, ["--decoder is [1, 30, 4]"]),
        ({"decoder": "[0,32,4]"}, ["--decoder is [0, 32, 4]"]),
        ({"mae_target": "colours"}, ["mae_target", "colours"]),
        ({"mae_target": "hog", "model_args": '{"patch_size": 4}'}, ["--mae_target hog", "patches of 4 pixels"]),
        ({"input_size": 60}, ["60", "patches of 16 pixels"]),
        ({"linear_probe": True}, ["--linear_probe true", "supervised"]),
        ({"finetune": "weights.pth"}, ["--finetune weights.pth", "supervised"]),
        ({"eval": True, "resume": "weights.pth"}, ["--eval true", "supervised"]),
        ({"layer_decay": 0.65}, ["layer_decay", "MaskedAutoencoder"]),
        ({"task": "mea"}, ["task", "mea"]),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work(main_program, folder, tmp_path, capsys, settings, words):
    try:
        code = main_program(flags(**{**MAE, "data_path": folder, "output_dir": tmp_path / "run", **settings}))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("error: ") and "\n" not in error
    for word in words:
        assert word in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"mae_target": "hog"}, {"mask_ratio": 0.5}, {"task": "supervised"}])
def test_a_run_does_not_go_on_as_another(pretrained, main_program, folder, capsys, change):
    argv = flags(output_dir=pretrained.output, data_path=folder, **{**MAE, **change})
    assert main_program(argv) == 2
    error = capsys.readouterr().err
    assert "of another run" in error and next(iter(change)) in error and len(error.splitlines()) == 1


def test_scoring_a_pretrained_model_needs_a_head(pretrained, main_program, folder, capsys):
    argv = flags(data_path=folder, model="test_vit", eval=True, resume=pretrained.output / "checkpoint-last.pth")
    assert main_program(argv) == 1 and "has no head" in capsys.readouterr().err


def test_a_probe_needs_a_linear_classifier(main_program, folder, tmp_path, capsys):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, model="test_vit", linear_probe="batchnormal")
    assert main_program(argv) == 2 and "linear_probe" in capsys.readouterr().err
