"""Hostile and broken input of every kind ends with one line, never a traceback, and executes nothing."""

import io
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
import yaml
from conftest import ROOT, flags
from test_checkpoints import payload

from config import Config, to_yaml
from config.command_line import parse_config
from models import checkpoints
from models.checkpoints import BadCheckpoint

# The extended tests look longer.
short_and_long = pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.extended)])


@pytest.fixture
def canary(tmp_path):
    """A file that exists once something of the hostile input was executed; checked after every test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


# -- checkpoints -------------------------------------------------------------------------------------------------------


def damage(content, rng):
    """Flips bits, cuts, repeats, zeroes or inserts, once or a few times."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        place = rng.randrange(len(data))
        length = rng.choice([1, 2, 8, 64, 1000])
        kind = rng.randrange(6)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        elif kind == 3:
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == 4:
            data[place:place] = rng.randbytes(length)
        else:
            del data[place : place + length]
        if not data:
            break
    return bytes(data)


def sign(content):
    """Puts a checksum that holds behind any bytes that end with a zip archive's empty comment."""
    file = io.BytesIO()
    writer = checkpoints._HashingWriter(file)
    writer.write(content if len(content) >= 2 else content + b"\0\0")
    writer.finish()
    return file.getvalue()


@short_and_long
def test_damaged_checkpoints(tmp_path, count):
    """Never taken for good, whatever is damaged: also with a checksum that was made to fit."""
    path, rng = tmp_path / "checkpoint-last.pth", random.Random(count)
    checkpoints.save(path, payload())
    whole = path.read_bytes()
    archive = io.BytesIO()
    torch.save({"format_version": 2, **payload()}, archive)
    for number in range(5 * count):
        signed = number % 2
        damaged = damage(archive.getvalue() if signed else whole, rng)
        path.write_bytes(sign(damaged) if signed else damaged)
        try:
            state = checkpoints.load(path)
        except BadCheckpoint as error:
            assert str(path) in str(error)
            continue
        # Damage that nothing reads, such as a time stamp in the archive: but the content is whole. A signed one may
        # have other numbers in it, as anyone may write a checkpoint of other numbers.
        assert signed or damaged == whole
        assert set(checkpoints.KEYS) <= set(state)


def pickled(opcodes):
    """A signed archive whose pickle is ``opcodes``."""
    plain = io.BytesIO()
    torch.save(payload(), plain)
    changed = io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            target.writestr(name, opcodes if name.endswith("data.pkl") else source.read(name))
    return sign(changed.getvalue())


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_pickles_that_call_something(tmp_path, canary):
    path = tmp_path / "checkpoint-last.pth"
    command = f"touch {canary}"
    for function, arguments in (
        (os.system, (command,)),
        (eval, (f"open({str(canary)!r}, 'w')",)),
        (exec, (f"open({str(canary)!r}, 'w')",)),
        (__import__, ("antigravity",)),
        (getattr, ("text", "upper")),
        (open, (str(canary), "w")),
        (torch.load, (str(canary),)),
        (shutil.rmtree, (str(tmp_path / "nothing"),)),
        (torch.hub.load, ("nobody/nothing", "model")),
    ):
        for content in (Call(function, *arguments), {"format_version": 2, "model": Call(function, *arguments)}):
            path.write_bytes(pickled(pickle.dumps(content, protocol=2)))
            with pytest.raises(BadCheckpoint, match=r"holds more than tensors and plain types|cannot be read"):
                checkpoints.load(path)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02N.",
        b"\x80\x02]q\0h\0a.",  # a list that holds itself
        b"\x80\x02" + b"(" * 100000 + b".",
        b"\x80\x02" + b"]" + b"]a" * 50000 + b".",
        b"\x80\x02" + b"}" * 10 + b"u.",
        b"\x80\x02h\xff.",
        b"\x80\xff.",
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # an integer of 2 GB
        b"\x80\x02\x8e" + b"\xff" * 8 + b".",  # bytes of 16 exabytes
    ],
)
def test_pickles_of_nonsense(tmp_path, opcodes):
    path = tmp_path / "checkpoint-last.pth"
    path.write_bytes(pickled(opcodes))
    with pytest.raises(BadCheckpoint):
        checkpoints.load(path)


