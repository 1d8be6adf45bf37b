"""The shell scripts, run with stand-ins for Python and torchrun; requirements.txt and bench.py crop."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Stands in for the environment's Python: notes what it was asked, plays pip, ruff, pytest and venv, counts devices.
PYTHON = f"""#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
"-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "$TORCHRUN" "$4/bin/torchrun"; exit ;;
"-m pip install"*) exit "${{PIP_EXIT:-0}}" ;;
"-m "*) exit ;;
*"/scripts/launch.py "*) shift && exec "$TORCHRUN" "$@" ;;
*device_count*) echo "${{DEVICES:-1}}"; exit ;;
esac
exec "{sys.executable}" "$@"
"""
TORCHRUN = f"""#!/bin/sh
exec "{sys.executable}" -c 'import json, os, sys; print(json.dumps([os.getcwd(), *sys.argv[1:]]))' "$@"
"""


class Checkout:
    """A copy of the scripts in a folder whose name has spaces, with stand-ins for all that they start."""

    def __init__(self, base: Path):
        self.root = base / "my repo"
        self.home = base / "some where"
        self.calls_file = base / "calls"
        (self.root / "recipes").mkdir(parents=True)
        self.home.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        (self.root / "requirements.txt").write_text("six\n")
        (self.root / "main.py").write_text("")
        (self.root / "recipes" / "demo.yaml").write_text("")
        self.active = base / "active env"
        self.tools = base / "tools"
        for folder in (self.active / "bin", self.tools):
            folder.mkdir(parents=True)
        self.program(self.active / "bin" / "python", PYTHON)
        self.program(self.active / "bin" / "torchrun", TORCHRUN)
        for name in ("bash", "sh", "dirname", "cmp", "cp", "sed", "mkdir", "cat"):
            (self.tools / name).symlink_to(shutil.which(name))

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script, *arguments, active=True, **environment):
        """Runs a script; the result's `calls` are what Python was asked, without the checks of its version and pip."""
        self.calls_file.write_text("")
        variables = {
            "PATH": str(self.tools),
            "HOME": str(self.home),
            "CALLS": str(self.calls_file),
            "TORCHRUN": str(self.active / "bin" / "torchrun"),
            **({"VIRTUAL_ENV": str(self.active)} if active else {}),
            **environment,
        }
        command = ["bash", str(self.root / script), *arguments]
        result = subprocess.run(
            command,
            cwd=self.home,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        checks = ("-c import sys", "-m pip --version", "-c import json")
        result.calls = [call for call in self.calls_file.read_text().splitlines() if not call.startswith(checks)]
        return result

    def torchrun(self, *arguments, **settings):
        """What train.sh hands to torchrun."""
        result = self.run("scripts/train.sh", *arguments, **settings)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])[1:]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# --- the environment


def installs(result):
    return [call for call in result.calls if call.startswith("-m pip install")]


def test_requirements_are_installed_when_they_changed_and_only_then(checkout):
    first = checkout.run("scripts/test.sh")
    assert first.returncode == 0, first.stderr
    (installation,) = installs(first)
    assert installation.endswith(f" -r {checkout.root}/requirements.txt")
    assert installs(checkout.run("scripts/test.sh")) == []
    (checkout.root / "requirements.txt").write_text("six\nnumpy\n")
    assert len(installs(checkout.run("scripts/test.sh"))) == 1
    assert not (checkout.root / ".venv").exists()  # the active environment was used


def test_extended_tests_install_more(checkout):
    (checkout.root / "requirements-extended.txt").write_text("lightning\n")
    lists = [call.rpartition("/")[2] for call in installs(checkout.run("scripts/test.sh", "--extended"))]
    assert lists == ["requirements.txt", "requirements-extended.txt"]
    assert installs(checkout.run("scripts/test.sh", "--extended")) == []


def test_a_failed_installation_is_reported_and_tried_again(checkout):
    failed = checkout.run("scripts/test.sh", PIP_EXIT="1")
    assert failed.returncode == 1
    assert "error: installing requirements.txt failed" in failed.stderr
    assert not any(call.startswith("-m pytest") for call in failed.calls)
    assert len(installs(checkout.run("scripts/test.sh"))) == 1


def test_without_an_active_environment_one_is_made_once(checkout):
    checkout.program(checkout.tools / "python3", PYTHON)
    made = checkout.run("scripts/test.sh", active=False)
    assert made.returncode == 0, made.stderr
    assert f"-m venv --clear {checkout.root}/.venv" in made.calls
    assert len(installs(made)) == 1
    again = checkout.run("scripts/test.sh", active=False)
    assert not any("venv" in call or "install" in call for call in again.calls)
    assert checkout.torchrun("recipes/demo.yaml", active=False)[0] == "--standalone"  # its torchrun is found


