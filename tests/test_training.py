"""Training and evaluation end to end, in this process, on tiny images and models."""

import hashlib
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import flags, same, write_images
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

import utils
from curriculum import CurriculumSampler, RandAugment, build_plan
from curriculum.sampler import derive_seed
from engine import evaluate
from inputs.transforms import TrainTransform
from models import create_model
from tests.tiny_models import plain
from training import session as session_module
from training import validation
from training.tasks import Classification

RECORD = ["epoch", "step", "start", "progress", "equivalent_epochs", "input_size", "magnitude", "lr", "train_loss"]
RECORD += ["grad_norm", "weight_norm", "memory_gib", "images", "images_per_s", "seconds"]
SCORES = ["eval_size", "eval_images", "test_loss", "test_acc1", "test_acc5"]
EMA_SCORES = ["test_loss_ema", "test_acc1_ema", "test_acc5_ema"]
QUIET = {"mixup": 0, "cutmix": 0, "reprob": 0}  # no mixing or erasing: what a batch does is the sum over its images


@pytest.fixture
def plan():
    return build_plan("efficienttrain++", epochs=2, num_images=48, batch_size=8, base_size=64, lr=1e-3)


@pytest.fixture
def weights_after_each_step(monkeypatch):
    """Fills a list with (learning rates, weights) after every optimizer step of a run."""
    seen = []
    original = session_module.Session.after_step

    def record(self, lr, images):
        model = session_module.unwrap(self.training.model)
        rates = [group["lr"] for group in self.training.optimizer.param_groups]
        seen.append((rates, {key: value.clone() for key, value in model.state_dict().items()}))
        return original(self, lr, images)

    monkeypatch.setattr(session_module.Session, "after_step", record)
    return seen


def test_output_folder(train, main_program, folder, plan, capsys):
    run = train(model_ema=True, seed=3)
    printed = capsys.readouterr().out
    names = {path.name for path in run.output.iterdir()}
    checkpoints = {"checkpoint-last.pth", "checkpoint-best.pth", f"checkpoint-{plan.total_steps}.pth"}
    report = {"report.html", "validation.json", "plan.svg", "environment.json", "samples"}
    assert names == {"config.yaml", "plan.json", "log.txt", "tensorboard", "run.lock", *checkpoints, *report}
    assert list((run.output / "tensorboard").iterdir())

    records = run.log()
    assert [record["step"] for record in records] == [epoch.first_step + epoch.steps for epoch in plan]
    for record, epoch in zip(records, plan):
        evaluated = "eval_size" in record
        assert list(record) == RECORD + (SCORES + EMA_SCORES if evaluated else [])
        assert (record["epoch"], record["input_size"], record["magnitude"]) == (
            epoch.index,
            epoch.input_size,
            epoch.magnitude,
        )
        assert record["images"] == 8 * epoch.steps
        assert record["progress"] == pytest.approx(epoch.stop)
        assert record["lr"] == plan.lr_at(record["step"] - 1)
        assert record["images_per_s"] > 0 and math.isfinite(record["train_loss"])
        if evaluated:
            assert record["eval_images"] == 15 and record["test_acc5"] == 100.0
    assert ["eval_size" in record for record in records] == [False, False, False, True, True]  # 50 % and the end
    assert [record["eval_size"] for record in records if "eval_size" in record] == [48, 64]
    assert records[-1]["equivalent_epochs"] == pytest.approx(2, abs=1 / 6)

    assert main_program(flags(data_path=folder, plan="json", model_ema=True, seed=3)) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = json.loads((run.output / "plan.json").read_text())
    assert kept.pop("changes") == [] and len(lines) == 1 and json.loads(lines[0]) == kept  # a plan has no history yet
    settings = yaml.safe_load((run.output / "config.yaml").read_text())
    assert settings["seed"] == 3 and settings["output_dir"] == str(run.output)

    assert "curriculum efficienttrain++" in printed  # the table comes first
    assert printed.count("  pass ") == plan.total_steps // 4  # progress lines
    assert "evaluation at 48" in printed and "evaluation at 64" in printed


def test_checkpoint_keys(train):
    state = train(model_ema=True).state()
    promised = {"format_version", "model", "model_ema", "optimizer", "scaler", "step", "epoch", "best", "meters"}
    assert promised | {"config"} <= set(state)
    assert list(state["model"]) == list(create_model("tests.tiny_models:convnet", 3, 64).state_dict())
    assert train("plain").state()["model_ema"] is None


