"""log.txt and TensorBoard survive kills and full disks; the progress line and the ETA say what is true."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import same
from tensorboardX.proto.event_pb2 import Event

from curriculum import build_plan
from inputs import index_file
from models.run_files import read_log
from training import logs
from training.logs import Progress, RunLog, progress_line
from utils import duration_text


def record(step, **more):
    return {"epoch": step, "step": step, "progress": step / 100, "train_loss": 1.5, **more}


def steps(folder):
    return [entry["step"] for entry in read_log(folder / "log.txt")]


def curves(folder):
    """{tag: [(step, value)]} of the event files, read from their own format: length, checksum, event, checksum."""
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + length :]
    return found


def test_records_and_curves(tmp_path):
    log = RunLog(tmp_path, 0, 0)
    log.interval(1, {"loss": 2.0})
    log.epoch(record(3, magnitude=None, test_acc1=50.0))
    log.interval(4, {"loss": 1.0})
    log.epoch(record(6))
    log.close()
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        record(3, magnitude=None, test_acc1=50.0),
        record(6),
    ]
    assert curves(tmp_path) == {
        "train/loss": [(1, 2.0), (4, 1.0)],
        "epoch/epoch": [(3, 3.0), (6, 6.0)],
        "epoch/progress": [(3, pytest.approx(0.03)), (6, pytest.approx(0.06))],
        "epoch/train_loss": [(3, 1.5), (6, 1.5)],
        "epoch/test_acc1": [(3, 50.0)],
    }


def test_curves_can_be_read_while_the_run_goes_on(tmp_path):
    log = RunLog(tmp_path, 0, 0)
    log.interval(1, {"loss": 2.0})
    assert curves(tmp_path) == {"train/loss": [(1, 2.0)]}
    log.close()


@pytest.mark.parametrize(
    "logged, kept", [(0, []), (0.029, []), (0.03, [3]), (0.059, [3]), (0.06, [3, 6]), (1, [3, 6, 9])]
)
def test_resume_cuts_back_to_the_finished_passes(tmp_path, logged, kept):
    log = RunLog(tmp_path, 0, 0)
    for number in (3, 6, 9):
        log.epoch(record(number))
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 12, "st')
    RunLog(tmp_path, 0, logged).close()
    assert steps(tmp_path) == kept
    assert (tmp_path / "log.txt").read_text().count("\n") == len(kept)


def test_other_processes_write_nothing(tmp_path):
    log = RunLog(None, 0, 0)
    log.epoch(record(1))
    log.interval(1, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


class FullDisk:
    """os.write that writes ``room`` bytes and then fails, as a full disk does."""

    def __init__(self, room):
        self.room, self.original = room, os.write

    def __call__(self, handle, content):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.original(handle, content[: self.room])
        self.room -= written
        return written


def test_what_could_not_be_written_comes_from_the_checkpoint(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 0, 0)
    log.epoch(record(1))
    monkeypatch.setattr(logs.os, "write", FullDisk(0))
    log.epoch(record(2))
    unwritten = log.waiting  # is kept in the checkpoint, and then comes a kill
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    RunLog(tmp_path, 2, 0.02, unwritten).close()
    assert steps(tmp_path) == [1, 2]
    RunLog(tmp_path, 2, 0.02, unwritten).close()  # of an older checkpoint: the line is there already
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "damage", [b"\x00\xff\xfe", b"{", b"[1]", b'{"progress": "x"}', b'{"progress": NaN}', b"[" * 9999]
)
def test_a_damaged_line_costs_that_line_only(tmp_path, capsys, damage):
    log = RunLog(tmp_path, 0, 0)
    for number in (1, 2, 3):
        log.epoch(record(number))
    lines = (tmp_path / "log.txt").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.txt").write_bytes(lines[0] + damage + b"\n" + lines[2])
    assert steps(tmp_path) == [1, 3]
    assert "log.txt line 2 is damaged and passed over" in capsys.readouterr().err
    RunLog(tmp_path, 3, 0.03).close()
    assert "has 1 damaged line," in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_bytes() == lines[0] + damage + b"\n" + lines[2]
    RunLog(tmp_path, 1, 0.01).close()
    assert steps(tmp_path) == [1] and damage in (tmp_path / "log.txt").read_bytes()


@pytest.mark.parametrize("room", [0, 1, 30])
def test_full_disk_loses_no_record(tmp_path, monkeypatch, capsys, room):
    log = RunLog(tmp_path, 0, 0)
    log.epoch(record(1))
    monkeypatch.setattr(logs.os, "write", FullDisk(room))
    log.epoch(record(2))
    log.epoch(record(3))
    assert steps(tmp_path) == [1] and (tmp_path / "log.txt").read_text().endswith("}\n")
    assert "log.txt cannot be written (No space left on device)" in capsys.readouterr().out
    with pytest.raises(OSError, match="No space left"):
        log.close()
    monkeypatch.undo()
    log.epoch(record(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_tensorboard_on_a_full_disk_does_not_stop_or_block_the_run(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, 0, 0)

    def fail(_event):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log.curves[0].writer, "write_event", fail)
    for number in range(50):  # more than any queue
        log.interval(number, {"loss": 1.0})
    log.epoch(record(1))
    assert steps(tmp_path) == [1]
    assert capsys.readouterr().out.count("no more TensorBoard curves") == 1


class Clock:
    """A perf_counter that stands still until told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def test_eta_knows_that_stages_differ_in_speed(clock):
    plan = build_plan("efficienttrain++", epochs=10, num_images=100, batch_size=10)  # stages of 96, 160 and 224
    first, second, third = plan.stages
    progress = Progress(plan)
    epoch = plan.records[0]
    assert progress.eta(0, epoch, 0) == float("inf")

    def train(steps, seconds):
        for _ in range(steps):
            progress.step()
        clock.now += seconds
        return progress.interval(epoch)

    assert train(10, 20.0) == pytest.approx(5)  # 10 steps of 10 images in 20 s
    # Of the other stages nothing is known: in proportion to their pixels.
    expected = 2 * (first.steps - 10) + 2 * second.steps * (160 / 96) ** 2 + 2 * third.steps * (224 / 96) ** 2
    assert progress.eta(10, epoch, 0) == pytest.approx(expected)
    progress.evaluation_seconds = 7.0
    assert progress.eta(10, epoch, 3) == pytest.approx(expected + 21)
    # Once the second stage was measured, its own speed counts, and the last follows from it.
    epoch = plan.locate(second.first_step)[0]
    progress.evaluation_seconds = 0
    train(5, 50.0)
    step = second.first_step + 5
    expected = 10 * (second.steps - 5) + 10 * third.steps * (224 / 160) ** 2
    assert progress.eta(step, epoch, 0) == pytest.approx(expected)
    assert progress.eta(plan.total_steps, epoch, 0) == 0


