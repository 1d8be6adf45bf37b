"""--patience and --stop_if: when they end a run, what is left behind, and what the same command does then."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import Run, same, script
from test_report import Page

from config import Config, UsageError
from config.checks import Rule, check_settings, parse_stop_if
from curriculum import build_plan
from training.early_stop import NOTE, EarlyStop, check_stop_if, leave_note, stays_ended
from training.tasks import Classification

PLAN = build_plan("efficienttrain++", epochs=20, num_images=48, batch_size=8, base_size=64)
TASK = Classification(0.1)


def judge(scores, standing=None, **settings):
    """The steps after which a run would end that scores ``scores``, one after each pass."""
    early = EarlyStop(Config(**settings), PLAN, TASK, standing or {})
    found = []
    for record, score in zip(PLAN, scores):
        step = record.first_step + record.steps
        line = {"step": step, "train_loss": 1.0, **({} if score is None else {"test_acc1": score})}
        if early.judge(record, line):
            found.append(step)
    return found, early


def ends(stage):
    return [record.first_step + record.steps for record in PLAN if record.stage == stage]


def test_patience_waits_for_its_duration():
    rising = range(1, len(PLAN) + 1)
    assert judge(rising, patience="6 steps")[0] == []
    first = ends(0)
    assert judge([9.0, 8.0, 8.0, 8.0], patience="12 steps")[0] == [step for step in first[:4] if step - first[0] >= 12]
    assert judge([9.0, 9.0], patience=0)[0] == [first[1]]  # as good is not better
    assert judge([9.0, None, None, 8.0], patience=0)[0] == [first[3]]  # passes without an evaluation do not count
    assert judge([9.0, 8.0, 8.0, 8.0])[0] == []


def test_patience_begins_anew_with_each_stage():
    """Other sizes: an accuracy that falls at the switch, or stood still before it, says nothing of the new stage."""
    scores = [50.0 if record.stage == 0 else 10.0 + record.index if record.stage == 1 else 5.0 for record in PLAN]
    found, _ = judge(scores, patience="10%")
    assert found and all(ends(0)[0] < step <= ends(0)[-1] or step > ends(2)[0] for step in found)
    long_ones = judge(scores, patience="35%")[0]  # longer than the first stage, which takes 20 %
    assert long_ones and all(step > ends(2)[0] for step in long_ones)


def test_patience_counts_the_average_and_no_nan():
    early = EarlyStop(Config(patience=0), PLAN, TASK, {})
    lines = [{"test_acc1": 5.0}, {"test_acc1": 4.0, "test_acc1_ema": 6.0}, {"test_acc1": float("nan")}]
    answers = [early.judge(PLAN.records[0], {"step": step, **line}) for step, line in enumerate(lines, 1)]
    assert [bool(answer) for answer in answers] == [False, False, True]
    assert "--patience 0: no evaluation of stage 1 was better than that after step 2 (test_acc1 6.00)" in answers[2]


def test_patience_survives_a_restart():
    scores = [9.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    found, early = judge(scores, patience="12 steps")
    again, _ = judge([None, None, *scores[2:]], standing=early.standing, patience="12 steps")
    assert found and again == [step for step in found if step > ends(0)[1]]
    assert judge([None, None, *scores[2:]], patience="12 steps")[0] != again  # negative control


def test_rules():
    assert parse_stop_if("test_acc1 < 5 after 10%") == Rule("test_acc1", "<", 5.0, "10%")
    assert parse_stop_if("train_loss>=1e3 after 20 passes") == Rule("train_loss", ">=", 1000.0, "20 passes")
    half = PLAN.first_after("50%")
    low = [5.0] * len(PLAN)
    assert judge(low, stop_if="test_acc1 < 5 after 50%")[0] == []
    assert judge(low, stop_if="test_acc1 <= 5 after 50%")[0] == [s for k in range(3) for s in ends(k) if s >= half]
    assert judge([None] * len(PLAN), stop_if="test_acc1 <= 5 after 0%")[0] == []
    assert judge(low, stop_if="train_loss > 0.5 after 0%")[0] == [step for k in range(3) for step in ends(k)]


@pytest.mark.parametrize(
    "text",
    ["test_acc1 < 5", "test_acc1 = 5 after 10%", "< 5 after 10%", "test_acc1 < x after 10%", "a.b < 5 after 10%", ""]
    + ["test_acc1 < 5 after never", "__import__('os') < 5 after 1", "test_acc1 < 5 after 10% or so", "1 < 2 < 3"],
)
def test_rules_that_are_none(text):
    with pytest.raises(UsageError, match=r"--stop_if .* is not understood; write .test_acc1 < 5 after 10%") as caught:
        check_settings(Config(stop_if=text))
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_work():
    with pytest.raises(UsageError, match="'tomorrow' is not understood"):
        check_settings(Config(patience="tomorrow"))
    mae = {"task": "mae", "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "magnitude": "none"}
    with pytest.raises(UsageError, match="--patience 5% needs an accuracy, and --task mae has none; use --stop_if"):
        check_settings(Config(patience="5%", **mae))
    check_stop_if(Config(stop_if="test_acc5 < 1 after 1"), TASK)
    for name, hint in (("test_acc_1", "did you mean test_acc1"), ("x", "it has train_loss"), ("test_acc1_ema", "")):
        with pytest.raises(UsageError, match=f"the log has no number {name}; {hint}"):
            check_stop_if(Config(stop_if=f"{name} < 1 after 1"), TASK)
    check_stop_if(Config(stop_if="test_acc1_ema < 1 after 1", model_ema=True), TASK)


def test_a_run_that_ends_early(train, main_program, folder, tmp_path, capsys):
    whole = train("whole").result()
    capsys.readouterr()
    rule = {"stop_if": "test_acc1 < 101 after 30%"}
    run = train("run", **rule)  # ends with 0
    out = capsys.readouterr().out
    step, last = run.state()["step"], run.log()[-1]
    said = f"--stop_if 'test_acc1 < 101 after 30%': test_acc1 is {last['test_acc1']:.4g}"
    total = whole["log"][-1]["step"]
    assert f"ended early, after step {step} of {total}, and saved: {said}" in out and "done in" not in out
    assert last["step"] == step and 0.3 <= last["progress"] < 1
    assert json.loads((run.output / NOTE).read_text())["step"] == step
    assert "ended early" in Page(run.output / "report.html").text

    results = script("results")
    assert results.main([str(run.output)]) == 1
    assert f"skipped {run.output}: it ended early after step {step}, {said}" in capsys.readouterr().err

    files = {path: path.stat().st_mtime_ns for path in run.output.iterdir() if path.name != "run.lock"}
    train("run", **rule)  # launched again
    out = capsys.readouterr().out
    assert f"this run ended early after step {step}, {said}; to train on, leave that setting out or change it" in out
    assert files == {path: path.stat().st_mtime_ns for path in run.output.iterdir() if path.name != "run.lock"}

    train("run")  # without the rule it is the run that it would have been
    out = capsys.readouterr().out
    assert "it trains on under other rules" in out and "done in" in out
    assert same(Run(run.output).result(), whole) and not (run.output / NOTE).exists()
    assert isinstance(results.read_run(run.output), results.Run)


def test_patience_ends_a_run_that_stands_still(train, capsys):
    still = {"model": "tests.tiny_models:plain", "lr": 1e-12, "min_lr": 1e-13, "weight_decay": 0, "curriculum": "none"}
    run = train(epochs=5, eval_interval="1 steps", patience="12 steps", **still)
    assert run.state()["step"] == 18 and run.state()["standing"]["step"] == 6  # passes of 6 steps
    assert "--patience 12 steps: no evaluation of stage 1 was better than that after step 6" in capsys.readouterr().out


def test_notes(tmp_path, capsys):
    config = Config(output_dir=str(tmp_path), patience="5%")
    assert not stays_ended(config, tmp_path, 8, True)
    leave_note(config, 8, "because")
    assert stays_ended(config, tmp_path, 8, True)
    assert not stays_ended(replace(config, patience="6%"), tmp_path, 8, True)
    out = capsys.readouterr().out
    assert out.count("this run ended early after step 8, because; ") == 2 and out.count("to train on, leave") == 1
    assert not stays_ended(config, tmp_path, 9, True)  # of a checkpoint that it does not know
    for content in ("{", '{"step": "8", "why": "x"}', '{"step": 8}', "[]", "\0"):
        (tmp_path / NOTE).write_text(content)
        assert not stays_ended(config, tmp_path, 8, True)
    assert capsys.readouterr().out == ""


def test_the_last_pass_is_not_stopped(train):
    """Then the plan is done."""
    run = train(epochs=1, curriculum="none", stop_if="train_loss > 0 after 0%", eval_interval="100%")
    assert run.log()[-1]["progress"] == 1 and not (run.output / NOTE).exists()
    assert SimpleNamespace(**run.state()["best"]).step == 6
