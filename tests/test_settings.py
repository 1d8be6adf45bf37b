"""Every setting reaches what it is for: each field of Config, with a value that is not the default, in the built parts.

`tests/mutations.py` disconnects them one by one, and `scripts/test.sh --extended` sees that each is missed here.
"""

import inspect
import io
import json
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY, script, write_images

import commands.dense
import commands.evaluate
import commands.plan
import commands.predict
import datasets
import main
import training.build
import training.scenes
import training.session
import training.stopping as stopping
import training.validation
import utils
from commands.predict import predict
from config import Config, UsageError, to_yaml
from curriculum.sampler import derive_seed
from datasets import build_source
from engine import forward_loss
from inputs.finish import IMAGENET_MEAN, IMAGENET_STD, Finish
from models import load_weights
from training.build import make_batches, make_finish, make_train_set

CPU = utils.Topology(0, 1, torch.device("cpu"))
TRAIN = main.train  # some cases put another in its place
MAE = {"model": "test_vit", "task": "mae", "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "magnitude": "none"}
VIT = {"model": "test_vit"}
UNMIXED = {"mixup": 0.0, "cutmix": 0.0}
CASES = {}


class Parts:
    """A run's parts, built from settings when they are asked for."""

    def __init__(self, settings):
        self.config = Config(**{**TINY, **settings})

    @cached_property
    def source(self):
        return build_source(self.config, train=True)

    @cached_property
    def held_out(self):
        return build_source(self.config, train=False)

    @cached_property
    def session(self):
        writer = main.OneWriter(Path(self.config.output_dir), CPU)
        session = main.prepare(self.config, CPU, writer)
        session.agreement.close()
        return session

    @property
    def training(self):
        return self.session.training

    @property
    def plan(self):
        return self.session.plan

    @property
    def model(self):
        return utils.unwrap(self.training.model)

    @property
    def group(self):
        """The optimizer's settings of the weights that decay."""
        return max(self.training.optimizer.param_groups, key=lambda group: group["weight_decay"])

    @cached_property
    def data(self):
        return make_train_set(self.config, self.plan, self.source)

    @property
    def transform(self):
        return getattr(self.data.transform, "transform", self.data.transform)

    @cached_property
    def finished(self):
        """Images and targets of eight groups of four as the model gets them."""
        images = torch.arange(32 * 3 * 32 * 32).remainder_(251).to(torch.uint8).view(32, 3, 32, 32)
        finish = make_finish(self.config, 5, "lanczos")
        return finish.train(images, torch.arange(32) % 5, 32, range(8), 4)

    def forward(self):
        """The dtype and the memory format with which a convolution gives its output in a step of training."""
        seen = []
        training, record = self.training, self.plan.records[0]
        size = self.plan.loaded_size(record.input_size)
        hook = next(part for part in self.model.modules() if isinstance(part, torch.nn.Conv2d))
        hook.register_forward_hook(lambda module, inputs, output: seen.append(output))
        images = torch.zeros(4, 3, size, size, dtype=torch.uint8)
        images, targets = training.finish.train(images, torch.zeros(4).long(), record.input_size, [0], 4)
        forward_loss(training, images, targets, 0, range(1), [0])
        return seen[0].dtype, is_last(seen[0])


def wired(setting, value, read, want=None, **others):
    """``read`` of the parts gives ``want`` (``value``) under --setting value, and something else under the default."""

    def case(make):
        expected = value if want is None else want
        assert read(make(**others)) != expected, "the default gives the same: choose another value"
        assert read(make(**{**others, setting: value})) == expected

    assert setting not in CASES
    CASES[setting] = case


def special(setting):
    def keep(case):
        assert setting not in CASES
        CASES[setting] = case

    return keep


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A run that was stopped in the middle of a pass, at step 4."""
    output = tmp_path_factory.mktemp("begun")
    settings = {"model_ema": True, "stop_after": "4 steps", "data_path": str(folder), "output_dir": str(output)}
    assert TRAIN(Config(**{**TINY, **settings}), CPU) == 0
    return str(output / "checkpoint-last.pth")


class Make:
    """``make(setting=value, ...)`` -> :class:`Parts`, each in an output folder of its own."""

    def __init__(self, request):
        self.request, self.count = request, iter(range(100))
        self.folder, self.tmp_path, self.monkeypatch, self.capsys = map(
            request.getfixturevalue, ("folder", "tmp_path", "monkeypatch", "capsys")
        )

    def __call__(self, **settings):
        output = self.tmp_path / f"run{next(self.count)}"
        return Parts({"data_path": str(self.folder), "output_dir": str(output), **settings})

    @property
    def checkpoint(self):
        return self.request.getfixturevalue("checkpoint")


@pytest.fixture
def make(request, monkeypatch):
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    return Make(request)


@pytest.mark.parametrize("setting", Config.__dataclass_fields__)
def test_setting(setting, make):
    assert setting in CASES, f"--{setting} has no case here: build the parts and look whether its consumer got it"
    CASES[setting](make)


def test_every_case_is_of_a_setting():
    assert CASES.keys() == Config.__dataclass_fields__.keys()


# -- the plan ----------------------------------------------------------------------------------------------------------
wired("curriculum", "efficienttrain", lambda p: p.plan.curriculum.name)
wired("epochs", 3, lambda p: p.plan.epochs)
wired("warmup_epochs", "9%", lambda p: round(p.plan.warmup_progress, 9), 0.09)
wired("magnitude", "constant", lambda p: p.plan.curriculum.magnitude)
wired("max_magnitude", 4.0, lambda p: p.plan.records[-1].magnitude, 4.0, magnitude="constant")
wired(
    "operator",
    "fourier",
    lambda p: (p.plan.operator, p.training.finish.fourier, p.transform.operator),
    ("fourier", True, "fourier"),
)
wired("early_large_batch", True, lambda p: p.plan.stages[0].batch_size, 32)
wired("lr_rule", "linear", lambda p: p.plan.lr_rule)
wired("batch_size", 16, lambda p: p.plan.batch_size)
wired("lr", 0.5, lambda p: max(p.plan.lr_at(step) for step in range(p.plan.total_steps)), 0.5, warmup_epochs="1 steps")
wired("min_lr", 1e-4, lambda p: p.plan.min_lr)
wired("weight_decay", 0.3, lambda p: (p.plan.weight_decay_at(3), p.group["weight_decay"]), (0.3, 0.3))
wired("weight_decay_end", 0.4, lambda p: p.plan.weight_decay_at(p.plan.total_steps))
wired("replay", [2, 1, 1], lambda p: [stage.replay for stage in p.plan.stages])
wired("input_size", 48, lambda p: (p.plan.base_size, p.training.finish.base_size), (48, 48))
wired("seed", 7, lambda p: (p.training.sampler.seed, first_weight(p)), (7, None))
wired("micro_batch", 2, lambda p: p.training.sampler.micro_batch)
wired("forward_batch", {32: 4}, lambda p: p.training.sampler.forward_batch)


def first_weight(p):
    """None if the weights are those that the run's seed draws."""
    torch.manual_seed(derive_seed(7))
    drawn = training.build.make_model(p.config, 3, p.model.input_size)
    return None if torch.equal(drawn.stem.weight, p.model.stem.weight) else "drawn from another seed"


def is_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


# -- the model ---------------------------------------------------------------------------------------------------------
wired("model", "tests.tiny_models:plain", lambda p: type(p.model).__name__, "Plain")
wired("model_args", {"width": 5}, lambda p: p.model.stem.out_channels, 5)
wired("num_classes", 9, lambda p: p.model.head.out_features)
wired("drop_path", 0.25, lambda p: max(getattr(part, "drop_prob", 0.0) for part in p.model.modules()), **VIT)
wired("task", "mae", lambda p: type(p.model).__name__, "MaskedAutoencoder", **{**MAE, "task": "supervised"})
wired("mae_target", "hog", lambda p: p.model.target, **MAE)
wired("mask_ratio", 0.5, lambda p: p.model.mask_ratio, **MAE)
wired(
    "decoder", (1, 32, 4), lambda p: (len(p.model.decoder_blocks), p.model.decoder_embed.out_features), (1, 32), **MAE
)
wired("model_ema", True, lambda p: p.training.ema is not None)
wired("model_ema_decay", 0.5, lambda p: p.training.ema.decay, model_ema=True)
wired(
    "channels_last",
    True,
    lambda p: (is_last(p.model.stem.weight), p.forward()[1], is_last(p.finished[0])),
    (True, True, True),
)
wired("compile", True, lambda p: type(p.training.model).__name__, "OptimizedModule")
wired(
    "linear_probe",
    True,
    lambda p: [n for n, w in p.model.named_parameters() if w.requires_grad],
    ["head.weight", "head.bias"],
)


@special("finetune")
def _(make):
    parts = make(finetune=make.checkpoint)
    assert torch.equal(parts.model.stem.weight, torch.load(make.checkpoint, weights_only=True)["model"]["stem.weight"])
    assert not torch.equal(make().model.stem.weight, parts.model.stem.weight)


@special("head_init_scale")
def _(make):
    got = []
    make.monkeypatch.setattr(main, "load_weights", lambda *a, **k: got.append(k) or load_weights(*a, **k))
    assert make(finetune=make.checkpoint, head_init_scale=0.25).model
    assert [words["head_init_scale"] for words in got] == [0.25]


# -- optimization ------------------------------------------------------------------------------------------------------
wired("opt", "sgd", lambda p: type(p.training.optimizer).__name__, "SGD")
wired("opt_eps", 1e-3, lambda p: p.group["eps"])
wired("opt_betas", (0.8, 0.9), lambda p: p.group["betas"])
wired("momentum", 0.5, lambda p: p.group["momentum"], opt="sgd")
wired(
    "fallback_lr_scale",
    0.25,
    lambda p: {group["matrix"]: group["lr_scale"] for group in p.training.optimizer.param_groups},
    {True: 1.0, False: 0.25},
    opt="muon",
    **VIT,
)
wired("layer_decay", 0.5, lambda p: p.training.optimizer.param_groups[0]["lr_scale"] < 1, True, **VIT)
wired("clip_grad", 0.5, lambda p: p.training.clip_grad)
wired("amp", "bf16", lambda p: p.forward()[0], torch.bfloat16)
wired("on_nonfinite", "skip", lambda p: (p.training.skip_nonfinite, p.training.scaler.is_enabled()), (True, True))

# -- what an image goes through ----------------------------------------------------------------------------------------
wired("crop_scale", (0.5, 0.75), lambda p: p.transform.scale)
wired("crop_ratio", (0.5, 2.0), lambda p: p.transform.ratio)
wired("train_interpolation", "random", lambda p: p.transform.interpolation)
wired("hflip", 0.125, lambda p: p.transform.flip)
wired(
    "color_jitter", 0.25, lambda p: (p.transform.color_jitter, p.data.transform.slots), (0.25, 5), augment_on="device"
)
wired("pipeline", "fast", lambda p: p.transform.pipeline)
wired("max_bad", 0.25, lambda p: p.data.bad_files.max_fraction)
wired("smoothing", 0.5, lambda p: (p.training.task.smoothing, round(p.finished[1].min().item(), 6)), (0.5, 0.1))
wired("reprob", 1.0, lambda p: erased(p), 32, **UNMIXED)
wired("mixup_prob", 0.0, lambda p: p.finished[1].max(1).values.min().item() > 0.9, True)
wired("mixup", 0.0, lambda p: same_as(p, mixup=0.0), True)
wired("cutmix", 0.0, lambda p: same_as(p, cutmix=0.0), True)
wired("mixup_switch_prob", 0.0, lambda p: same_as(p, switch_prob=0.0), True)


def erased(p):
    """How many of 32 images were touched."""
    untouched = Parts({"reprob": 0.0, **UNMIXED}).finished[0]
    return (p.finished[0] != untouched).flatten(1).any(1).sum().item()


def same_as(p, **arguments):
    """Whether images are mixed as by a Finish with other arguments than the papers'."""
    images = torch.arange(32 * 3 * 32 * 32).remainder_(251).to(torch.uint8).view(32, 3, 32, 32)
    other = Finish(5, base_size=64, **{"erasing": 0.25, "smoothing": 0.1, **arguments})
    expected = other.train(images, torch.arange(32) % 5, 32, range(8), 4)
    return all(torch.equal(a, b) for a, b in zip(p.finished, expected))


def asked_of_loader(p, name):
    """An argument of the loop over the data, with which the run asks for its batches."""
    taken = {}

    def spy(*args, **kwargs):
        taken.update(inspect.signature(original).bind(*args, **kwargs).arguments)
        return iter(())

    original, training.build.training_batches = training.build.training_batches, spy
    try:
        make_batches(p.config, p.plan, p.training.sampler, p.source, torch.device("cpu"))
    finally:
        training.build.training_batches = original
    return taken[name]


wired("num_workers", 3, lambda p: asked_of_loader(p, "workers"))
wired("replay_memory", 1.5, lambda p: asked_of_loader(p, "replay_memory"), 1.5e9)
wired(
    "augment_on",
    "device",
    lambda p: (asked_of_loader(p, "augment") is not None, type(p.data.transform).__name__),
    (True, "DeviceTransform"),
)


@special("crop_pct")
def _(make):
    class Reached(Exception):
        pass

    def stop(base, size, operator, crop_pct):
        raise Reached(crop_pct)

    def validated(p):
        with p.session as session:
            session.enter(p.plan.records[0])
            training.validation.validate(session, p.plan.records[0])

    consumers = {
        training.build: validated,
        commands.evaluate: lambda p: commands.evaluate.evaluate_weights(p.config, CPU),
        commands.predict: lambda p: predict(p.config, {"model", "crop_pct"}, CPU),
    }
    for module, call in consumers.items():
        make.monkeypatch.setattr(module, "EvalTransform", stop)
        weights = {} if module is training.build else {"resume": make.checkpoint, "predict": str(make.folder)}
        with pytest.raises(Reached, match=r"0\.5"):
            call(make(crop_pct=0.5, **weights))


def normalised(setting, value, default):
    """Training, fine-tuning, --eval and --predict all normalise by what is stated, and else by the weights' own."""

    @special(setting)
    def _(make):
        taken, checkpoint = [], make.checkpoint  # the run that makes it is not what is looked at
        spy = lambda **words: taken.append(words[setting]) or Finish(**words)  # noqa: E731
        make.monkeypatch.setattr(training.build, "Finish", spy)
        for stated in ({setting: value}, {}):
            taken.clear()
            assert make(**stated).training and make(finetune=checkpoint, **stated).training
            weights = {"resume": checkpoint, "input_size": 32, "predict": str(make.folder / "val"), **stated}
            assert commands.evaluate.evaluate_weights(make(**weights).config, CPU) == 0
            assert predict(make(**weights).config, {"model", *stated}, CPU) == 0
            assert len(taken) >= 4 and set(taken) == {stated.get(setting, default)}


normalised("mean", (0.5, 0.25, 0.125), IMAGENET_MEAN)
normalised("std", (0.5, 0.25, 0.125), IMAGENET_STD)


# -- where the data lie ------------------------------------------------------------------------------------------------
wired("train_split", "val", lambda p: len(p.source), 15)
wired("val_split", "train", lambda p: len(p.held_out), 48)
wired("val_per_class", 1, lambda p: len(p.source) + len(p.held_out), 48)
wired("val_share", "10%", lambda p: len(p.source) + len(p.held_out), 48)
wired("labels", "table.csv", lambda p: opened(p)["table"], ("table.csv", None, None, False))
wired("label_columns", ["a", "b"], lambda p: opened(p)["table"][1], labels="table.csv")
wired("label_separator", "|", lambda p: opened(p)["table"][2], labels="table.csv")
wired("label_key", "species", lambda p: opened(p)["key"])


def opened(p):
    """With what the training set is opened: the arguments of its table, if there is one, and the key of labels."""
    taken = {}
    tables, sources = datasets.read_table, datasets.open_source
    datasets.read_table = lambda *arguments: arguments
    datasets.open_source = lambda *arguments, **more: (
        taken.update(table=arguments[5], key=arguments[6]) or sources(*arguments[:5])
    )
    try:
        assert len(p.source) == 48
    finally:
        datasets.read_table, datasets.open_source = tables, sources
    return taken


@special("data_path")
def _(make):
    write_images(make.tmp_path / "other" / "train", [2, 2])
    assert len(make(data_path=str(make.tmp_path / "other")).source) == 4


@special("data_set")
def _(make):
    for name in ("tar", "cifar10"):
        with pytest.raises(UsageError):
            assert make(data_set=name).source
    assert len(make().source) == 48


@special("class_map")
def _(make):
    (make.tmp_path / "map.txt").write_text("class_0\nclass_2\tlast\n")
    parts = make(class_map=str(make.tmp_path / "map.txt"))
    assert list(parts.source.classes) == list(parts.held_out.classes) == ["class_0", "last"]


# -- the course of a run -----------------------------------------------------------------------------------------------
wired("stop_after", "5 steps", lambda p: p.session.end, 5)
wired("patience", "5%", lambda p: judged(p), True)
wired("stop_if", "test_acc1 < 5 after 0%", lambda p: judged(p), True)
wired("eval_interval", "1%", lambda p: p.session.evaluated == list(range(len(p.plan))), True)
wired("save_interval", "2 steps", lambda p: [p.session.saver.due(step) for step in (1, 2, 3, 4)], [False, True] * 2)
wired("timeout", 2.0, lambda p: p.session.watchdog.timeout, 120.0)
wired("keep_checkpoints", 3, lambda p: len(numbered(p)), epochs=1, save_interval="1 steps")


def judged(p):
    """Whether a run ends that scored 9 % at its start and scores 1 % at step 20."""
    early = p.session.early_stop
    early.standing = {"stage": 0, "score": 9.0, "step": 0}
    return early.judge(p.plan.records[0], {"step": 20, "test_acc1": 1.0}) is not None


@special("wandb")
def _(make):
    opened = []
    silent = SimpleNamespace(draw=lambda *_: None, close=lambda: None)
    make.monkeypatch.setattr(training.session, "WandB", lambda name, folder, _: opened.append((name, folder)) or silent)
    make.monkeypatch.setattr(main, "check_wandb", lambda name: opened.append(name))
    for stated in ({}, {"wandb": "demo"}):
        parts = make(**stated)
        with parts.session:
            pass
    assert opened == ["demo", ("demo", parts.session.output)]


def numbered(p):
    assert main.train(p.config, CPU) == 0
    return list(Path(p.config.output_dir).glob("checkpoint-[0-9]*"))


@special("output_dir")
def _(make):
    where = make.tmp_path / "here"
    parts = make(output_dir=str(where))
    assert parts.session.output == where and (where / "config.yaml").exists()
    assert parts.session.saver.output == where


@special("log_interval")
def _(make):
    shown = []
    make.monkeypatch.setattr(training.session, "progress_line", lambda plan, record, step, *_: shown.append(step))
    parts = make(log_interval="3 steps")
    with parts.session as session:
        session.enter(parts.plan.records[0])
        for step in range(1, 7):
            parts.training.step = step
            session.after_step(0.1, 8)
    assert shown == [3, 6]


@special("eval_size")
def _(make):
    parts = make(eval_size=40)
    with parts.session as session:
        session.enter(parts.plan.records[0])
        assert training.validation.validate(session, parts.plan.records[0])["eval_size"] == 40


@special("resume")
def _(make):
    assert make(resume=make.checkpoint, model_ema=True).training.step == 4
    assert make().training.step == 0


@special("auto_resume")
def _(make):
    begun = str(Path(make.checkpoint).parent)
    assert make(output_dir=begun, model_ema=True).training.step == 4
    with pytest.raises(UsageError, match="--auto_resume false"):
        assert make(output_dir=begun, auto_resume=False).training


@special("allow_change")
def _(make):
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        assert make(resume=make.checkpoint, model_ema=True, seed=1).training
    assert make(resume=make.checkpoint, model_ema=True, seed=1, allow_change="seed").training.step == 4


def cached(p):
    """What the source of shards is given of the local cache."""
    taken, sources = {}, datasets.open_source
    datasets.open_source = lambda *arguments, **more: taken.update(more) or sources(*arguments)
    try:
        assert len(p.source) == 48
    finally:
        datasets.open_source = sources
    return taken


wired("cache_dir", "somewhere", lambda p: cached(p)["cache_dir"])
wired("cache_size", 0.5, lambda p: cached(p)["cache_size"], 0.5e9)


@special("rows")
def _(make):
    results = script("results")
    settings = yaml.safe_load(to_yaml(make(rows=["et-1", "et-2"]).config))
    plan = {"stages": [{}], "base_size": 64, "curriculum": "none", "epochs": 2}
    plan["total"] = {"speedup_flops": 1.0, "speedup_pixels": 1.0, "equivalent_epochs": 2.0}
    run = results.Run(make.tmp_path, settings, plan, 50.0, 10.0, "a device")
    assert [line["row"] for line in results.collect([run], {})] == ["et-1", "et-2"]


# -- the machine -------------------------------------------------------------------------------------------------------
@special("device")
def _(make):
    with pytest.raises(UsageError, match="'tpu'"):
        main.run(make(device="tpu").config, set())


@special("deterministic")
def _(make):
    seen = []
    make.monkeypatch.setattr(main, "train", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()) or 0)
    try:
        for value in (False, True):
            main.run(make(deterministic=value).config, set())
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True]


