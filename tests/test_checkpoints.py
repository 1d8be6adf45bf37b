"""Checkpoint files: plain and safe to load, whole or refused, and the newest good one found by content."""

import os
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same

from models import checkpoints
from models.checkpoints import BadCheckpoint


def payload(step=3, **more):
    """A small checkpoint of every kind of value that a run saves."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(8, 4, generator=generator), "a.steps": torch.tensor(step)}
    return {
        "model": weights,
        "model_ema": None,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "scaler": {},
        "step": step,
        "epoch": 1,
        "best": {"acc1": 12.5},
        "meters": {"loss": [1.0, 2.0], "seconds": 0.5},
        "config": {"lr": 0.1, "betas": [0.9, 0.999], "name": None},
        **more,
    }


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    checkpoints.save(path, payload())
    loaded = checkpoints.load(path)
    assert loaded.pop("input_size") is None and loaded.pop("identity") is None  # what a payload need not hold
    assert same(loaded, {"format_version": checkpoints.FORMAT_VERSION, **payload()})
    assert not same(checkpoints.load(path)["model"], payload(step=4)["model"])  # negative control
    assert os.listdir(tmp_path) == ["checkpoint-last.pth"]


def test_torch_reads_it_as_any_other_file(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    checkpoints.save(path, payload())
    assert same(torch.load(path, weights_only=True)["model"], payload()["model"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:") and len(archive.comment) == 71


@pytest.mark.parametrize(
    "change, place",
    [
        ({"best": {"acc1": np.float64(3)}}, r"\['best'\]\['acc1'\] is a float64"),
        ({"meters": [1, (2, {3})]}, r"\['meters'\]\[1\]\[1\] is a set"),
        ({"config": {("a", os): 1}}, "module"),
        ({"config": Path(".")}, r"\['config'\] is a .*Path"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, change, place):
    path = tmp_path / "checkpoint-last.pth"
    checkpoints.save(path, payload(5))
    with pytest.raises(TypeError, match=place):
        checkpoints.save(path, payload(**change))
    assert checkpoints.load(path)["step"] == 5


class Touch:
    """Unpickling this runs a command: what a hostile file would do."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("signed", [False, True])
def test_hostile_file_is_refused_and_not_executed(tmp_path, monkeypatch, signed):
    path, target = tmp_path / "checkpoint-last.pth", tmp_path / "pwned"
    content = payload(config=Touch(target))
    if signed:
        monkeypatch.setattr(checkpoints, "_check_plain", lambda *_: None)
        checkpoints.save(path, content)
    else:
        torch.save({"format_version": 1, **content}, path)
    with pytest.raises(BadCheckpoint, match=r"checkpoint-last.pth"):
        checkpoints.load(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # negative control: the file does what it says
    assert target.exists()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99, "-1", "-72", "-74"])
def test_truncated(tmp_path, keep):
    path = tmp_path / "checkpoint-last.pth"
    checkpoints.save(path, payload())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep)] if isinstance(keep, str) else content[: int(keep * len(content))])
    with pytest.raises(BadCheckpoint, match=r"checkpoint-last.pth.*(truncated|checksum)"):
        checkpoints.load(path)


