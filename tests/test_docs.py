"""Every command in README.md, TRAINING.md, EVAL.md and two of docs/ is run, reduced to what a test can bear.

The reductions: data are tiny folders in a temporary directory; main.py gets the tiny model and settings of conftest.py
after the command's own (so they win), inside this process; the shell launchers run with stand-ins for torchrun and
sbatch, and what they would have started is run the same way; searches only say what they may cost. Commands with tests
of their own are only looked up: the demo, the tests, pytest, and ``python -m models...``.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, flags, script, write_images
from test_analysis import OWN, analyze
from test_results import results
from test_search import search
from test_slurm import Cluster

from tests.buckets import pack, s3_server, upload

PAGES = ("README.md", "TRAINING.md", "EVAL.md", "docs/method.md", "docs/frontier.md")
TESTED_ELSEWHERE = ("scripts/demo.sh", "scripts/test.sh")
SPEEDS = {"images_per_s": {"96": 5200, "160": 2050, "224": 1060}}
# Of recipes, what the tiny model does not have or a CPU is too slow for.
REDUCED = flags(
    model_args="{}", amp="none", drop_path=0, layer_decay=1.0, opt="sgd", warmup_epochs="10%", model_ema=False, epochs=1
)
PRETRAINING = [
    "--task",
    "mae",
    "--decoder",
    "[1,32,2]",
    *["--mixup", "0", "--cutmix", "0", "--reprob", "0", "--magnitude", "none"],
]
FILE_FLAGS = ("--finetune", "--resume")


def commands():
    """(page, command) for each command in a fenced bash block; continued lines are joined, comments dropped."""
    found = []
    for page in PAGES:
        if not (ROOT / page).exists():
            continue
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page, shlex.join(words)) for line in lines if (words := shlex.split(line, comments=True))]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A working directory with data and the recipes."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("imagenet/train", "imagenet21k/imagenet21k_train"):
        write_images(root / "data" / name, [16, 16, 16])
    for number, name in enumerate(("imagenet/val", "imagenet21k/imagenet21k_val", "imagenet-a"), 1):
        write_images(root / "data" / name, [4, 4, 4], seed=number)
    write_images(root / "data/imagenet21k/imagenet21k_small_classes/more", [8])
    folder = root / "data/imagenet21k/imagenet21k_small_classes"
    shutil.move(folder / "more/class_0", folder / "class_3")
    (folder / "more").rmdir()
    (root / "data/demo").symlink_to(root / "data/imagenet")
    (root / "my_images").symlink_to(root / "data/imagenet/train")
    (root / "photos").mkdir()
    for path in (root / "data/imagenet/val/class_0").iterdir():
        shutil.copy(path, root / "photos")
    (root / "recipes").symlink_to(ROOT / "recipes")
    (root / "ordinary.yaml").write_text("extends: recipes/demo.yaml\ncurriculum: none\n")
    (root / "speeds.json").write_text(json.dumps(SPEEDS))
    return root


@pytest.fixture
def run_main(site, main_program, monkeypatch):
    """Runs main.py's command line, reduced, in the site; makes the weights that it asks for by a run of a second."""
    monkeypatch.chdir(site)
    monkeypatch.setattr("commands.doctor.SECONDS", 0.02)

    def finished(folder):
        if not (folder / "config.yaml").exists():
            assert main_program([*REDUCED, "--data_path", "data/imagenet", "--output_dir", str(folder)]) == 0

    def call(arguments):
        words = [word.replace("/data/", "data/") for word in arguments]
        if "--suggest" in words:
            return main_program(words)
        if "--plan" in words:
            return main_program([*words, "--model", "tests.tiny_models:convnet", "--drop_path", "0"])
        mae = "recipes/mae/" in "".join(words)
        reduced = [*REDUCED, "--model", "test_vit"] if mae else REDUCED
        for flag, value in pairwise(words):
            if flag == "--recipe" and not Path(value).exists():
                finished(Path(value).parent)
            if flag in FILE_FLAGS and not Path(value).exists():
                weights = site / ("pretrained" if mae else "trained")
                made = [*reduced, *(PRETRAINING if mae else ()), "--data_path", "data/imagenet"]
                assert main_program([*made, "--output_dir", str(weights)]) == 0
                Path(value).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(weights / "checkpoint-last.pth", value)
        classes = words.index("--num_classes") if "--num_classes" in words else None
        if classes is not None:
            del words[classes : classes + 2]
        more = PRETRAINING if "recipes/mae/vit" in "".join(words) else []
        more = ["--epochs", "3"] if "efficienttrain-linear" in words else more  # it has many stages
        return main_program([*words, *reduced, *more])

    call.finished = finished
    return call