@special("tf32")
def _(make):
    seen = []
    make.monkeypatch.setattr(main, "train", lambda *_: 0)
    make.monkeypatch.setattr(main, "init_topology", lambda device, deterministic, tf32, timeout: seen.append(tf32))
    for value in (False, True):
        main.run(make(tf32=value).config, set())
    assert seen == [False, True]


# -- commands ----------------------------------------------------------------------------------------------------------
def command(setting, value, function, then=lambda make: None):
    """main.run hands over to ``function`` under this setting, and trains without; ``then`` looks at the function."""

    @special(setting)
    def _(make):
        for name in ("train", function):
            make.monkeypatch.setattr(main, name, lambda *_, name=name: name)
        weights = {"resume": make.checkpoint}
        assert main.run(make(**weights).config, set()) == "train"
        assert main.run(make(**weights, **{setting: value}).config, set()) == function
        then(make)


command("eval", True, "evaluate_weights")
command("predict", "photos", "predict", lambda make: labelled(make, top_k=1))
command("suggest", True, "write_suggestion")
command("doctor", True, "diagnose")
command("plan", "table", "show_plan")


@special("eval_data")
def _(make):
    assert len(commands.evaluate._source(make(eval_data=str(make.folder / "train")).config)) == 48
    assert len(commands.evaluate._source(make().config)) == 15