def test_steps_are_those_of_a_plain_loop(train, folder, plan):
    """A loop written out with torch alone, on the images that the sampler and the transform give, ends the same."""

    from curriculum.sampler import derive_seed

    run = train(model="tests.tiny_models:plain", **QUIET, weight_decay=0.05, opt_betas=[0.9, 0.95], clip_grad=0.5)
    images = ImageFolder(folder / "train").samples
    transform = TrainTransform(64, "lanczos", RandAugment())
    torch.manual_seed(derive_seed(0))
    model = plain(num_classes=3)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0}], betas=(0.9, 0.95))
    sampler = CurriculumSampler(plan, seed=0, micro_batch=8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    norms = []
    for step, batch in enumerate(sampler):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr_at(step)
            if group["weight_decay"]:
                group["weight_decay"] = 0.05
        pixels = [transform(Path(images[i][0]).read_bytes(), size, m, seed) for i, size, m, seed in batch]
        inputs = torch.stack([(image / 255.0 - mean) / std for image in pixels])
        targets = torch.tensor([images[i][1] for i, *_ in batch])
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets, label_smoothing=0.1).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    for key, value in run.state()["model"].items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-4, atol=1e-6)
    for record, epoch in zip(run.log(), plan, strict=True):
        mean = sum(norms[epoch.first_step : record["step"]]) / epoch.steps
        assert record["grad_norm"] == pytest.approx(mean, rel=1e-3)


