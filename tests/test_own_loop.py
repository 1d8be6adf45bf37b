"""The curriculum package alone: its wheel where nothing else is, and docs/own_loop.md's programs run from it."""

import json
import re
import runpy
import subprocess
import sys
import sysconfig
from functools import partial
from importlib import metadata
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
import torch
from conftest import ROOT

from curriculum import LiveCurriculum, build_plan
from models import create_model

PAGE = (ROOT / "docs" / "own_loop.md").read_text()
PROGRAMS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S))
SITE = sysconfig.get_path("purelib")

# Runs programs where only the standard library, the package and what it declares can be imported.
ISOLATED = """
import json, runpy, sys
package, dependencies, *programs = sys.argv[1:]
sys.path += [package, dependencies]
import curriculum
assert curriculum.__file__.startswith(package), curriculum.__file__
assert not any(name.startswith("curriculum.integrations") for name in sys.modules)
for name in ("main", "config", "inputs", "models", "jsonargparse", "simplejpeg"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} can be imported, so nothing was shown")
for program in programs:
    if live := runpy.run_path(program).get("live"):
        print(json.dumps([curriculum.__version__, live.seen, live.saved]))
"""


def requirements(names):
    """The distributions that some need, and what these need in turn."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        if name not in found:
            found.add(name)
            waiting += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Where pip installed the wheel, and a folder of links to what it declares as its dependencies, and no more."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    copytree(ROOT / "curriculum", source / "curriculum", ignore=ignore_patterns("__pycache__"))
    (source / "docs").mkdir()
    for name in ("pyproject.toml", "LICENSE", "docs/own_loop.md"):
        copy(ROOT / name, source / name)
    (source / "main.py").write_text("raise AssertionError('main.py is no part of the package')\n")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} == {"curriculum"}
    (about,) = metadata.distributions(name="efficienttrain-curriculum", path=[str(target)])
    needs = [re.match(r"\w+", need)[0] for need in about.requires if "extra ==" not in need]
    assert sorted(needs) == ["numpy", "timm", "torch", "torchvision"]
    dependencies = tmp_path_factory.mktemp("dependencies")
    for name in requirements(needs):
        for top in {file.parts[0] for file in metadata.files(name)} - {"..", "__pycache__"}:
            if not (dependencies / top).exists():
                (dependencies / top).symlink_to(Path(SITE) / top)
    assert (dependencies / "PIL").exists() and not (dependencies / "simplejpeg").exists()
    return target, dependencies


def test_programs_run_from_the_wheel_alone(package, tmp_path):
    programs = [tmp_path / f"{name}.py" for name in ("plain", "loader", "resume", "small", "sampler", "augment")]
    for path in programs:
        path.write_text(PROGRAMS[path.name])
    command = [sys.executable, "-I", "-S", "-c", ISOLATED, *map(str, (*package, *programs))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    results, (sizes, shares) = [r for r in results if len(r) == 3][:3], results[-2:]
    assert len(results) == 3
    for version, seen, saved in results:
        assert version == "0.1.0"
        assert two_stages(seen) and saved > 0.3
    assert sizes == [12, 24, 32]  # as the page says
    assert sum(shares) == 3 * 96 - 3 * 12 and set(shares) == {6}


def two_stages(seen):
    """Whether small images came before large ones of the base size, 64."""
    return len(seen) >= 2 and "64" in map(str, seen) and min(map(int, seen)) < 64


@pytest.mark.extended
@pytest.mark.parametrize("name, library", [("lightning_run.py", "lightning"), ("transformers_run.py", "transformers")])
def test_adapters_run_in_their_libraries(package, name, library, tmp_path):
    pytest.importorskip(library)
    (tmp_path / "output").mkdir()
    program = PROGRAMS[name] + "\nimport json\nprint(json.dumps([live.seen, live.saved, plan.total_steps]))\n"
    (tmp_path / name).write_text(program)
    environment = {"PYTHONPATH": str(package[0]), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, saved, steps = json.loads(done.stdout.splitlines()[-1])
    assert two_stages(seen) and saved > 0.3
    assert sum(seen.values()) == 8 * steps
    broken = program.replace("max_steps=plan.total_steps", "max_steps=7")
    (tmp_path / "again" / "output").mkdir(parents=True)
    (tmp_path / "again" / name).write_text(broken)
    done = subprocess.run(
        [sys.executable, name], cwd=tmp_path / "again", env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and f"the plan has {steps} optimizer steps" in done.stderr


def test_adapters_are_short():
    for path in (ROOT / "curriculum" / "integrations").glob("*.py"):
        assert len(path.read_text().splitlines()) < 110, path.name


def test_adapters_name_what_is_missing(monkeypatch):
    adapters = (("lightning", "lightning"), ("transformers", "transformers accelerate"), ("accelerate", "accelerate"))
    for name, library in adapters:
        for missing in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers", "accelerate"):
            monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(sys.modules, f"curriculum.integrations.{name}", raising=False)
        with pytest.raises(ImportError, match=f"pip install {library}$"):
            __import__(f"curriculum.integrations.{name}")


# -- timm's train.py -------------------------------------------------------------------------------------------------


def patched(text):
    """The script with the page's lines inserted: each hunk after the first line that is its context."""
    (patch,) = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    for hunk in patch.split("@@")[1:]:
        lines = hunk.splitlines()[1:]
        (context,) = [line[1:] for line in lines if line.startswith(" ")]
        added = [line[1:] for line in lines if line.startswith("+")]
        before, after = text.split(f"\n{context}\n", 1)
        text = "\n".join([before, context, *added, after])
    return text


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_timm_loop_with_the_patch(model, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", str(folder), "--model", model])
    results = []
    for name, change in (("patched.py", patched), ("unpatched.py", str)):
        (tmp_path / name).write_text(change((ROOT / "tests" / "timm_loop.py").read_text()))
        runpy.run_path(str(tmp_path / name), run_name="__main__")
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    with_patch, without = results
    plan = build_plan(epochs=2, num_images=6, batch_size=1, base_size=64, lr=0.01)
    steps = range(plan.total_steps)
    assert [size for size, *_ in with_patch][: len(steps)] == [plan.locate(step)[0].input_size for step in steps]
    assert [lr for *_, lr in with_patch][: len(steps)] == pytest.approx([plan.lr_at(step) for step in steps])
    assert {size for size, *_ in with_patch[plan.total_steps :]} <= {64}  # the rest of the last pass
    assert {size for size, *_ in without} == {64} and len(without) == 12  # a patch that does nothing would show


# -- LiveCurriculum --------------------------------------------------------------------------------------------------

PLAN = build_plan(epochs=2, num_images=96, batch_size=8, base_size=64)


def test_batches_are_reduced_by_the_plans_operator():
    from curriculum import downsample

    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 3))
    live, images = LiveCurriculum(PLAN, model), torch.rand(2, 3, 64, 64)
    before = model(images)
    assert live.seen == {} and live.saved == 0
    live.start_step(0)
    assert torch.equal(model(input=images), model(downsample(images, 32, "lanczos")))
    assert not torch.equal(model(images), before)
    model.eval()
    model(images)
    assert live.seen == {32: 6}  # evaluation does not count
    live.close()
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("shape", [(2, 3, 64, 48), (2, 3, 24, 24), (2, 10)])
def test_images_that_do_not_fit_are_refused(shape):
    live = LiveCurriculum(PLAN, create_model("tests.tiny_models:convnet", 3, 64))
    live.start_step(0)
    with pytest.raises(ValueError, match=r"24x24|64x48|without images"):
        live.model(torch.rand(shape))