def test_compiling_counts_once_for_each_size_to_come(clock):
    plan = build_plan("efficienttrain++", epochs=10, num_images=100, batch_size=10)
    first, second, third = plan.stages
    progress, epoch = Progress(plan), plan.records[0]
    progress.compiling = True
    clock.now += 90  # the first step
    assert progress.step() and progress.compile_seconds == 90
    for _ in range(10):
        assert not progress.step()
    clock.now += 20
    assert progress.interval(epoch) == pytest.approx(5)  # without the step that compiled
    train = 2 * (first.steps - 11) + 2 * second.steps * (160 / 96) ** 2 + 2 * third.steps * (224 / 96) ** 2
    assert progress.eta(11, epoch, 0) == pytest.approx(train + 2 * 90)
    last = plan.records[-1]
    progress.seconds_per_step[last.stage] = 3.0
    assert progress.eta(plan.total_steps - 4, last, 0) == pytest.approx(12)


def test_a_compiled_run_says_what_it_waits_for(train, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    run = train(compile=True)
    out = capsys.readouterr().out
    for size in (32, 48, 64):
        assert out.count(f"compiling the model for input size {size}, in its first step") == 1
        assert out.count(f"compiled for input size {size} in 0:0") == 1
    assert "input size 48, in its first step; the last one took 0:0" in out
    assert same(run.result()["state"]["model"], train("plain").state()["model"])
    assert "compiling" not in capsys.readouterr().out


def test_long_setting_up_says_how_long_it_takes(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(index_file, "time", SimpleNamespace(monotonic=lambda: clock.now))
    report = index_file.Progress("here", 200, "archives")
    for _ in range(100):
        clock.now += 1.5
        report.add(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "indexing here: 1 of 200 archives, 10 images, 4:58 left"
    assert lines[-1].startswith("indexing here: 9") and 5 < len(lines) < 20  # every 15 s into a file
    for _ in range(100):
        report.add(10)
    report.close()
    assert capsys.readouterr().err.splitlines()[-1].rstrip() == "indexing here: 200 of 200 archives, 2000 images"


def test_what_is_not_training_does_not_count_as_slow(clock):
    plan = build_plan("none", epochs=2, num_images=100, batch_size=10)
    progress = Progress(plan)
    progress.step()
    clock.now += 60  # an evaluation
    progress.mark()
    progress.step()
    clock.now += 2
    assert progress.interval(plan.records[0]) == pytest.approx(5)


def test_progress_line():
    plan = build_plan("efficienttrain++", epochs=10, num_images=100, batch_size=10)
    epoch = plan.records[1]
    line = progress_line(plan, epoch, 15, 2.5, 1.5e-3, 1234.5, 3725, torch.device("cpu"))
    for part in ("stage 1/3", f"pass 2/{len(plan)}", f"step 15/{plan.total_steps}", "B 96", "loss 2.5000"):
        assert part in line
    for part in (f"m {epoch.magnitude:.1f}", "lr 1.50e-03", "1,234 images/s", "GiB", "eta 1:02:05"):
        assert part in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (75, "1:15"),
        (59.7, "1:00"),
        (3600, "1:00:00"),
        (90000, "1 d 1:00:00"),
        (86400, "1 d 0:00:00"),
        (float("inf"), "unknown"),
    ],
)
def test_durations_as_text(seconds, text):
    assert duration_text(seconds) == text