def test_test_scores_are_those_of_torchvision(train, folder):
    """The last record's loss and accuracy, by hand: resize to 64 / 0.875, centre crop, mean over all images."""
    run = train()
    model = create_model("tests.tiny_models:convnet", 3, 64)
    model.load_state_dict(run.state()["model"])
    model.eval()
    transform = transforms.Compose(
        [
            transforms.Resize(73, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted((folder / "val").glob("*/*.jpg"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    targets = torch.tensor([int(file.parent.name[-1]) for file in files])
    with torch.no_grad():
        logits = model(images)
    last = run.log()[-1]
    assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), abs=2e-3)
    assert last["test_acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item(), abs=7)


def test_evaluate_mode_scores_what_training_did(train, main_program, folder, capsys):
    run = train(model_ema=True)
    capsys.readouterr()
    last = run.log()[-1]
    path = run.output / "checkpoint-last.pth"
    assert main_program(flags(data_path=folder, eval=True, resume=path, model_ema=True)) == 0
    raw, ema = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for result, suffix in ((raw, ""), (ema, "_ema")):
        assert (result["eval_size"], result["images"]) == (64, 15)
        assert result["loss"] == pytest.approx(last["test_loss" + suffix], abs=1e-5)
        assert result["acc1"] == last["test_acc1" + suffix]
    assert main_program(flags(data_path=folder, eval=True, finetune=path, eval_size=48)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval_size"] == 48


def test_best_is_the_best_at_the_base_size_and_survives_a_resume(train, tmp_path, monkeypatch):
    scores = iter([90.0, 91.0, 92.0, 95.0, 10.0, 30.0, 20.0, 30.0])  # at sizes 32, 32, 48, 48, then 64
    asked = []

    def fake(model, loader, finish, size, device, task, amp="none", **_):
        asked.append(size)
        return {"loss": 1.0, "acc1": next(scores), "acc5": 100.0, "images": 15}

    monkeypatch.setattr(validation, "evaluate", fake)
    settings = {"epochs": 3, "eval_interval": "1 steps", "save_interval": "1 steps", "keep_checkpoints": 100}
    run = train(**settings)
    assert asked == sorted(asked) and set(asked) == {32, 48, 64} and asked.count(64) >= 2
    best = run.state()["best"]
    at_base = [record for record in run.log() if record.get("eval_size") == 64]
    expected = max(at_base, key=lambda record: record["test_acc1"])
    assert best == {"acc1": expected["test_acc1"], "step": expected["step"], "weights": "model", "eval_size": 64}
    assert run.state("checkpoint-best.pth")["step"] == expected["step"] < run.state()["step"]

    # Going on from there, what is no better leaves it; a tie too.
    before = (run.output / "checkpoint-best.pth").read_bytes()
    scores = iter([best["acc1"]] * 10)
    for path in (run.output / "checkpoint-last.pth", run.output / f"checkpoint-{run.state()['step']}.pth"):
        path.unlink()
    train(**settings)
    assert run.state()["best"] == best
    assert (run.output / "checkpoint-best.pth").read_bytes() == before


@pytest.mark.parametrize("counts", [[20, 12], [6] * 7])
def test_any_number_of_classes(train, tmp_path, counts):
    """Two classes, where all count as the top 5, and seven, where five do."""
    write_images(tmp_path / "data" / "train", counts)
    write_images(tmp_path / "data" / "val", [2] * len(counts), seed=1)
    run = train(data_path=tmp_path / "data", epochs=1)
    last = run.log()[-1]
    assert run.state()["model"]["head.weight"].shape[0] == len(counts)
    assert last["eval_images"] == 2 * len(counts)
    assert last["test_acc5"] == 100.0 if len(counts) == 2 else 0 < last["test_acc5"] <= 100
    more = train("more", data_path=tmp_path / "data", epochs=1, num_classes=12)
    assert more.state()["model"]["head.weight"].shape[0] == 12


def test_top5_counts_five(train):
    """Of seven classes with known logits."""

    class Known(nn.Module):
        def forward(self, x):
            return torch.arange(7.0).expand(len(x), 7)  # class 6 first, 0 and 1 not among the first five

    class Set(torch.utils.data.Dataset):
        def __len__(self):
            return 14

        def __getitem__(self, index):
            return torch.zeros(3, 8, 8, dtype=torch.uint8), index % 7, index

    class Passing:
        def evaluate(self, images, size, radius):
            return images.float()

    loader = torch.utils.data.DataLoader(Set(), batch_size=4)
    result = evaluate(Known(), loader, Passing(), 8, torch.device("cpu"), Classification())
    assert result["acc1"] == pytest.approx(100 / 7) and result["acc5"] == pytest.approx(500 / 7)
    logits = torch.arange(7.0).expand(7, 7)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, torch.arange(7)).item(), rel=1e-5)
    for indices in (range(13), [*range(13), 12]):  # one left out, one twice: as padding across processes would
        wrong = torch.utils.data.DataLoader(Set(), batch_size=4, sampler=indices)
        with pytest.raises(RuntimeError, match="the data set has 14"):
            evaluate(Known(), wrong, Passing(), 8, torch.device("cpu"), Classification())


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_accumulation_equals_one_large_batch(train, clip_grad):
    common = {"model": "tests.tiny_models:plain", "clip_grad": clip_grad, **QUIET}
    whole = train("whole", micro_batch=8, **common).state()["model"]
    parts = train("parts", micro_batch=2, **common).state()["model"]
    other = train("other", micro_batch=2, seed=1, **common).state()["model"]
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other["stem.weight"], whole["stem.weight"], rtol=1e-2, atol=1e-4)  # negative control


def test_moving_average_and_its_integer_buffers(train, weights_after_each_step):
    run = train(model_ema=True, model_ema_decay=0.8)
    state = run.state()
    assert state["model"]["norm.num_batches_tracked"] > 0
    torch.manual_seed(derive_seed(0))
    expected = create_model("tests.tiny_models:convnet", 3, 32).state_dict()
    for _rates, weights in weights_after_each_step:
        for key, value in weights.items():
            if value.is_floating_point():
                expected[key] = 0.8 * expected[key] + 0.2 * value
            else:
                expected[key] = value
    for key, value in state["model_ema"].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
        assert value.dtype == state["model"][key].dtype
    assert state["model_ema"]["norm.num_batches_tracked"] == state["model"]["norm.num_batches_tracked"]
    assert not torch.equal(state["model_ema"]["stem.weight"], state["model"]["stem.weight"])


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_clipping_bounds_the_step_in_any_precision(train, weights_after_each_step, amp):
    """SGD without momentum moves by learning rate times gradient, whose norm is at most the bound."""
    common = {
        "opt": "momentum",
        "momentum": 0,
        "weight_decay": 0,
        "lr": 0.5,
        "warmup_epochs": 0,
        "amp": amp,
        "epochs": 1,
    }
    common["model"] = "tests.tiny_models:plain"
    moves = {}
    for clip in (1e-3, None):
        weights_after_each_step.clear()
        train(f"clip-{clip}", clip_grad=clip, **common)
        moves[clip] = [
            math.sqrt(sum((after[key] - before[key]).double().square().sum().item() for key in after)) / rates[0]
            for (_, before), (rates, after) in itertools.pairwise(weights_after_each_step)
        ]
    assert max(moves[1e-3]) <= 1e-3 * 1.01
    assert sum(move > 1e-3 for move in moves[None]) > len(moves[None]) / 2  # negative control
    assert sum(move > 0.99e-3 for move in moves[1e-3]) > len(moves[1e-3]) / 2


@pytest.mark.parametrize(
    "settings",
    [
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"channels_last": True},
        {"opt": "lamb"},
        {"opt": "sgd", "weight_decay_end": 0.2},
        {"curriculum": "none", "magnitude": "none"},
        {"curriculum": "efficienttrain", "model_ema": True},
        {"curriculum": "efficienttrain-linear", "epochs": 3},
        {"operator": "bicubic", "magnitude": "steps", "epochs": 4},
        {"early_large_batch": True, "epochs": 3},
        {"mixup": 0, "cutmix": 0, "smoothing": 0},
        {"input_size": 60, "num_workers": 2},
        {"eval_size": 48},
        {"eval_size": 48, "operator": "fourier"},
        {"curriculum": "progressive", "epochs": 4},
        {"curriculum": "tests/golden/low_pass.yaml", "eval_interval": "10%"},
        {"batch_size": 48, "micro_batch": None, "epochs": 4},
    ],
    ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()),
)
def test_settings_train(train, settings):
    run = train(**settings)
    state = run.state()
    initial = create_model("tests.tiny_models:convnet", 3, 32).state_dict()
    assert not torch.equal(state["model"]["stem.weight"], initial["stem.weight"])
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    log = run.log()
    assert all(math.isfinite(record["train_loss"]) for record in log)
    assert log[-1]["progress"] == 1.0 and log[-1]["test_loss"] < 3
    if settings.get("weight_decay_end"):
        decays = {group["weight_decay"] for group in state["optimizer"]["param_groups"]}
        assert 0 in decays and max(decays) == pytest.approx(0.2, rel=0.05)
    if "low_pass" in str(settings.get("curriculum")):  # what was scored on filtered images does not compete
        assert [record.get("radius") for record in log] == [8.0, None]
        assert state["best"]["acc1"] == log[-1]["test_acc1"] and state["best"]["step"] == log[-1]["step"]
    if settings.get("eval_size"):
        assert {record.get("eval_size", 48) for record in log} == {48} and state["best"]["eval_size"] == 48


