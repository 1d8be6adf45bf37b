"""What is drawn beside log.txt: the norms are right, and Weights & Biases holds all of it as TensorBoard does."""

import importlib.util
import json
import os
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import Run, flags
from processes import world
from test_logs import curves
from torch import nn

from engine import gradient_norm, total_norm
from models import create_model
from training import curves as curves_module
from training.curves import RUN_ID, WandB, check_wandb
from training.logs import RunLog, measure

# -- the quantities ----------------------------------------------------------------------------------------------------


def with_gradients(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    model.append(nn.Linear(3, 2))  # without a gradient
    for parameter in [*model.parameters()][:-2]:
        parameter.grad = scale * torch.randn_like(parameter)
    return model


def squares(tensors):
    return sum(tensor.double().square().sum() for tensor in tensors).sqrt().item()


@pytest.mark.parametrize("clip", [None, 1e9, 0.5])
def test_gradient_norm(clip):
    model = with_gradients()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    norm = gradient_norm(model, clip).item()
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert norm == pytest.approx(squares(before), rel=1e-6) and norm > 1
    assert squares(after) == pytest.approx(min(norm, clip or norm), rel=1e-4)
    assert all(map(torch.equal, before, after)) == (clip != 0.5)


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_gradient_that_is_not_finite_shows_in_its_norm(value):
    model = with_gradients()
    model[0].weight.grad[1, 1] = float(value)
    assert not torch.isfinite(gradient_norm(model, None))


def test_total_norm_of_half_precision_does_not_overflow():
    tensors = [torch.full((300, 300), 100.0, dtype=torch.bfloat16), torch.ones(3)]
    assert total_norm(tensors).item() == pytest.approx((300 * 300 * 1e4 + 3) ** 0.5, rel=0.01)


def test_the_norms_of_a_run(train):
    """Of fp16 the gradient's true norm, whatever the scale; the weights' is that of the checkpoint."""
    same = {"model": "tests.tiny_models:plain", "mixup": 0, "cutmix": 0, "reprob": 0, "epochs": 1, "curriculum": "none"}
    plain, scaled = train("plain", **same), train("scaled", amp="fp16", **same)
    (one,), (other,) = plain.log(), scaled.log()
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05) and one["grad_norm"] > 0
    assert other["loss_scale"] == scaled.state()["scaler"]["scale"] > 1000 and "loss_scale" not in one
    model = create_model("tests.tiny_models:plain", 3, 64)
    model.load_state_dict(plain.state()["model"])
    assert one["weight_norm"] == pytest.approx(squares(model.parameters()), rel=1e-6)
    assert 0.01 < one["memory_gib"] < 1000
    drawn = curves(plain.output)
    assert drawn["epoch/grad_norm"] == [(one["step"], pytest.approx(one["grad_norm"]))]
    assert drawn["epoch/weight_norm"] == [(one["step"], pytest.approx(one["weight_norm"]))]
    assert {"train/grad_norm", "train/weight_norm", "train/lr", "train/images_per_s", "train/memory_gib"} <= {*drawn}


def test_gpu_utilization_is_told_where_it_can_be(train, monkeypatch):
    class Stub:
        model, amp, device = nn.Linear(2, 2), "none", torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**31)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    found = measure(Stub)
    assert (found["gpu_utilization"], found["memory_gib"]) == (87.0, 2.0)

    def missing(_device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert list(measure(Stub)) == ["weight_norm", "memory_gib"]


# -- Weights & Biases --------------------------------------------------------------------------------------------------
wandb_installed = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not wandb_installed, reason="wandb is not installed")


@pytest.fixture
def offline(monkeypatch):
    """As on a cluster's node. Its threads end here, not with the tests."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield
    end_service()


def end_service():
    """What W&B does when Python ends: then its files are whole."""
    if wandb := sys.modules.get("wandb"):
        with suppress(OSError):  # of a service that was killed
            getattr(wandb, "teardown", lambda: None)()


def records_of(path):
    """The records of a .wandb file, read from its format: LevelDB's log, blocks of 32 KiB with pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(parts)
            parts = b""


def recorded(output):
    """Of each start of a run: its id, and what was drawn, {name: [(step, value)]}."""
    for path in sorted((output / "wandb").glob("offline-run-*/run-*.wandb")):
        drawn, run_id = {}, None
        for record in records_of(path):
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
                assert record.run.project == "demo" and record.run.display_name == output.name
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name, value in items.items():
                    if name.startswith(("train/", "epoch/")):
                        drawn.setdefault(name, []).append((items["step"], value))
        yield run_id, drawn


@needs_wandb
def test_a_run_that_is_resumed_twice_is_one_run_of_wandb(offline, main_program, folder, tmp_path, capsys):
    whole = tmp_path / "whole"
    settings = {"data_path": folder, "epochs": 1, "log_interval": "2 steps"}
    assert main_program(flags(output_dir=whole, **settings)) == 0
    output = tmp_path / "run"
    for more in ({"stop_after": "3 steps"}, {"stop_after": "6 steps"}, {}):
        assert main_program(flags(output_dir=output, wandb="demo", **settings, **more)) == 0
    end_service()
    starts = list(recorded(output))
    ids = {run_id for run_id, _ in starts}
    assert len(starts) == 3 and ids == {(output / RUN_ID).read_text().strip()}
    # The oracle: what a run without stops and without W&B wrote to TensorBoard.
    joined = {}
    for _, drawn in starts:
        for name, points in drawn.items():
            joined.setdefault(name, []).extend(points)
    want, steady = curves(whole), ("grad_norm", "weight_norm", "lr", "loss", "test_acc1", "train_loss", "input_size")
    assert joined.keys() == want.keys()
    for name in want:
        if name.endswith(steady) and name != "train/grad_norm":  # whose mean begins anew with each start
            assert joined[name] == [pytest.approx(point, rel=1e-5) for point in want[name]], name
    assert capsys.readouterr().out.count(f"W&B run {ids.pop()}: offline; to send it: wandb sync ") == 3