def test_there_are_commands():
    assert len(commands()) > 15
    assert {page for page, _ in commands()} >= {"README.md", "TRAINING.md"}


@pytest.fixture
def bucket(site, monkeypatch, tmp_path):
    """The s3://bucket of the commands: the site's images in a shard for each class."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    for folder in (site / "data/imagenet").glob("*/*"):
        members = [(f"{folder.name}/{path.name}", path.read_bytes()) for path in sorted(folder.iterdir())]
        shard = tmp_path / folder.parent.name / f"{folder.name}.tar"
        shard.parent.mkdir(exist_ok=True)
        shard.write_bytes(pack(members))
    with s3_server(monkeypatch.setenv) as client:
        upload(client, "bucket", tmp_path, "imagenet/")
        yield


@pytest.mark.parametrize("page, command", commands())
def test_command(page, command, run_main, site, tmp_path, request):
    if "s3://" in command:
        request.getfixturevalue("bucket")
    words = shlex.split(command)
    if words[0] == "bash":
        words = words[1:]
    if words[0] in TESTED_ELSEWHERE:
        assert (ROOT / words[0]).is_file()
    elif words[:2] == ["python", "main.py"]:
        if "--real_labels" in words:
            pytest.skip("ReaL labels are known by ImageNet's file names; tests/test_evaluation.py has some")
        assert run_main(words[2:]) == 0
    elif words[0] == "torchrun":
        assert run_main(words[words.index("main.py") + 1 :]) == 0
    elif words[0] in ("scripts/train.sh", "scripts/slurm.sh"):
        assert run_main(launched(tmp_path, words)) == 0
    elif words[:2] == ["python", "scripts/report.py"]:
        run_main.finished(Path(words[2]))
        assert script("report").main(words[2:]) == 0
    elif words[:2] == ["python", "scripts/results.py"]:
        assert run_main(["--data_path", "data/imagenet", "--output_dir", f"{words[2]}/some_run"]) == 0
        assert results.main(words[2:]) == 0
    elif words[:2] == ["python", "scripts/analyze.py"]:
        for word in words[3:]:
            if word.startswith("output/") and word != "output/figures":
                run_main.finished(Path(word))
        reduced = ["--base_size", "32", "--sizes", "16"] if words[2] == "proposition1" else [*OWN]
        assert analyze.main([*words[2:], *reduced, "--images", "12"]) == 0
    elif words[:2] == ["python", "scripts/search.py"]:
        reduced = [*REDUCED, "--epochs", "20"]
        if words[2] == "parity":  # which sets these itself
            reduced = [*without(reduced, "--epochs", "--lr", "--batch_size", "--eval_interval"), "--batches", "4,8"]
        assert search.main([*words[2:], "--predict", *reduced]) == 0
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[:2] == ["python", "-m"] and words[2].startswith("models."):
        assert importlib.util.find_spec(words[2]) is not None
    else:
        raise AssertionError(f"{page}: no way is known to test: {command}")


def test_readme_s_program(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(program, {})
    assert capsys.readouterr().out == "96 0.0 0.0\n"


def without(words, *names):
    """Flags and their values but for these."""
    pairs = zip(words[::2], words[1::2])
    return [word for flag, value in pairs if flag not in names for word in (flag, value)]


def launched(base, words):
    """What a launcher starts: main.py's arguments."""
    cluster = Cluster(base)
    shutil.copytree(ROOT / "recipes", cluster.root / "recipes", dirs_exist_ok=True)
    if words[0] == "scripts/slurm.sh":
        result, (command,) = cluster.call(*words[1:])
        assert result.returncode == 0, result.stderr
        start = command.index("job") + 6  # after root, interpreter, devices, seconds, output folder
        return [*command[start:], "--output_dir", command[start - 1]]
    environment = {"PATH": str(cluster.tools), "VIRTUAL_ENV": str(cluster.active), "CALLS": str(cluster.calls_file)}
    environment["TORCHRUN"] = str(cluster.active / "bin" / "torchrun")
    result = subprocess.run(
        ["bash", str(cluster.root / "scripts/train.sh"), *words[1:]], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    started = json.loads(result.stdout.splitlines()[-1])
    return started[started.index(str(cluster.root / "main.py")) + 1 :]