@pytest.mark.parametrize("model", ["test_convnext", "test_vit", "test_resnet"])
def test_timm_models_train_and_learn(train, model):
    """A ConvNet, a Transformer whose position embedding follows the size, and one with BatchNorm."""
    run = train(model=model, lr=2e-3, drop_path=0.1 if model != "test_resnet" else 0)
    state = run.state()
    moments = state["optimizer"]["state"]
    shapes = sorted(tuple(value.shape) for value in state["model"].values() if value.is_floating_point())
    for moment in moments.values():
        assert tuple(moment["exp_avg"].shape) in shapes
    if model == "test_vit":
        assert state["model"]["pos_embed"].shape[1] == 1 + (64 // 16) ** 2
    assert run.log()[-1]["test_acc1"] > 60  # of three classes


def test_same_seed_same_run_whatever_the_workers(train):
    first = train("first", num_workers=0).result()
    second = train("second", num_workers=2).result()
    other = train("other", seed=1).result()
    assert same(first, second)
    assert not same(first, other)  # negative control


def test_compiled_model_is_the_same_model(train, monkeypatch, caplog):
    """Through a backend that changes nothing: wrapping, size changes and the names in checkpoints."""
    caplog.set_level("WARNING", "torch.__trace")  # tracing for pytest's log capture takes minutes

    backend = []

    def compile_eagerly(model, **options):
        backend.append(options)
        return original(model, backend="eager", **options)

    original = torch.compile
    monkeypatch.setattr(utils.torch, "compile", compile_eagerly)
    compiled = train("compiled", compile=True).result()
    monkeypatch.undo()
    usual = train("usual").result()
    assert same(compiled["state"]["model"], usual["state"]["model"])
    assert backend == [{"dynamic": False}] * 3  # once per input size


@pytest.mark.extended
def test_compile_with_the_real_compiler(train):
    # Compiled dropout draws other numbers, and AdamW blows up the rounding of gradients that are zero by right, as that
    # of a bias before a BatchNorm.
    settings = {"epochs": 1, "model": "tests.tiny_models:plain"}
    compiled = train("compiled", compile=True, **settings).state()["model"]
    usual = train("usual", **settings).state()["model"]
    for key, value in usual.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)