@needs_wandb
def test_what_fails_costs_the_curves_alone(offline, tmp_path, monkeypatch, capsys):
    import wandb

    log = RunLog(tmp_path, 0, 0, "", [WandB("demo", tmp_path, {})])
    monkeypatch.setattr(wandb.Run, "log", lambda *_: 1 / 0)
    for step in range(3):
        log.interval(step, {"loss": 1.0})
    log.picture(3, "picture", torch.zeros(3, 8, 8, dtype=torch.uint8))
    log.close()
    assert capsys.readouterr().out.count("no more W&B curves from here on (division by zero); log.txt") == 1
    assert curves(tmp_path)["train/loss"] == [(0, 1.0), (1, 1.0), (2, 1.0)]


@needs_wandb
def test_pictures_and_a_service_that_dies(offline, tmp_path, capsys):
    """The process that W&B starts beside ours is killed: the run goes on and ends."""
    drawn = WandB("demo", tmp_path, {"lr": 0.1})
    drawn.picture(1, "pictures/stage-1", torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/pictures/stage-1_*.png"))
    (service,) = children("wandb-core")
    os.kill(service, signal.SIGKILL)
    for step in range(50):
        drawn.draw(step, {"loss": 1.0})
    drawn.close()
    assert "Traceback" not in capsys.readouterr().out


def children(name):
    """Processes that this one has started whose command line names ``name``."""
    own, found = str(os.getpid()), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            found += [int(folder.name)] * (parent == own and name in (folder / "cmdline").read_text())
    return found


class NoServer(ModuleType):
    """A stand-in for wandb on a machine that reaches no server."""

    def __init__(self, offline_works):
        super().__init__("wandb")
        self.modes, self.offline_works = [], offline_works

    def Settings(self, **_settings):
        return None

    def init(self, mode=None, **settings):
        self.modes.append(mode)
        if mode != "offline" or not self.offline_works:
            raise RuntimeError("no answer\nfrom the server")
        self.id = settings["id"]
        return self

    url = None
    settings = type("Settings", (), {"sync_dir": "here"})
    define_metric = log = finish = lambda *_args, **_more: None


@pytest.mark.parametrize("works", [True, False])
def test_without_a_server_the_run_is_recorded_offline(tmp_path, monkeypatch, capsys, works):
    stub = NoServer(works)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for _ in range(2):
        drawn = WandB("demo", tmp_path, {})
        drawn.draw(1, {"loss": 1.0})
        drawn.close()
    out = capsys.readouterr().out
    assert stub.modes == [None, "offline"] * 2
    assert out.count("--wandb demo: recording offline, for W&B says: no answer from the server") == 2
    assert out.count("no more W&B curves") == (0 if works else 2)


def test_ids(tmp_path, monkeypatch):
    made = curves_module._run_id(tmp_path)
    assert curves_module._run_id(tmp_path) == made and len(made) == 8
    (tmp_path / RUN_ID).write_text("../../etc\n")
    assert curves_module._run_id(tmp_path) not in (made, "../../etc")
    monkeypatch.setenv("WANDB_RUN_ID", "of-a-sweep")
    assert curves_module._run_id(tmp_path) != "of-a-sweep"  # the folder's stays
    (tmp_path / RUN_ID).unlink()
    assert curves_module._run_id(tmp_path) == "of-a-sweep"


@pytest.mark.parametrize("spec", [None, importlib.util.spec_from_loader("wandb", None)], ids=["absent", "a folder"])
def test_without_the_package_one_line_says_what_to_do(main_program, folder, tmp_path, monkeypatch, capsys, spec):
    monkeypatch.setattr(curves_module.importlib.util, "find_spec", lambda name: spec)
    assert main_program(flags(output_dir=tmp_path / "run", data_path=folder, wandb="demo")) == 2
    line = "error: --wandb demo needs a package that is not installed: pip install 'wandb>=0.27'\n"
    assert capsys.readouterr().err == line and not (tmp_path / "run").exists()


@needs_wandb
@pytest.mark.parametrize("name, fits", [("demo", 1), ("us/demo two", 1), ("a/b/c", 0), ("50%", 0), ("", 0)])
def test_names_of_projects(name, fits):
    if fits:
        return check_wandb(name)
    with pytest.raises(ValueError, match="--wandb"):
        check_wandb(name)


@needs_wandb
def test_one_process_of_two_draws(offline, folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, wandb="demo", stop_if="train_loss > 0 after 1%")
    programs = world(argv, tmp_path / "log", 2)
    assert [program.wait() for program in programs] == [0, 0], programs[0].output
    assert len(list(recorded(tmp_path / "run"))) == 1
    said = [program.output.count("ended early, after step") for program in programs]
    assert said == [1, 0] and Run(tmp_path / "run").log()[-1]["progress"] < 1