def test_optimizer_and_average_follow():
    from timm.utils import ModelEmaV3

    model = create_model("test_vit", 3, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    ema = ModelEmaV3(model)
    live = LiveCurriculum(PLAN, model, optimizer, ema)
    for step in (0, PLAN.total_steps - 1, PLAN.total_steps + 5):
        live.start_step(step)
        model(torch.rand(2, 3, 64, 64)).sum().backward()
        optimizer.step()
        ema.update(model)
        shape = model.pos_embed.shape
        assert ema.module.pos_embed.shape == optimizer.state[model.pos_embed]["exp_avg"].shape == shape
    assert live.seen == {32: 2, 64: 4} and live.input_size == 64


def test_a_low_pass_stage_is_filtered():
    from curriculum import low_pass

    stages = [{"until": 0.5, "input_size": 64, "radius": 8}, {"until": 1, "input_size": 64}]
    plan = build_plan(
        {"clock": "epochs", "base_size": 64, "stages": stages}, epochs=2, num_images=96, batch_size=8, base_size=64
    )
    model, images = torch.nn.Flatten(), torch.rand(2, 3, 64, 64)
    live = LiveCurriculum(plan, model)
    live.start_step(0)
    assert torch.equal(model(images), low_pass(images, 8).flatten(1))
    live.start_step(plan.total_steps - 1)
    assert torch.equal(model(images), images.flatten(1))


def test_a_copy_of_the_model_is_left_alone():
    import copy

    live = LiveCurriculum(PLAN, create_model("tests.tiny_models:convnet", 3, 64))
    live.start_step(0)
    twin = copy.deepcopy(live.model)
    twin(torch.rand(2, 3, 64, 48))
    assert live.seen == {}


def test_wrapped_models_whose_parameters_change_are_refused():
    with pytest.raises(ValueError, match=r"VisionTransformer is wrapped.* at input size 32"):
        LiveCurriculum(PLAN, torch.nn.DataParallel(create_model("test_vit", 3, 64)))
    with pytest.raises(ValueError, match=r"is wrapped.*as wrap="):
        LiveCurriculum(PLAN, create_model("test_vit", 3, 64), is_wrapped=True)
    inner = create_model("test_resnet", 3, 64)
    assert LiveCurriculum(PLAN, torch.nn.DataParallel(inner)).model is inner


def test_a_size_that_the_model_cannot_take_is_named_at_once():
    with pytest.raises(ValueError, match="input size 48"):
        LiveCurriculum(PLAN, create_model("tests.sized_models:picky", 3, 64))


def compiled_before(model, compile):
    model = compile(model)
    return model, LiveCurriculum(PLAN, model)


def compiled_after(model, compile):
    live = LiveCurriculum(PLAN, model)
    return compile(model), live


def compiled_in_place(model, compile):
    model.compile(backend=compile.keywords["backend"], dynamic=False)
    return model, LiveCurriculum(PLAN, model)


def count_graphs(way, name="test_resnet"):
    """(graphs that were compiled, the curriculum) of six training steps, two at each of three sizes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    called, live = way(create_model(name, 3, 64), partial(torch.compile, backend=backend, dynamic=False))
    for stage in PLAN.stages:
        for step in (stage.first_step, stage.first_step + 1):
            live.start_step(step)
            called(torch.rand(2, 3, 64, 64)).sum().backward()
    assert live.seen == {32: 4, 48: 4, 64: 4}
    return len(graphs), live


@pytest.mark.parametrize("way", [compiled_before, compiled_after, compiled_in_place])
def test_a_compiled_model_has_as_many_graphs_as_sizes(way):
    assert count_graphs(way)[0] == 3


def test_compiled_a_hook_inside_the_graph_is_noticed(monkeypatch):
    """The negative control: what counts images is traced, and each count makes a graph."""
    from curriculum import live

    monkeypatch.setattr(live._Hook, "__call__", lambda hook, *args: hook.live and hook.live.reduce(*args))
    assert count_graphs(compiled_after)[0] > 3


def test_a_compiled_transformer_is_reduced_and_resized():
    graphs, live = count_graphs(compiled_after, "test_vit")
    assert graphs == 3 and live.input_size == 64
