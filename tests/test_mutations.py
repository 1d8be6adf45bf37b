"""The negative control of tests/test_settings.py: a setting that is disconnected fails its case."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from mutations import ALL, copy_source, disconnect

from config import Config

NAMES = [f"{setting}:{file}" for setting, file, *_ in ALL]


def test_every_setting_can_be_disconnected():
    assert {setting for setting, *_ in ALL} == Config.__dataclass_fields__.keys()
    assert len(set(NAMES)) == len(NAMES)
    for setting, file, pattern, becomes in ALL:
        changed = disconnect((ROOT / file).read_text(), setting, pattern, becomes)
        compile(changed, file, "exec")


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Exit codes of pytest, by mutation; "" is the source as it is."""
    copy = tmp_path_factory.mktemp("copy")
    copy_source(copy)
    command = [sys.executable, str(ROOT / "tests" / "mutations.py"), str(copy), *NAMES]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.extended
def test_the_source_as_it_is_passes(codes):
    assert codes[""] == 0


@pytest.mark.extended
@pytest.mark.parametrize("name", NAMES)
def test_disconnected(name, codes):
    assert codes[name] == 1, "every test passes without it" if codes[name] == 0 else f"pytest ended with {codes[name]}"