def test_archive_members_cannot_escape(tmp_path, canary):
    """Nothing is unpacked to disk, whatever the members are called."""
    path = tmp_path / "checkpoint-last.pth"
    for name in ("../executed", str(canary), "archive/../../executed"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
            archive.writestr(name, "escaped")
        path.write_bytes(sign(file.getvalue()))
        with pytest.raises(BadCheckpoint):
            checkpoints.load(path)


@pytest.mark.parametrize("count", [10, pytest.param(80, marks=pytest.mark.extended)])
def test_launches_on_damaged_files(main_program, folder, tmp_path, capsys, canary, count):
    """As --resume, as --finetune, and as the newest checkpoint of the folder."""
    rng = random.Random(count)
    assert main_program(flags(output_dir=tmp_path / "run", data_path=folder, epochs=1)) == 0
    whole = (tmp_path / "run" / "checkpoint-last.pth").read_bytes()
    hostile = pickled(pickle.dumps({"model": Call(os.system, f"touch {canary}")}, protocol=2))
    for number in range(count):
        content = damage(hostile if number % 5 == 0 else whole, rng)
        for flag in ("resume", "finetune", "output_dir"):
            target = tmp_path / f"try{number}{flag}"
            target.mkdir()
            file = target / "checkpoint-last.pth"
            file.write_bytes(content)
            settings = {"output_dir": tmp_path / "new", flag: target if flag == "output_dir" else file}
            capsys.readouterr()
            code = main_program(flags(data_path=folder, epochs=1, auto_resume=flag != "finetune", **settings))
            err = capsys.readouterr().err
            if code == 0:  # foreign weights carry no checksum: a flipped bit of a number is a number
                assert flag == "finetune"
                shutil.rmtree(tmp_path / "new")
                continue
            (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
            assert code == 1 and str(target) in line and "Traceback" not in err
            assert not (tmp_path / "new").exists()


# -- recipes -----------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *("lr: ", "model: ", "curriculum: ", "extends: ", "stages: ", "opt_betas: ", "model_args: ", "null", "true", "1e9"),
    *("- ", "{", "}", "[", "]", "&a ", "*a", "<<: ", "!!", "!!python/object/apply:os.system ", "? ", ": ", "\n", "  "),
    *("'", '"', "|", ">", "#", "%", "@", "`", "\t", "\0", "\ufeff", "\U0001f600", "2001-99-99", "0x", "1:2:3", ".nan"),
    *("$(touch executed)", "`touch executed`", "; touch executed", "../", "/dev/zero", "~", "=", "---", "..."),
]


@short_and_long
def test_recipes(tmp_path, canary, count, monkeypatch):
    """Mutated recipes are settings, or wrong usage."""
    monkeypatch.chdir(tmp_path)
    rng, path = random.Random(count), tmp_path / "recipe.yaml"
    recipes = [file.read_text() for file in sorted((ROOT / "recipes").rglob("*.yaml"))] + [to_yaml(Config())]
    for _ in range(count):
        text = rng.choice(recipes)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            place = rng.randrange(len(text) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                text = text[:place] + rng.choice(FRAGMENTS) + text[place:]
            elif kind == 1:
                text = text[:place] + text[place + rng.randrange(30) :]
            elif kind == 2:
                text = text[:place] + chr(rng.randrange(1, 0x250)) + text[place + 1 :]
            else:
                text = text[:place] + text[rng.randrange(len(text) + 1) :][: rng.randrange(200)] + text[place:]
        path.write_text(text)
        outcome(["--recipe", str(path)])


@short_and_long
def test_command_lines(tmp_path, canary, count, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(count)
    names = list(Config.__dataclass_fields__)
    for _ in range(count // 2):
        argv = []
        for _ in range(rng.randrange(1, 5)):
            name = rng.choice([*names, "recipe", "", "lr.x", "help2", "-", "model=", "config"])
            argv += [
                f"--{name}",
                *(rng.choice([*FRAGMENTS, "0", "-1", "1e999", "[1,2]", "{a: b}"]),) * rng.randrange(2),
            ]
        outcome(argv)


def outcome(argv):
    """Settings, or SystemExit with code 2 (0 for help)."""
    try:
        assert isinstance(parse_config(argv), Config)
    except SystemExit as stop:
        assert stop.code == 2, argv


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
        + "lr: *i\n",
        "model_args:\n  a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"  {b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
        "model_args: &x {a: *x}\n",
        "lr: " + "9" * 100000 + "\n",
        "lr: " + "{a: " * 800 + "}" * 800 + "\n",
        "model_args: " + "{a: " * 300 + "1" + "}" * 300 + "\n",
        "model: " + "x" * 1000000 + "\n",
        "lr: 0." + "0" * 5000 + "1\n",
        "epochs: 1" + "_0" * 5000 + "\n",
    ],
    ids=[
        "nine laughs",
        "laughs inside",
        "loop",
        "long number",
        "deep",
        "deep arguments",
        "long",
        "small",
        "underscores",
    ],
)
def test_recipes_that_grow(tmp_path, capsys, text):
    """A billion laughs, loops and depth: refused within a second or so, with a line of readable length."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    outcome(["--recipe", str(path)])
    assert len(capsys.readouterr().err) < 2000


def test_yaml_is_loaded_safely_everywhere():
    """No other loader is used in this project."""
    for file in ROOT.glob("**/*.py"):
        if ".venv" not in file.parts and "tests" not in file.parts:
            text = file.read_text()
            assert "yaml.load(" not in text and "yaml.unsafe_load" not in text and "yaml.full_load" not in text, file
            for line in text.splitlines():
                if "torch.load(" in line and not line.strip().startswith(("#", '"')):
                    assert "weights_only=True" in line or "``" in line, (file, line)
            assert "shell=True" not in text and "os.system(" not in text, file
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.system ['true']")
