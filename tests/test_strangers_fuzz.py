"""Mutated files of every kind end with an answer or one line: no traceback, hang, memory without bounds, or code run.

The extended run tries 2,000; in a process of its own, whose memory and time are limited.
"""

import io
import json
import os
import random
import resource
import signal
import tarfile
import time
from contextlib import suppress

import pytest
import torch
from conftest import flags
from test_faults_fuzz import damage, sign

from config import load_recipe
from inputs.folder import FolderIndex
from inputs.tar import TarIndex
from models import checkpoints
from training.report import write_report

short_and_long = pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.extended)])
SECONDS = 20  # for one file: a hang, on however busy a machine


@pytest.fixture(autouse=True)
def limits():
    """A hang is an error after SECONDS for each file (see `beat`), and so is taking 2 GB more than before."""

    late = []

    def too_long(*_):
        late.append(True)  # whoever catches the error
        raise AssertionError("a file took longer than it may")

    before = signal.signal(signal.SIGALRM, too_long)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not late
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2 << 20  # KiB


def beat():
    signal.alarm(SECONDS)


def refused(call, *arguments):
    """Whether a call refuses its file, with one line and in time."""
    beat()
    try:
        call(*arguments)
        return False
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        return True


VALUES = ["", "x" * 1000, 0, -1, 2**70, 1e300, float("nan"), True, None, [], {}, [[]], {"a": {}}, torch.ones(2, 2)]