def test_conda_environments_count_but_the_base_one(checkout):
    conda = {"CONDA_PREFIX": str(checkout.active), "active": False}
    assert checkout.run("scripts/test.sh", CONDA_DEFAULT_ENV="vision", **conda).returncode == 0
    assert (checkout.active / ".requirements-installed").is_file()
    base = checkout.run("scripts/test.sh", CONDA_DEFAULT_ENV="base", **conda)
    assert base.returncode == 1  # it wants .venv, and there is no python3 here to make one
    assert "Python 3.10 or newer is needed" in base.stderr


def test_an_old_python_is_named(checkout):
    checkout.program(checkout.tools / "python3", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10; exit 1\n')
    result = checkout.run("scripts/test.sh", active=False)
    assert result.returncode == 1
    assert "error: Python 3.10 or newer is needed; found: Python 3.8.10" in result.stderr
    (checkout.active / "bin" / "python").unlink()
    result = checkout.run("scripts/test.sh")
    assert "has no bin/python" in result.stderr
    assert result.returncode == 1


# --- test.sh and .ci/run


def test_test_script_checks_format_then_runs_pytest(checkout):
    for script in ("scripts/test.sh", ".ci/run"):
        calls = [call for call in checkout.run(script).calls if "pip" not in call]
        assert calls == ["-m ruff check .", "-m ruff format --check .", "-m pytest -n auto --maxprocesses 8"]
    calls = checkout.run("scripts/test.sh", "--extended", "-k", "crop and not odd").calls
    assert calls[-1].endswith(" -m extended or not extended -k crop and not odd")
    assert "--extended" in checkout.run("scripts/test.sh", "--help").stdout


# --- train.sh


def test_training_on_one_machine_uses_all_its_devices(checkout):
    recipe, main = f"{checkout.root}/recipes/demo.yaml", f"{checkout.root}/main.py"
    assert checkout.torchrun("recipes/demo.yaml", DEVICES="4") == (
        ["--standalone", "--nproc_per_node", "4", main, "--recipe", recipe]
    )
    assert checkout.torchrun("recipes/demo.yaml", "--nproc", "2", DEVICES="4")[1:3] == ["--nproc_per_node", "2"]
    assert checkout.torchrun("--nproc=3", "recipes/demo.yaml")[1:3] == ["--nproc_per_node", "3"]


def test_training_on_several_machines(checkout):
    several = ["--nnodes", "2", "--node_rank", "1", "--master", "node0:29500"]
    expected = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "node0", "--master_port", "29500"]
    assert checkout.torchrun("recipes/demo.yaml", *several, "--lr", "1e-3", DEVICES="8") == (
        [*expected, "--nproc_per_node", "8", f"{checkout.root}/main.py"]
        + ["--recipe", f"{checkout.root}/recipes/demo.yaml", "--lr", "1e-3"]
    )
    assert checkout.torchrun("--master=10.0.0.1:1", "--nnodes=2", "--node_rank=0", "recipes/demo.yaml")[:8] == (
        ["--nnodes", "2", "--node_rank", "0", "--master_addr", "10.0.0.1", "--master_port", "1"]
    )


