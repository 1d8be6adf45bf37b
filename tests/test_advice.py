"""Warnings about settings that are rarely meant, and about a run whose first evaluation was its best."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, flags
from test_report import Page

from config import Config
from config.command_line import parse_config, rescaled
from curriculum import build_plan
from training import session as session_module
from training.advice import advice, first_was_best
from training.report import write_report


def planned(curriculum="efficienttrain++", **settings):
    config = Config(curriculum=curriculum, **settings)
    plan = build_plan(curriculum, epochs=config.epochs, num_images=1000, batch_size=10, warmup=config.warmup_epochs)
    return advice(config, plan), plan


@pytest.mark.parametrize("decay, warned", [(0.9999, True), (0.999, True), (0.99, False)])
def test_an_average_that_is_too_slow(decay, warned):
    """10 epochs of 100 steps under the epoch clock; the oracle averages a weight that jumps from 0 to 1 at once."""
    lines, plan = planned("none", epochs=10, model_ema=True, model_ema_decay=decay)
    average = 0.0
    for _ in range(plan.total_steps):
        average = decay * average + (1 - decay)
    assert plan.total_steps == 1000 and bool(lines) == warned == (1 - average > 0.01)
    if warned:
        (line,) = lines
        assert f"averages over {round(1 / (1 - decay)):,} steps, and this run has 1,000" in line and "0.99 fits" in line
        assert f"{100 * (1 - average):.0f} % of the average will be the initial weights" in line
    assert planned("none", epochs=10, model_ema_decay=decay)[0] == []  # no average is kept


@pytest.mark.parametrize("warmup, share", [("5%", None), ("20%", None), ("22%", 22), (5, 50)])
def test_warm_up_beyond_the_first_stage(warmup, share):
    """EfficientTrain++'s first stage ends at 20 % of the run."""
    lines, _ = planned(epochs=10, warmup_epochs=warmup)
    assert len(lines) == (share is not None)
    for line in lines:
        assert f"--warmup_epochs {warmup} ends at {share} % of the run" in line
        assert "its first stage (input size 96) at 20 %" in line
    assert planned("none", epochs=10, warmup_epochs=warmup)[0] == []  # one stage


def test_warm_up_under_a_curriculum_of_many_stages():
    """The first of which is short: the papers' warm-up of 7 % is none to warn of."""
    assert planned("efficienttrain-linear", epochs=10, warmup_epochs="7%")[0] == []
    assert len(planned("efficienttrain-linear", epochs=10, warmup_epochs="22%")[0]) == 1


def test_batch_without_its_learning_rate(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 1024\nlr: 1.0e-3\n")
    (line,) = rescaled(["--recipe", str(recipe), "--batch_size", "256"])
    for words in ("--lr 0.001 is the recipe's for batches of 1024", "--batch_size is 256", "0.00025 (li", "0.0005 (sq"):
        assert words in line, line
    (line,) = rescaled(["--batch_size=512"])
    assert "--lr 0.004 is the default's for batches of 4096" in line and "0.0005 (linear)" in line
    for argv in (["--batch_size", "256", "--lr", "1e-3"], ["--lr", "1"], ["--batch_size", "1024"], []):
        assert rescaled(["--recipe", str(recipe), *argv]) == [], argv


def test_they_are_said_before_the_run_and_by_the_plan(main_program, folder, tmp_path, capsys):
    settings = {"model_ema": True, "warmup_epochs": "30%", "lr": None, "output_dir": tmp_path / "run"}
    assert main_program(flags(data_path=folder, **settings, stop_after="1 steps")) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["--lr", "--model_ema_decay", "--warmup_epochs"]
    assert main_program(flags(**settings, num_images=48, plan="json")) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) and printed.err.splitlines() == warnings


@pytest.mark.extended
def test_no_recipe_is_warned_of():
    """Of those whose plan can be made from the papers' numbers of images alone."""
    images, seen = {"in1k": 1281167, "finetune": 1281167, "in22k": 13153500, "mae": 1281167}, 0
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        if path.parent.name in images and not path.name.startswith("_"):
            config = parse_config(["--recipe", str(path)])
            plan = build_plan(
                config.curriculum,
                epochs=config.epochs,
                num_images=images[path.parent.name],
                batch_size=config.batch_size,
                base_size=config.input_size,
                warmup=config.warmup_epochs,
            )
            assert advice(config, plan) == [], path
            seen += 1
    assert seen > 100


def scored(*scores, size=64, **more):
    return [{"step": 10 * k, "eval_size": size, "test_acc1": score, **more} for k, score in enumerate(scores, 1)]


def test_a_first_evaluation_that_was_the_best():
    line = first_was_best(scored(50, 40, 50), "test_acc1", 64)
    assert "the first evaluation at 64 pixels, after step 10, is the best of 3" in line
    assert first_was_best(scored(50, 40, 51), "test_acc1", 64) is None
    assert first_was_best(scored(50, 40), "test_acc1", 64) is None  # too few to say
    assert first_was_best([*scored(60, 60, 60, size=48), *scored(50, 51, 52)], "test_acc1", 64) is None
    assert first_was_best(scored(50, 40, 30, test_acc1_ema=45), "test_acc1", 64) is not None
    rising = [{**line, "test_acc1_ema": 50 + line["step"]} for line in scored(50, 40, 30)]
    assert first_was_best(rising, "test_acc1", 64) is None


def test_the_end_and_the_report_say_so(train, monkeypatch, capsys):
    monkeypatch.setattr(session_module, "read_log", lambda path: scored(50, 40, 30))
    run = train(epochs=1)
    assert "warning: the first evaluation at 64 pixels, after step 10, is the best of 3" in capsys.readouterr().out
    assert "The first evaluation" not in Page(run.output / "report.html").text
    last = run.log()[-1]
    falling = [json.dumps({**last, "test_acc1": score}) + "\n" for score in (50, 40, 30)]
    Path(run.output / "log.txt").write_text("".join(falling))
    assert "The first evaluation at 64 pixels" in Page(write_report(run.output)).text
