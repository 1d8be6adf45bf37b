"""scripts/matrix.sh, run with stand-ins: which packages each end gets, and which tests are the fast ones."""

import re

import pytest
from conftest import ROOT
from test_house import imported_rooms
from test_scripts import Checkout

REQUIREMENTS = """# A head
torch>=2.4                      # tensors
opencv-python-headless>=4.9.0.80 # warps
moto[server]>=5.0               # a server

ruff>=0.17,<0.18                # capped
"""


def fast_tests():
    """The paths that the script gives to pytest."""
    text = (ROOT / "scripts/matrix.sh").read_text()
    names = re.sub(r"#.*", "", re.search(r"^FAST=\((.*?)^\)", text, re.M | re.S)[1]).split()
    return [ROOT / f"tests/test_{name}.py" for name in names]


def test_the_fast_tests_are_there_and_enter_every_room():
    files = fast_tests()
    assert len(files) > 20 and all(path.is_file() for path in files)
    entered = {room for path in files for room, _ in imported_rooms(path.read_text(), "tests")}
    assert entered >= {"curriculum", "config", "inputs", "models", "training", "dense", "engine", "utils"}


@pytest.fixture
def matrix(tmp_path):
    checkout = Checkout(tmp_path)
    (checkout.root / "requirements.txt").write_text(REQUIREMENTS)
    (checkout.root / "build/matrix").mkdir(parents=True)
    python = str(checkout.active / "bin/python")

    def run(*arguments, **environment):
        named = {"OLDEST_PYTHON": python, "NEWEST_PYTHON": python}
        return checkout.run("scripts/matrix.sh", *arguments, active=False, **{**named, **environment})

    run.installed = lambda end: (checkout.root / "build/matrix" / end / "installed.txt").read_text().split()
    return run


def calls(result, start):
    return [call for call in result.calls if call.startswith(start)]


def test_the_oldest_end_gets_exactly_the_lower_bounds_and_the_newest_the_ranges(matrix):
    result = matrix("-x")
    assert result.returncode == 0, result.stderr
    assert matrix.installed("oldest") == [
        "torch==2.4",
        "opencv-python-headless==4.9.0.80",
        "moto[server]==5.0",
        "ruff==0.17",
    ]
    assert matrix.installed("newest") == [
        "torch>=2.4",
        "opencv-python-headless>=4.9.0.80",
        "moto[server]>=5.0",
        "ruff>=0.17,<0.18",
    ]
    installs = calls(result, "-m uv pip install")
    for end, install in zip(("oldest", "newest"), installs, strict=True):
        folder = f"/build/matrix/{end}"
        assert f"{folder}/bin/python --upgrade -r " in install and install.endswith(f"{folder}/wanted.txt")
    tests = calls(result, "-m pytest")
    assert len(tests) == 2
    assert all(str(path.relative_to(ROOT)) in tests[0].split() for path in fast_tests())
    assert tests[0].endswith(" -x")


def test_an_end_alone_in_an_environment_that_is_kept(matrix):
    assert len(calls(matrix("newest"), "-m pip install")) == 1
    again = matrix("newest")
    assert calls(again, "-m pip install") == [] and len(calls(again, "-m pytest")) == 1
    assert not calls(again, "-m venv")


def test_failures_are_said(matrix):
    missing = matrix("oldest", OLDEST_PYTHON="/none/python3.10")
    assert missing.returncode == 1 and missing.calls == []
    assert "no /none/python3.10: install it" in missing.stderr
    assert matrix("oldest", PIP_EXIT="1").returncode == 1
    assert len(calls(matrix("oldest"), "-m pip install")) == 1  # what failed is tried again