def test_training_on_machines_that_come_and_go(checkout):
    expected = ["--nnodes", "1:4", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:29500", "--rdzv_id"]
    expected += ["node0:29500", "--max_restarts", "100", "--nproc_per_node", "8"]
    elastic = ["--nnodes", "1:4", "--master", "node0:29500"]
    assert checkout.torchrun("recipes/demo.yaml", *elastic, DEVICES="8")[:12] == expected
    assert checkout.torchrun("recipes/demo.yaml", "--nnodes=2:2", "--master=node0:29500")[1] == "2:2"


def test_flags_and_paths_arrive_as_they_were_written(checkout):
    own = checkout.home / "my recipe.yaml"
    own.write_text("")
    flags = ["--data_path", "/data/two words", "--lr", "-1", "--output_dir=a b", "--model", "x*$HOME'\""]
    result = checkout.torchrun("my recipe.yaml", *flags)
    assert result[4:] == ["--recipe", "my recipe.yaml", *flags]
    assert checkout.torchrun(*flags, str(own))[4:] == ["--recipe", str(own), *flags]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe"),
        (["a.yaml", "b.yaml"], "one recipe at a time; got a.yaml and b.yaml"),
        (["a.yaml", "--nproc"], "--nproc needs a value"),
        (["a.yaml", "--lr"], "--lr needs a value"),
        (["a.yaml", "--nproc", "two"], "--nproc must be a whole number, got 'two'"),
        (["a.yaml", "--nproc", "0"], "--nproc must be at least 1"),
        (["a.yaml", "--nnodes", "2"], "--nnodes 2 needs --node_rank (0 to 1)"),
        (["a.yaml", "--nnodes", "2", "--node_rank", "2", "--master", "a:1"], "--node_rank must be 0 to 1"),
        (["a.yaml", "--nnodes", "2", "--node_rank", "0"], "needs --master HOST:PORT"),
        (["a.yaml", "--nnodes", "2", "--node_rank", "0", "--master", "node0"], "needs --master HOST:PORT"),
        (["a.yaml", "--nnodes", "2", "--node_rank", "0", "--master", "node0:1x"], "the port of --master must be"),
        (["a.yaml", "--node_rank", "0"], "give --nnodes too"),
        (["a.yaml", "--nnodes", "1:4"], "--nnodes 1:4 needs --master HOST:PORT"),
        (["a.yaml", "--nnodes", "4:2", "--master", "a:1"], "--nnodes must be at least 4, got 2"),
        (["a.yaml", "--nnodes", "0:2", "--master", "a:1"], "--nnodes must be at least 1, got 0"),
        (["a.yaml", "--nnodes", "1:1", "--master", "a:1"], "the most of --nnodes must be at least 2, got 1"),
        (["a.yaml", "--nnodes", "1:", "--master", "a:1"], "--nnodes must be a whole number, got ''"),
        (["a.yaml", "--nnodes", "1:2:3", "--master", "a:1"], "--nnodes must be a whole number, got '2:3'"),
        (["a.yaml", "--nnodes", "1:4", "--node_rank", "0", "--master", "a:1"], "--node_rank has no use"),
    ],
)
def test_wrong_usage_exits_2_with_one_line_and_the_way_to_help(checkout, arguments, message):
    result = checkout.run("scripts/train.sh", *arguments)
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert "--help" in second
    assert result.calls == []  # before anything is installed or started


def test_a_missing_recipe_is_named(checkout):
    result = checkout.run("scripts/train.sh", "recipes/none.yaml")
    assert result.returncode == 1
    assert "error: recipe recipes/none.yaml does not exist" in result.stderr


def test_help_names_every_option(checkout):
    result = checkout.run("scripts/train.sh", "--help", active=False)
    assert result.returncode == 0
    for word in ("RECIPE", "--nproc", "--nnodes", "--node_rank", "--master HOST:PORT", "MIN:MAX"):
        assert word in result.stdout
    assert "#" not in result.stdout


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_pass_shellcheck(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-x", "-P", "scripts", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


# --- requirements.txt

IMPORT_NAMES = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml", "scikit-image": "skimage"}
IMPORT_NAMES |= {"docstring-parser": "docstring_parser", "scikit-learn": "sklearn"}
NOT_IMPORTED = {"six", "ruff", "pytest-xdist"}
NOT_IMPORTED |= {"scikit-image", "matplotlib", "scipy", "onnx", "onnxscript", "onnxruntime"}  # used inside functions
NOT_IMPORTED |= {"aiohttp", "s3fs", "pyarrow", "hotcoco", "moto", "pycocotools", "scikit-learn"}  # so, or by tests


def requirements():
    """Name -> comment of each line."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9_-]+)(?:\[\w+\])?>=[\d.]+(?:,<[\d.]+)? +# (.+)", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches) if not match]
    return {match[1]: match[2] for match in matches}


def imported_modules():
    """Top-level modules that a file of the repository imports when it is itself imported."""
    apart = {"docs", "build"}  # the site's own packages are in requirements-extended.txt
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in apart]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    own = {path.stem for path in files} | {folder.name for folder in folders}
    found = {}
    for path in files:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return {name: path for name, path in found.items() if name not in own | set(sys.stdlib_module_names)}


def test_requirements_list_what_is_imported_with_a_reason_each():
    listed = requirements()
    modules = {IMPORT_NAMES.get(name, name) for name in listed}
    imported = imported_modules()
    assert not {name: path for name, path in imported.items() if name not in modules}
    assert not {name for name in listed if IMPORT_NAMES.get(name, name) not in imported} - NOT_IMPORTED
    assert "requested stack" in listed["six"]


# --- bench.py


def test_bench_crop_ends_with_its_ratios(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench

    small = ["--base_size", "32", "--batch", "2", "--sizes", "16", "8", "--repetitions", "3"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "crop", *small, "--json"])
    bench.main()
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(ratios["crop"]) == ["16", "8"]
    for size, (low, high) in ratios["spread"].items():
        assert 0 < low <= ratios["crop"][size] <= high
    monkeypatch.setattr(bench, "crop_by_fft", lambda images, size: images[..., :size, :size])
    with pytest.raises(SystemExit, match="the two crops to 16 differ"):
        bench.main()
    monkeypatch.setattr(sys, "argv", ["bench.py", "crop", "--sizes", "15"])
    with pytest.raises(SystemExit) as wrong:
        bench.main()
    assert wrong.value.code == 2