def mutate(content, rng):
    """Puts another value at a random place of nested dictionaries and lists, or takes one away."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = rng.choice(list(keys))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if isinstance(place, dict) and rng.random() < 0.2:
            place.pop(key)
        else:
            place[key] = rng.choice(VALUES)
        return


@pytest.fixture(scope="module")
def run(folder, main_program, tmp_path_factory):
    output = tmp_path_factory.mktemp("fuzz") / "run"
    settings = {"model": "test_vit", "output_dir": output, "data_path": folder, "epochs": 1}
    assert main_program(flags(**settings)) == 0
    return output


@short_and_long
def test_signed_checkpoints(run, folder, tmp_path, main_program, capsys, count):
    """Loaded, predicted with and resumed from: nothing that a signed file says makes more than a line."""
    rng = random.Random(count)
    whole = (run / "checkpoint-last.pth").read_bytes()
    image = str(folder / "val" / "class_0" / "00.jpg")
    path = tmp_path / "checkpoint-last.pth"
    refusals = 0
    for number in range(count):
        content = torch.load(io.BytesIO(whole), weights_only=True)
        for _ in range(rng.choice([1, 1, 2, 4])):
            mutate(content, rng)
        plain = io.BytesIO()
        torch.save(content, plain)
        path.write_bytes(sign(plain.getvalue()))
        refusals += refused(checkpoints.load, path)
        argv = ["--predict", image, "--resume", str(path), "--device", "cpu"]
        if number % 3 == 0:
            argv = flags(
                model="test_vit", output_dir=tmp_path / f"out{number}", data_path=folder, epochs=1, resume=path
            )
        beat()
        code = main_program(argv)
        err = capsys.readouterr().err
        assert code in (0, 1, 2) and sum(line.startswith("error: ") for line in err.splitlines()) == (code > 0), err
    assert refusals > count / 8


@short_and_long
def test_indices(folder, tmp_path, monkeypatch, count):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    right = FolderIndex(folder / "train").labels().tolist()
    (path,) = (tmp_path / "efficienttrain").glob("*.image_index")
    whole, rng = path.read_bytes(), random.Random(count)
    for _ in range(2 * count):
        beat()
        path.write_bytes(damage(whole, rng))
        assert FolderIndex(folder / "train").labels().tolist() == right


@short_and_long
def test_recipes_of_many_files(tmp_path, count):
    rng = random.Random(count)
    names = [f"{number}.yaml" for number in range(8)]
    pieces = [
        "lr: 1\n",
        "extends: {}\n",
        "extends: [{}, {}]\n",
        "a: &a [1]\n",
        "b: *a\n",
        "{{",
        "[" * 40,
        "\0",
        "x: 1e9\n",
    ]
    refusals = 0
    for _ in range(count):
        for name in names:
            text = "".join(rng.choice(pieces).format(*rng.choices([*names, "/dev/zero", "."], k=2)) for _ in range(2))
            (tmp_path / name).write_text(text)
        refusals += refused(load_recipe, str(tmp_path / "0.yaml"))
    assert refusals > 0


@short_and_long
def test_logs_and_plans(run, tmp_path, count):
    rng = random.Random(count)
    for name in ("config.yaml", "plan.json", "log.txt", "environment.json", "plan.svg"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    records = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    plan = json.loads((run / "plan.json").read_text())
    refusals = 0
    for _ in range(count):
        name = rng.choice(["log.txt", "plan.json", "config.yaml", "environment.json"])
        whole = (run / name).read_bytes()
        if name == "log.txt" and rng.random() < 0.7:
            changed = json.loads(json.dumps(records))
            mutate(changed, rng)
            text = "".join(json.dumps(record, default=str) + "\n" for record in changed).encode()
        elif name == "plan.json" and rng.random() < 0.7:
            changed = json.loads(json.dumps(plan))
            mutate(changed, rng)
            text = json.dumps(changed, default=str).encode()
        else:
            text = damage(whole, rng)
        (tmp_path / name).write_bytes(text)
        refusals += refused(write_report, tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert 0 < refusals < count
    assert "<script" not in (tmp_path / "report.html").read_text()


def header(raw, offset):
    """Mends the checksum of the header at ``offset``, so that what was changed in it counts."""
    raw[offset + 148 : offset + 156] = b" " * 8
    raw[offset + 148 : offset + 156] = b"%06o\0 " % sum(raw[offset : offset + 512])


@short_and_long
def test_tars(tmp_path, monkeypatch, count):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    file, rng = io.BytesIO(), random.Random(count)
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(6):
            for name, data in (
                (f"{number}.jpg", b"\xff\xd8\xff" + bytes(600)),
                (f"{number}.cls", b"%d" % (number % 2)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    whole = file.getvalue()
    headers = [offset for offset in range(0, len(whole), 512) if whole[offset + 257 : offset + 262] == b"ustar"]
    sizes = [b"77777777777\0", (-512).to_bytes(12, "big", signed=True), (-1536).to_bytes(12, "big", signed=True)]
    sizes += [b"\x80" + b"\x7f" * 11, b"00000000000\0", b"00000001000\0"]
    (tmp_path / "data").mkdir()
    for number in range(count):
        raw = bytearray(whole)
        for offset in rng.sample(headers, rng.choice([1, 1, 3])):
            if rng.random() < 0.7:
                raw[offset + 124 : offset + 136] = rng.choice(sizes)
            if rng.random() < 0.6:
                raw[offset + 156 : offset + 157] = rng.choice([b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"5", b"\0"])
            header(raw, offset)
        if rng.random() < 0.3:
            raw = bytearray(damage(bytes(raw), rng))
        path = tmp_path / "data" / f"{number}.tar"
        path.write_bytes(raw)

        def read(path=path):
            index = TarIndex(path)
            for place in range(min(len(index), 8)):
                with suppress(ValueError, OSError):
                    index.read(place)

        refused(read)
        os.unlink(path)


@pytest.mark.parametrize("size", [-512, -1536, -2048, -(1 << 40)])
def test_a_member_of_negative_size(tmp_path, size):
    """tarfile goes back by it, and so round and round."""
    started = time.monotonic()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("a/1.jpg", "a/2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 600
            archive.addfile(info, io.BytesIO(bytes(600)))
    raw = bytearray(file.getvalue())
    raw[1536 + 124 : 1536 + 136] = size.to_bytes(12, "big", signed=True)
    header(raw, 1536)
    (tmp_path / "x.tar").write_bytes(raw)
    assert refused(TarIndex, tmp_path / "x.tar") or len(TarIndex(tmp_path / "x.tar")) == 1
    assert time.monotonic() - started < SECONDS
