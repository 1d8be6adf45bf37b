"""Files from strangers: whatever a file holds, it is used for the numbers in it, or refused with one line."""

import copy
import json
import os
import random
import signal
import time
import zlib

import pytest
import torch
from conftest import checkpoint_fields, flags, script
from test_faults_fuzz import sign

from config import Config, UsageError, load_recipe, plain
from inputs import index_file
from inputs.folder import FolderIndex
from models import checkpoints, create_model, load_weights
from models.checkpoints import BadCheckpoint
from models.export import main as export
from models.run_files import read_settings
from models.schema import check_fields
from training.optimizer_state import load_optimizer_state
from training.report import write_report
from training.resume import class_order

OTHER = ["text", -1, 2**70, 1.5, float("nan"), True, None, [], [1], {}, {"a": 1}, {1: 2}, torch.ones(2), [[["x"]]]]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint of a model of the registry, as a run saves it; ``ours(name, change)`` saves it changed."""
    torch.manual_seed(0)
    model = create_model("test_vit", 3, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    from dataclasses import asdict

    from config import Config

    settings = json.loads(json.dumps(asdict(Config(model="test_vit", input_size=64, device="cpu", num_workers=0))))
    content = checkpoint_fields(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        step=3,
        input_size=64,
        best={"acc1": 50.0, "step": 3, "weights": "model", "eval_size": 64},
        meters={"loss": [1.0, 2.0], "skipped": [0] * 4, "seconds": 1.0},
        identity=None,
        config=settings,
        classes=["ant", "bee", "cat"],
    )
    folder = tmp_path_factory.mktemp("strangers")

    def save(name="whole", change=None):
        changed = copy.deepcopy(content)
        if change:
            change(changed)
        path = folder / f"{name}.pth"
        checkpoints.save(path, changed)
        return path

    save.content = content
    return save


def put(*place, value):
    def change(content):
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return change


@pytest.fixture
def predict(main_program, folder, capsys):
    def call(path, *words):
        capsys.readouterr()
        image = str(folder / "val" / "class_0" / "00.jpg")
        code = main_program(["--predict", image, "--resume", str(path), "--device", "cpu", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


# ---- names and arguments ---------------------------------------------------------------------------------------------
def evil(tmp_path):
    """A module whose function leaves a trace, and the working directory from which it can be imported."""
    (tmp_path / "evil_models.py").write_text(f"def build(**_):\n    open({str(tmp_path / 'executed')!r}, 'w')\n")
    return "evil_models:build"


def test_a_checkpoints_model_is_the_registrys(ours, predict, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = ours("evil", put("config", "model", value=evil(tmp_path)))
    code, out, err = predict(path)
    assert code == 1 and err.count("error: ") == 1 and "--model evil_models:build" in err and not out
    assert export([str(path), str(tmp_path / "x.pt2"), "--format", "torch_export"]) == 1
    assert "--model evil_models:build" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    predict(path, "--model", "evil_models:build")  # the control: named by the user, it is called
    assert (tmp_path / "executed").exists()


def test_a_recipes_and_a_runs_model_is_the_registrys(tmp_path, monkeypatch, main_program, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"model: {evil(tmp_path)}\n")
    for argv in (["--recipe", "config.yaml", "--plan", "table", "--num_images", "9999"], ["--suggest", "true"]):
        assert main_program(["--recipe", "config.yaml", *argv] if argv[0] == "--suggest" else argv) == 2
    assert "--model evil_models:build" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("analyze").main(["spectra", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": True},
        {"checkpoint_path": "/etc/passwd"},
        {"depth": 10**9},
        {"embed_dim": 30000},
        {"x": [1] * 999},
    ],
)
def test_a_checkpoints_model_arguments_do_nothing_but_compute(ours, predict, arguments):
    started = time.monotonic()
    code, _, err = predict(ours("arguments", put("config", "model_args", value=arguments)))
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ") and time.monotonic() - started < 20


# ---- fields ----------------------------------------------------------------------------------------------------------
FIELDS = [("step",), ("epoch",), ("model",), ("model_ema",), ("optimizer",), ("scaler",), ("best",), ("meters",)]
FIELDS += [("config",), ("identity",), ("classes",), ("input_size",), ("format_version",), ("best", "acc1")]
FIELDS += [
    ("meters", "loss"),
    ("meters", "seconds"),
    ("meters", "skipped"),
    ("meters", "gradient"),
    ("standing",),
    ("config", "model"),
    ("config", "eval_size"),
]
FIELDS += [("config", "input_size"), ("config", "crop_pct"), ("config", "num_classes"), ("config", "model_args")]
FIELDS += [("best", "weights"), ("optimizer", "state"), ("optimizer", "param_groups"), ("config", "mean")]


@pytest.mark.parametrize("field", FIELDS, ids="-".join)
def test_a_field_of_another_type_is_one_line(ours, predict, field):
    """Every field x many values: refused with one line, or used for an answer (tried for the first three)."""
    refused = tried = 0
    for number, value in enumerate(OTHER):
        path = ours(f"field-{'-'.join(field)}-{number}", put(*field, value=value))
        try:
            checkpoints.load(path)
        except BadCheckpoint as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
            continue
        tried += 1
        if tried > 3 and not (isinstance(value, int) and value > 1 << 60):  # 2**70 took all memory once
            continue
        code, out, err = predict(path)
        assert code == 0 or (code == 1 and sum(line.startswith("error: ") for line in err.splitlines()) == 1), err
        assert "NaN" not in out
    assert refused or field in (("identity",), ("model_ema",))


def test_weights_that_are_not_finite_are_named(ours, predict, tmp_path, capsys):
    bad = ours.content["model"]["head.weight"].clone()
    bad[0, 0] = float("nan")
    path = ours("nan", put("model", "head.weight", value=bad))
    code, out, err = predict(path)
    assert code == 1 and "head.weight" in err and not out
    with pytest.raises(ValueError, match=r"not finite.*head\.weight"):
        load_weights(create_model("test_vit", 3, 64), path)
    assert export([str(path), str(tmp_path / "x.safetensors")]) == 1 and "head.weight" in capsys.readouterr().err
    assert predict(ours())[0] == 0  # the control


def test_tensors_larger_than_their_numbers(ours):
    wide = torch.zeros(1).expand(1 << 40)
    path = ours()
    with pytest.raises(ValueError, match="ordinary"):
        check_fields({**checkpoints.load(path), "model": {"x": wide}})


def test_a_compressed_archive_is_refused(ours, tmp_path):
    import io
    import zipfile

    plain = io.BytesIO()
    torch.save({"format_version": 2, **ours.content}, plain)
    packed = io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    path = tmp_path / "packed.pth"
    path.write_bytes(sign(packed.getvalue()))
    with pytest.raises(BadCheckpoint, match="compressed"):
        checkpoints.load(path)
    path.write_bytes(packed.getvalue())
    with pytest.raises(ValueError, match="compressed"):
        load_weights(create_model("test_vit", 3, 64), path)


# ---- the optimizer's state -------------------------------------------------------------------------------------------
def trained(opt="adamw", layout=torch.contiguous_format):
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    model.to(memory_format=layout)
    optimizer = create_optimizer_v2(model, opt, lr=1e-2, **({"fused": True} if opt == "adamw" else {}))
    return model, optimizer


def step(model, optimizer, seed):
    optimizer.zero_grad()
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_continues_in_either_layout(opt, layout):
    """Against the same run without a stop; torch's own loading keeps the strides of the file."""
    model, optimizer = trained(opt)
    for seed in range(3):
        step(model, optimizer, seed)
    state, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    other, fresh = trained(opt, layout)
    other.load_state_dict(weights)
    load_optimizer_state(fresh, state)
    for seed in (3, 4):
        step(model, optimizer, seed)
        step(other, fresh, seed)
    for one, two in zip(model.parameters(), other.parameters()):
        assert torch.allclose(one, two, atol=1e-6)
    for parameter in other.parameters():
        for value in fresh.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s["state"][0].update(exp_avg=torch.zeros(4, 3, 3)),
        lambda s: s["state"][0].update(exp_avg=torch.zeros(1)),
        lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].double()),
        lambda s: s["state"][0].update(exp_avg="text"),
        lambda s: s["state"][0].update(more=torch.zeros(3)),
        lambda s: s["state"][0].pop("exp_avg"),
        lambda s: s["state"].update({99: {}}),
        lambda s: s["param_groups"][0].update(params=[0, 1]),
        lambda s: s["param_groups"][0].update(params="0123"),
        lambda s: s["param_groups"][0].update(step="now"),
        lambda s: s["param_groups"].append({}),
        lambda s: s["param_groups"].clear(),
    ],
)
def test_optimizer_state_of_another_make_is_refused(spoil):
    model, optimizer = trained()
    step(model, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    load_optimizer_state(trained()[1], state)
    spoil(state)
    with pytest.raises(ValueError) as error:
        load_optimizer_state(trained()[1], state)
    assert "\n" not in str(error.value)


# ---- recipes ---------------------------------------------------------------------------------------------------------
def test_towers_of_recipes_are_read_once(tmp_path):
    (tmp_path / "0.yaml").write_text("lr: 0.5\n")
    for number in range(1, 32):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number - 1}.yaml, {number - 1}.yaml]\n")
    started = time.monotonic()
    assert load_recipe(str(tmp_path / "31.yaml")) == {"lr": 0.5} and time.monotonic() - started < 5
    for number in range(32, 70):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number - 1}.yaml\n")
    with pytest.raises(ValueError, match="64 files at most"):
        load_recipe(str(tmp_path / "69.yaml"))
    (tmp_path / "a.yaml").write_text("extends: ../" + tmp_path.name + "/a.yaml\n")
    with pytest.raises(ValueError, match="extends itself"):
        load_recipe(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("where", ["recipe", "resume", "finetune", "predict", "class_map", "speeds", "curriculum"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_not_read(tmp_path, folder, ours, main_program, capsys, where, kind):
    """Wherever a file may be given: a FIFO that nobody writes, or a device without an end."""
    path = tmp_path / ("x.jpg" if where == "predict" else "x.yaml" if where == "curriculum" else "x")
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    argv = flags(output_dir=tmp_path / "out", data_path=folder, epochs=1)
    if where == "predict":
        argv = ["--resume", str(ours()), "--device", "cpu"]
    if where == "speeds":
        argv += ["--plan", "table"]
    late = []

    def too_long(*_):
        late.append(True)  # whoever catches the error
        raise AssertionError("it waits, or reads without end")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    try:
        code = main_program([*argv, f"--{where}", str(path)])
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    err = capsys.readouterr().err
    assert not late and code in (1, 2) and any(line.startswith("error: ") for line in err.splitlines()), err


# ---- the index of images ---------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "efficienttrain"


def test_a_flipped_bit_is_found(folder, cache):
    """Each of 200 bits anywhere: built again, and the answers are those of before."""
    right = [(FolderIndex(folder / "train").path(i), FolderIndex(folder / "train").label(i)) for i in range(48)]
    (path,) = cache.glob("*.image_index")
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        spoiled = bytearray(whole)
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        index = FolderIndex(folder / "train")
        assert [(index.path(i), index.label(i)) for i in range(48)] == right
    assert zlib.crc32(path.read_bytes()[:-20]) == int.from_bytes(path.read_bytes()[-20:-16], "little")


def test_links_and_pipes_in_the_users_folder(folder, cache, tmp_path):
    FolderIndex(folder / "train")
    (path,) = cache.glob("*.image_index")
    lock, target = path.with_name(path.name + ".lock"), tmp_path / "precious"
    target.write_text("kept")
    for make in (lambda p: p.symlink_to(target), os.mkfifo):
        for place in (path, lock):
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
            make(place)
            assert len(FolderIndex(folder / "train")) == 48
    assert target.read_text() == "kept"


def test_a_foreign_lock_is_waited_for_so_long(folder, cache, monkeypatch, capsys):
    import fcntl

    FolderIndex(folder / "train")
    (path,) = cache.glob("*.image_index")
    path.unlink()
    monkeypatch.setattr(index_file, "PATIENCE", 0.2)
    with open(path.with_name(path.name + ".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert len(FolderIndex(folder / "train")) == 48
    assert "still held" in capsys.readouterr().err


def test_a_folder_of_someone_else_is_not_used(folder, cache, tmp_path, capsys):
    (tmp_path / "xdg").mkdir()
    (tmp_path / "elsewhere").mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    assert len(FolderIndex(folder / "train")) == 48
    assert "XDG_CACHE_HOME" in capsys.readouterr().err and not list((tmp_path / "elsewhere").iterdir())


# ---- run folders -----------------------------------------------------------------------------------------------------
POISONS = {
    "garbage": lambda p: p.write_bytes(bytes(range(256))),
    "empty": lambda p: p.write_bytes(b""),
    "list": lambda p: p.write_text("[1, 2]\n"),
    "number": lambda p: p.write_text("3\n"),
    "deep": lambda p: p.write_text("[" * 100000),
    "types": lambda p: p.write_text('{"model": [1], "curriculum": 3, "stages": {}, "epoch": "x", "devices": 3}\n'),
    "fifo": lambda p: os.mkfifo(p),
    "device": lambda p: p.symlink_to("/dev/zero"),
    "folder": lambda p: p.mkdir(),
    "huge": lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_RDWR), 1 << 34),
}


@pytest.fixture(scope="module")
def run(folder, main_program, tmp_path_factory):
    output = tmp_path_factory.mktemp("poisoned") / "run"
    assert main_program(flags(output_dir=output, data_path=folder, epochs=1)) == 0
    return output


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "log.txt", "environment.json", "plan.svg"])
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_run_folder_is_one_line(run, tmp_path, capsys, name, poison):
    import shutil

    target = tmp_path / "run"
    shutil.copytree(run, target)
    (target / name).unlink()
    POISONS[poison](target / name)
    capsys.readouterr()
    code = script("report").main([str(target)])
    err = capsys.readouterr().err
    assert code in (0, 1) and "Traceback" not in err
    if name == "log.txt" and err.startswith("warning: "):  # a damaged line is passed over, aloud
        err = err.partition("\n")[2]
    assert err.count("\n") == code and (code == 0 or err.startswith("error: "))
    code = script("results").main([str(target)])
    err = capsys.readouterr().err
    assert code in (0, 1) and len(err.splitlines()) <= 3
    with_model = ["--model", "tests.tiny_models:convnet", "--output", str(tmp_path / "out"), "--images", "4"]
    try:
        code = script("analyze").main(["spectra", str(target), *with_model]) if name == "config.yaml" else 1
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)