def test_any_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    checkpoints.save(path, payload())
    content = path.read_bytes()
    rng = random.Random(0)
    places = [0, len(content) - 1, len(content) - 70, *(rng.randrange(len(content)) for _ in range(200))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(BadCheckpoint):
            checkpoints.load(path)
    path.write_bytes(content)
    checkpoints.load(path)


def signed(path, content):
    """Writes any content with a checksum that holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda _payload, file: original(content, file))
        checkpoints.save(path, payload())


original = torch.save


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: path.write_text(""),
        lambda path: torch.save([1, 2], path),
        lambda path: path.mkdir(),
        lambda path: None,
        lambda path: path.symlink_to(path),
        lambda path: signed(path, [1, 2]),
        lambda path: signed(path, {}),
        lambda path: signed(path, {"format_version": 1, "model": {}}),
        lambda path: signed(path, {"format_version": [1]}),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, write):
    path = tmp_path / "checkpoint-last.pth"
    write(path)
    with pytest.raises(BadCheckpoint, match=r"checkpoint-last.pth"):
        checkpoints.load(path)


def test_newest_goes_by_content_not_by_name_or_time(tmp_path):
    for name, step in (("checkpoint-9.pth", 9), ("checkpoint-100.pth", 100), ("checkpoint-last.pth", 50)):
        checkpoints.save(tmp_path / name, payload(step))
    os.utime(tmp_path / "checkpoint-9.pth", (2e9, 2e9))
    found, state = checkpoints.newest(tmp_path)
    assert (found.name, state["step"]) == ("checkpoint-100.pth", 100)


def test_newest_skips_what_is_damaged_and_says_so(tmp_path, capsys):
    for step in (1, 2, 3):
        checkpoints.save(tmp_path / f"checkpoint-{step}.pth", payload(step))
    newest = tmp_path / "checkpoint-3.pth"
    newest.write_bytes(newest.read_bytes()[:-300])
    (tmp_path / "checkpoint-last.pth").write_bytes(b"")
    found, state = checkpoints.newest(tmp_path)
    assert (found.name, state["step"]) == ("checkpoint-2.pth", 2)
    said = capsys.readouterr().out
    assert "checkpoint-3.pth" in said and "checkpoint-last.pth" in said and "checkpoint-2.pth" not in said


def test_newest_is_the_best_one_where_nothing_else_is_left_or_it_is_further_on(tmp_path):
    checkpoints.save(tmp_path / "checkpoint-best.pth", payload(7))
    assert checkpoints.newest(tmp_path)[1]["step"] == 7
    checkpoints.save(tmp_path / "checkpoint-last.pth", payload(6))
    assert checkpoints.newest(tmp_path)[1]["step"] == 7
    checkpoints.save(tmp_path / "checkpoint-last.pth", payload(7, epoch=2))  # after the evaluation
    assert checkpoints.newest(tmp_path)[0].name == "checkpoint-last.pth"


def test_newest_of_damaged_files_only_is_an_error(tmp_path):
    for name in ("checkpoint-last.pth", "checkpoint-3.pth"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(BadCheckpoint, match=r"--output_dir .*checkpoint-3.pth, checkpoint-last.pth"):
        checkpoints.newest(tmp_path)


def test_newest_leaves_alone_what_is_no_step_of_the_run(tmp_path):
    checkpoints.save(tmp_path / "other.pth", payload(8))
    checkpoints.save(tmp_path / "checkpoint-last.pth.tmp", payload(9))
    assert checkpoints.newest(tmp_path) is None


def test_link_is_another_name(tmp_path):
    source, target = tmp_path / "checkpoint-last.pth", tmp_path / "checkpoint-3.pth"
    checkpoints.save(source, payload(3))
    checkpoints.link(source, target)
    checkpoints.save(source, payload(4))
    assert checkpoints.load(target)["step"] == 3 and checkpoints.load(source)["step"] == 4
    checkpoints.link(source, target)
    assert checkpoints.load(target)["step"] == 4


def test_link_copies_where_links_are_not_supported(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    test_link_is_another_name(tmp_path)


def test_prune_keeps_the_newest(tmp_path):
    for step in (2, 10, 9, 100):
        checkpoints.save(tmp_path / f"checkpoint-{step}.pth", payload(step))
    shutil.copy(tmp_path / "checkpoint-2.pth", tmp_path / "checkpoint-best.pth")
    shutil.copy(tmp_path / "checkpoint-2.pth", tmp_path / "checkpoint-last.pth")
    (tmp_path / "checkpoint-5.pth.bak").write_text("")
    checkpoints.prune(tmp_path, 2, trusted=tmp_path / "checkpoint-100.pth")
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-10.pth",
        "checkpoint-100.pth",
        "checkpoint-5.pth.bak",
        "checkpoint-best.pth",
        "checkpoint-last.pth",
    ]


def test_prune_never_removes_the_only_good_one(tmp_path, capsys):
    for step in (1, 2, 3):
        checkpoints.save(tmp_path / f"checkpoint-{step}.pth", payload(step))
    for step in (2, 3):
        path = tmp_path / f"checkpoint-{step}.pth"
        path.write_bytes(path.read_bytes()[:-500])
    checkpoints.prune(tmp_path, 2)
    checkpoints.prune(tmp_path, 0)
    assert checkpoints.newest(tmp_path)[1]["step"] == 1
    assert "older ones are kept" in capsys.readouterr().out
    checkpoints.save(tmp_path / "checkpoint-3.pth", payload(3))
    checkpoints.prune(tmp_path, 2)
    assert not (tmp_path / "checkpoint-1.pth").exists()


@pytest.mark.parametrize("version", range(1, checkpoints.FORMAT_VERSION + 1))
def test_every_format_version_can_be_read(version):
    """A file of each, as it was written then: 9 steps of `tests.tiny_models:plain`."""
    state = checkpoints.load(Path(__file__).parent / "golden" / f"checkpoint-v{version}.pth")
    assert (state["step"], state["epoch"], state["format_version"]) == (9, 2, version)
    assert state["model"]["stem.weight"].shape == (8, 3, 8, 8)
    assert {"input_size", "identity"} <= set(state)


def test_unknown_format_version_is_named(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-last.pth"
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 99)
    checkpoints.save(path, payload())
    monkeypatch.undo()
    with pytest.raises(BadCheckpoint, match="format version 99; this code reads versions 1 to 2"):
        checkpoints.load(path)


def test_what_was_written_wrongly_does_not_take_the_old_one_s_place(tmp_path, monkeypatch):
    """The checksum is of what was meant to be written: a disk that alters it is noticed before the rename."""
    path = tmp_path / "checkpoint-last.pth"
    checkpoints.save(path, payload(1))
    original = checkpoints._HashingWriter.write

    def alter(self, data):
        data = bytes(data)
        if len(data) > 100:
            original_file, self.file = self.file, Altering(self.file)
            written = original(self, data)
            self.file = original_file
            return written
        return original(self, data)

    monkeypatch.setattr(checkpoints._HashingWriter, "write", alter)
    with pytest.raises(OSError, match="reads back other than it was written"):
        checkpoints.save(path, payload(2))
    assert checkpoints.load(path)["step"] == 1 and os.listdir(tmp_path) == ["checkpoint-last.pth"]


class Altering:
    """A file that flips a bit of what it is given."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        data = bytearray(data)
        data[50] ^= 4
        return self.file.write(data)