@special("real_labels")
def _(make):
    weights = {"resume": make.checkpoint, "eval": True, "input_size": 32}
    with pytest.raises(ValueError, match="--real_labels"):
        commands.evaluate.evaluate_weights(make(real_labels=True, **weights).config, CPU)
    assert commands.evaluate.evaluate_weights(make(**weights).config, CPU) == 0


def labelled(make, **settings):
    """What --predict prints of the 15 validation images."""
    where = {"resume": make.checkpoint, "predict": str(make.folder / "val")}
    make.capsys.readouterr()
    assert predict(make(**where, **settings).config, {"model"}, CPU) == 0
    lines = [json.loads(line) for line in make.capsys.readouterr().out.splitlines()]
    assert len(lines) == (0 if "predict_to" in settings else 15)
    return lines


@special("predict_to")
def _(make):
    path = make.tmp_path / "labels.jsonl"
    labelled(make, predict_to=str(path))
    assert len(path.read_text().splitlines()) == 15


@special("top_k")
def _(make):
    assert {len(line["top"]) for line in labelled(make, top_k=2)} == {2}


@special("threshold")
def _(make):
    for threshold, count in ((0.0, 3), (1.0, 0)):
        where = {"resume": make.checkpoint, "predict": str(make.folder / "val"), "task": "multilabel"}
        make.capsys.readouterr()
        assert predict(make(**where, threshold=threshold).config, {"task", "model"}, CPU) == 0
        lines = make.capsys.readouterr().out.splitlines()
        assert {len(json.loads(line)["labels"]) for line in lines} == {count}