def test_images_of_any_mode(train, tmp_path):
    data = tmp_path / "data"
    write_images(data / "train", [10, 10])
    write_images(data / "val", [3, 3], seed=1)
    noise = Image.effect_noise((40, 30), 80)
    rgb = noise.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    odd = {
        "grey.jpg": noise,
        "grey.png": noise,
        "cmyk.jpg": rgb.convert("CMYK"),
        "palette.png": rgb.convert("P"),
        "alpha.png": rgb.convert("RGBA"),
        "grey_alpha.png": rgb.convert("LA"),
        "bits.png": rgb.convert("1"),
        "sixteen.png": Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16)),
        "picture.webp": rgb,
        "picture.bmp": rgb,
        "picture.tif": rgb,
        "one_pixel.png": rgb.crop((0, 0, 1, 1)),
        "thin.png": rgb.resize((200, 2)),
        "UPPER.JPG": rgb,
    }
    for split in ("train", "val"):
        for name, image in odd.items():
            image.save(data / split / "class_0" / name)
        rgb.save(data / split / "class_1" / "turned.jpg", exif=exif)
    run = train(data_path=data, epochs=2)
    assert run.log()[-1]["eval_images"] == 6 + len(odd) + 1


def test_cifar_in_its_own_file_format(train, tmp_path, monkeypatch):
    """CIFAR-10's batches of pickled arrays, 20 images each; the checksums are those of these files."""
    from torchvision.datasets import CIFAR10

    root = tmp_path / "cifar"
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name in ("data_batch_1", "data_batch_2", "test_batch", "batches.meta"):
        content = {"label_names": [f"class{k}" for k in range(10)]}
        if name != "batches.meta":
            content = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    run = train(data_set="cifar10", data_path=root, input_size=32, epochs=1)
    assert run.log()[-1]["eval_images"] == 20
    assert run.state()["model"]["head.weight"].shape[0] == 10
    assert run.state()["classes"] == [f"class{k}" for k in range(10)]


def test_finetune_from_a_file(train, tmp_path):
    first = train("first")
    still = {"lr": 1e-12, "min_lr": 0, "weight_decay": 0, "model": "tests.tiny_models:convnet"}
    second = train("second", finetune=first.output / "checkpoint-last.pth", **still)
    control = train("control", **still)
    for key in ("stem.weight", "head.weight"):
        torch.testing.assert_close(second.state()["model"][key], first.state()["model"][key], rtol=0, atol=1e-6)
        assert not torch.allclose(control.state()["model"][key], first.state()["model"][key], atol=1e-3)
    # Another number of classes: the body is taken over, the head is new.
    write_images(tmp_path / "four" / "train", [6] * 4)
    write_images(tmp_path / "four" / "val", [2] * 4)
    third = train("third", finetune=first.output / "checkpoint-last.pth", data_path=tmp_path / "four", **still)
    torch.testing.assert_close(
        third.state()["model"]["stem.weight"], first.state()["model"]["stem.weight"], rtol=0, atol=1e-6
    )
    assert third.state()["model"]["head.weight"].shape[0] == 4


def test_a_run_that_is_done_stays_done(train, capsys):
    first = train().result()
    log = (train().output / "log.txt").read_text()
    assert same(first, train().result()) and log.count("\n") == len(first["log"])
    assert "done" in capsys.readouterr().out


def test_the_time_of_a_pass_is_that_of_its_training(train, monkeypatch):
    """Taken before the evaluation starts: an hour that passes in it is not the pass's."""
    import main

    clock, hour = [0.0], 3600.0
    original = main.validate

    def validate(session, record):
        clock[0] += hour
        return original(session, record)

    real = session_module.time.perf_counter
    monkeypatch.setattr(main, "validate", validate)
    monkeypatch.setattr(session_module.time, "perf_counter", lambda: real() + clock[0])
    records = train(epochs=1).log()
    assert clock[0] >= hour and all(record["seconds"] < hour for record in records)