@pytest.mark.parametrize(
    "place", [("input_size",), ("identity",), ("config", "micro_batch"), ("config", "forward_batch")]
)
def test_a_run_resumes_without_what_a_checkpoint_need_not_hold(run, folder, tmp_path, main_program, place):
    content = checkpoints.load(run / "checkpoint-last.pth")
    part = content
    for key in place[:-1]:
        part = part[key]
    part.pop(place[-1])
    checkpoints.save(tmp_path / "x.pth", content)
    argv = flags(output_dir=tmp_path / "out", data_path=folder, epochs=1, resume=tmp_path / "x.pth", micro_batch=None)
    assert main_program(argv) == 0


def test_settings_that_a_file_does_not_state_are_the_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    assert read_settings(tmp_path) == {**plain(Config()), "epochs": 3}


def test_nothing_of_a_file_runs_in_the_report(run, tmp_path):
    import shutil

    target = tmp_path / "run"
    shutil.copytree(run, target)
    attack = "<script>alert(1)</script>"
    (target / "plan.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)">{attack}</svg>')
    (target / "environment.json").write_text(json.dumps({attack: attack}))
    plan = json.loads((target / "plan.json").read_text())
    (target / "plan.json").write_text(json.dumps({**plan, "curriculum": attack}))
    page = write_report(target).read_text()
    assert "<script" not in page and "onload" not in page and "&lt;script&gt;" in page


def test_a_recipe_given_twice_is_refused(tmp_path, main_program, capsys):
    (tmp_path / "a.yaml").write_text("lr: 1\n")
    assert main_program(["--recipe", str(tmp_path / "a.yaml"), f"--recipe={tmp_path / 'a.yaml'}"]) == 2
    assert "given twice" in capsys.readouterr().err
    assert issubclass(UsageError, ValueError)


@pytest.mark.parametrize("name", ["lock", "ledger.jsonl"])
@pytest.mark.parametrize("poison", ["garbage", "types", "fifo", "device", "folder", "link"])
def test_a_poisoned_search_folder_is_one_line(tmp_path, folder, capsys, name, poison):
    output, target = tmp_path / "search", tmp_path / "precious"
    output.mkdir()
    target.write_text("kept")
    make = POISONS.get(poison, lambda path: path.symlink_to(target))
    make(output / name)
    command = ["greedy", "--sizes", "32,64", "--output", str(output), "--parallel", "1"]
    code = script("search").main([*command, *flags(data_path=folder)], launch=lambda *_: 1)
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ") and target.read_text() == "kept"


@pytest.mark.parametrize("place", [{"epoch": 99}, {"step": 10**9}, {"step": 0}, {"epoch": 0}])
def test_a_step_that_the_plan_does_not_have_is_one_line(run, folder, tmp_path, main_program, capsys, place):
    state = checkpoints.load(run / "checkpoint-last.pth")
    checkpoints.save(tmp_path / "changed.pth", {**state, **place})
    argv = flags(output_dir=tmp_path / "out", data_path=folder, epochs=1, resume=tmp_path / "changed.pth")
    assert main_program(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "which its plan of" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", [1000, 3.5, "text", [1, 2, 3], {"a": 1}, torch.ones(3), []])
def test_weights_whose_classes_are_no_names_are_weights_all_the_same(folder, tmp_path, main_program, capsys, odd):
    torch.manual_seed(0)
    state = create_model("test_vit", 3, 64).state_dict()
    torch.save({"model": state, "classes": odd, "meta": odd}, tmp_path / "w.pth")
    argv = flags(model="test_vit", data_path=folder, finetune=tmp_path / "w.pth", eval=True)
    assert main_program(argv) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 15
    config = Config(finetune=str(tmp_path / "w.pth"))
    assert class_order(config, None) is None


def test_weights_of_another_task_are_not_scored(ours, folder, main_program, capsys):
    path = ours("several.pth", lambda content: content["config"].update(task="multilabel"))
    assert main_program(["--eval", "true", "--resume", str(path), "--data_path", str(folder), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is of --task multilabel, not supervised" in err


def test_a_folder_for_labels_is_refused_before_they_are_made(ours, folder, tmp_path, main_program, capsys):
    image = next(folder.glob("*/*/*.jpg"))
    argv = ["--predict", str(image), "--resume", str(ours("x.pth", lambda content: None)), "--device", "cpu"]
    assert main_program([*argv, "--predict_to", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--predict_to {tmp_path} is a folder" in err