def planned(p):
    """What --plan json prints, read."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert commands.plan.show_plan(p.config) == 0
    return json.loads(out.getvalue())


wired("num_images", 4000, lambda p: planned(p)["num_images"], plan="json")
wired("devices", 2, lambda p: planned(p)["devices"], plan="json")
wired(
    "baseline_epochs",
    8,
    lambda p: round(planned(p)["total"]["speedup_pixels"] * planned(p)["total"]["equivalent_epochs"], 6),
    plan="json",
)


@special("speeds")
def _(make):
    path = make.tmp_path / "speeds.json"
    path.write_text('{"images_per_s": {"32": 100, "48": 100, "64": 100}}')
    total = planned(make(plan="json", speeds=str(path)))["total"]
    assert total["seconds"] == pytest.approx(total["images"] / 100)
    assert planned(make(plan="json"))["total"]["seconds"] is None


# -- detection and segmentation ----------------------------------------------------------------------------------------
DETECTION = {
    **{"task": "detection", "data_set": "coco", "model": "convnext_atto", "test_side": 96, "max_side": 192},
    **{"magnitude": "none", "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "smoothing": 0.0, "curriculum": "none"},
    **{"head_args": {"channels": 16}, "train_sides": [96, 128]},
}
SEGMENTATION = {**DETECTION, "task": "segmentation", "data_set": "masks", "crop": 64, "head_args": {"width": 16}}


def plan_of(p):
    return training.build.make_plan(p.config, 20, 3)


def detector(p):
    return training.build.make_model(p.config, 3, 96)


def scene_transform(p):
    return training.scenes.make_scene_transform(p.config, plan_of(p))


def eval_transform(p):
    """Of a validation image."""
    loader = training.build.make_eval_loader(p.config, None, range(2), 96, 1, CPU)
    return loader.dataset.transform


wired("schedule", "poly", lambda p: p.plan.schedule)
wired("lr_steps", ["40%"], lambda p: list(plan_of(p).lr_steps), schedule="steps", lr_steps=["50%"])
wired("head", "retinanet", lambda p: type(detector(p)).__name__, "RetinaNet", **DETECTION)
wired("head_args", {"masks": False, "channels": 8}, lambda p: heads(detector(p)), (0, 8), **DETECTION)
wired("train_sides", [64, 96], lambda p: list(scene_transform(p).sides), **DETECTION)
wired(
    "max_side",
    256,
    lambda p: (scene_transform(p).max_side, eval_transform(p).max_side),
    (256, 256),
    **DETECTION,
)
wired("test_side", 128, lambda p: (plan_of(p).base_size, eval_transform(p).side), (128, 128), **DETECTION)
wired("crop", 96, lambda p: (plan_of(p).base_size, scene_transform(p).crop), (96, 96), **SEGMENTATION)
wired("crop_prob", 0.125, lambda p: scene_transform(p).crop_prob, **DETECTION)
wired("scales_test", [0.5, 1.0], lambda p: list(commands.dense._task(p.config).scales), **SEGMENTATION)
wired("flip_test", True, lambda p: commands.dense._task(p.config).flip, **SEGMENTATION)


def heads(model):
    return len(model.roi_heads.mask_heads), model.fpn.inner_blocks[0][0].out_channels


@special("pictures")
def _(make):
    class Reached(Exception):
        pass

    def stop(folder, names, pictures):
        raise Reached(pictures)

    make.monkeypatch.setattr(commands.dense, "LabelWriter", stop)
    make.monkeypatch.setattr(commands.dense, "build_bounded", lambda *_: torch.nn.Identity())
    make.monkeypatch.setattr(commands.dense, "load_dense", lambda *_: None)
    content = {"config": {}, "classes": ["a", "b"], "model": {}, "step": 1}
    for value in (False, True):
        config = make(pictures=value, predict_to="out", **SEGMENTATION).config
        with pytest.raises(Reached, match=str(value)):
            commands.dense.predict_dense(config, set(), [], content, "model", CPU)
