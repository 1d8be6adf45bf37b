"""Settings by their kinds: what differs on a resume is named, refused unless allowed, kept, and shown; a change of the
plan maps progress."""

import json
import shutil
from dataclasses import asdict, dataclass, replace

import pytest
import yaml
from conftest import ROOT, Run, flags, same, script
from test_faults_identity import SETTINGS, begun, copied  # noqa: F401 (fixtures)

from config import Config, UsageError
from config.checks import check_settings, parse_parts
from config.kinds import Learned, kinds, named
from curriculum import build_plan
from models import checkpoints
from studies import trials
from training.identity import IN_IDENTITY, differences
from training.resume import History, adopt, trained

results = script("results")


# -- kinds -------------------------------------------------------------------------------------------------------------


def test_every_setting_has_a_kind():
    known = {"free", "learned", "curriculum", "optimizer", "model"}
    assert {name for name, kind in kinds(Config).items() if kind not in known} == set()
    assert set(kinds(Config)) == set(Config.__dataclass_fields__)


def test_a_setting_without_a_kind_is_found():
    @dataclass
    class Sloppy:
        lr: Learned[float] = 1.0
        forgotten: float = 1.0

    assert kinds(Sloppy) == {"lr": "learned", "forgotten": None}


def test_circumstances_follow_from_the_kinds():
    free = set(named(Config, "free"))
    assert set(results.CIRCUMSTANCES) == (free | {"seed"}) - set(results.OF_DATA) and set(results.OF_DATA) < free
    assert set(trials.CIRCUMSTANCES) < free and "data_path" not in trials.CIRCUMSTANCES
    assert set(trials.OF_LATER) < set(results.OF_DATA)
    for name in ("lr", "mixup", "batch_size", "val_split", "resume", *results.OF_DATA):
        assert name not in trials.CIRCUMSTANCES
    for name in ("num_workers", "output_dir", "timeout"):
        assert name in trials.CIRCUMSTANCES and name in results.CIRCUMSTANCES


def another(value):
    """A value that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"crop": 1} if isinstance(value, dict) else [2, 3] if isinstance(value, tuple) else f"{value}x"


COMPARED = [name for name in named(Config, "learned", "model") if name not in IN_IDENTITY]


@pytest.mark.parametrize("name", COMPARED)
def test_every_setting_that_changes_the_result_is_compared(name):
    config = Config(micro_batch=4, forward_batch={64: 4})
    saved = {"identity": None, "config": json.loads(json.dumps(asdict(config)))}
    assert differences({**saved, "identity": {}}, config, {}) == []
    value = another(getattr(config, name))
    (difference,) = differences({**saved, "identity": {}}, replace(config, **{name: value}), {})
    assert difference.text.startswith(f"{name} was ") and not difference.replans
    assert difference.names[0] == ("model" if kinds(Config)[name] == "model" else name)


@pytest.mark.parametrize("name", named(Config, "free"))
def test_no_circumstance_is(name):
    config = Config()
    saved = {"identity": {}, "config": json.loads(json.dumps(asdict(config)))}
    assert differences(saved, replace(config, **{name: another(getattr(config, name))}), {}) == []


def test_a_setting_that_the_checkpoint_does_not_know_is_no_difference():
    saved = {"identity": {}, "config": json.loads(json.dumps(asdict(Config())))}
    del saved["config"]["lr"]
    assert differences(saved, Config(lr=1.0), {}) == []


def test_groups_that_are_not_stated_are_the_runs():
    saved = {"identity": {}, "config": json.loads(json.dumps(asdict(Config(micro_batch=4, forward_batch={64: 8}))))}
    assert differences(saved, Config(), {}) == differences(saved, Config(micro_batch="auto"), {}) == []
    (difference,) = differences(saved, Config(micro_batch=2), {})
    assert difference.text == "micro_batch was 4 and is 2"


@pytest.mark.parametrize(
    "names, message",
    [
        ("curiculum", "did you mean curriculum"),
        ("num_workers", "num_workers may differ without it"),
        ("model_args", "no such part of a run"),
        ("lr,mixupp", "did you mean mixup"),
    ],
)
def test_what_allow_change_cannot_name(names, message):
    with pytest.raises(UsageError, match=message):
        check_settings(Config(allow_change=names))


def test_the_names_of_before_still_hold():
    old = "model,data,curriculum,batch_size,seed,optimizer"
    assert parse_parts(old) == old.split(",")
    assert parse_parts("epochs, lr") == ["epochs", "lr"]


# -- through main.py ---------------------------------------------------------------------------------------------------

CHANGES = {
    "lr": {"lr": 5e-4},
    "mixup": {"mixup": 0.4},
    "smoothing": {"smoothing": 0.2},
    "weight_decay": {"weight_decay": 0.1},
    "amp": {"amp": "bf16"},
    "clip_grad": {"clip_grad": 1.0},
    "crop_scale": {"crop_scale": "[0.5,1.0]"},
    "pipeline": {"pipeline": "fast"},
    "warmup_epochs": {"warmup_epochs": "10%"},
    "micro_batch": {"micro_batch": 2},
    "model_ema": {"model_ema": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_by_name(main_program, begun, capsys, name):  # noqa: F811
    settings = {"output_dir": begun / "run", "data_path": begun / "data", **SETTINGS, **CHANGES[name]}
    assert main_program(flags(**settings)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is of another run: {name} was " in line and line.endswith(f"--allow_change {name}")


def test_other_validation_images_are_refused(main_program, copied, capsys):  # noqa: F811
    (copied / "data" / "val" / "class_0" / "03.jpg").unlink()
    argv = flags(output_dir=copied / "run", data_path=copied / "data", **SETTINGS)
    assert main_program(argv) == 2
    line = capsys.readouterr().err
    assert "validation images was 15 and is 14" in line and "--allow_change data" in line
    assert main_program([*argv, "--allow_change", "data"]) == 0


def test_circumstances_are_noted(main_program, copied, capsys):  # noqa: F811
    settings = {"output_dir": copied / "run", "data_path": copied / "data", **SETTINGS, "timeout": 7}
    assert main_program(flags(**settings)) == 0
    assert "settings that differ from the checkpoint's: " in (said := capsys.readouterr().out)
    assert "timeout was 30.0 and is 7.0" in said and not Run(copied / "run").state()["changes"]


def test_an_allowed_change_is_kept_and_shown(main_program, copied, capsys):  # noqa: F811
    settings = {"output_dir": copied / "run", "data_path": copied / "data", **SETTINGS, "lr": 5e-4, "mixup": 0.4}
    assert main_program(flags(**settings, allow_change="lr,mixup")) == 0
    run = Run(copied / "run")
    (change,) = run.state()["changes"]
    assert change["step"] == 8 and change["what"] == ["lr was 0.001 and is 0.0005", "mixup was 0.8 and is 0.4"]
    share = 100 * plan_of(8, 2, images=48).progress(8)
    line = f"step 8 ({share:.1f} %): lr was 0.001 and is 0.0005; mixup was 0.8 and is 0.4"
    text = (run.output / "config.yaml").read_text()
    assert f"# changed at {line}\n" in text and yaml.safe_load(text)["lr"] == 5e-4
    assert "lr was 0.001 and is 0.0005" in (run.output / "report.html").read_text()
    capsys.readouterr()
    assert results.main([str(run.output)]) == 0
    assert f"- {run.output}: {line}" in capsys.readouterr().out
    # What was allowed once is the run's from then on; and back again is a change too.
    assert main_program(flags(**settings)) == 0
    assert main_program(flags(**{**settings, "lr": 1e-3})) == 2


def test_more_decay_than_none_takes_effect(main_program, folder, tmp_path):
    """Optimizers keep each group's decay in their state, and 0 stands for none."""
    settings = {**SETTINGS, "output_dir": tmp_path / "run", "data_path": folder, "stop_after": "8 steps"}
    assert main_program(flags(**settings, weight_decay=0)) == 0
    settings |= {"stop_after": None, "weight_decay": 0.3}
    assert main_program(flags(**settings, allow_change="weight_decay")) == 0
    groups = Run(tmp_path / "run").state()["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0, 0.3]


# -- a plan that changes -----------------------------------------------------------------------------------------------


def state_at(plan, step, unfinished, **more):
    history = History(more.pop("changes", []))
    return {
        "step": step,
        "epoch": unfinished,
        "progress": plan.progress(step),
        "logged": history.logged(plan, unfinished),
        "changes": history.changes,
        "trained": trained(plan, step),
        "identity": {"curriculum": {"epochs": plan.epochs, "clock": plan.curriculum.clock}},
        "meters": {"loss": [3.0, 2.0], "gradient": [6.0, 4.0], "skipped": [0] * 4, "seconds": 1.0},
        **more,
    }


class Changed:
    replans, text = True, "batch_size was 8 and is 16"


def plan_of(batch, epochs=4, curriculum="efficienttrain++", images=480):
    return build_plan(curriculum, epochs=epochs, num_images=images, batch_size=batch, base_size=64)


@pytest.mark.parametrize("new", [(16, 4), (4, 4), (8, 8), (8, 2), (8, 4, "none"), (16, 3, "efficienttrain")])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.545, 0.9, 0.98])
def test_it_resumes_at_the_same_share_of_the_new_plan(new, share):
    old, plan = plan_of(8), plan_of(*new)
    step = int(share * old.total_steps)
    state = adopt(state_at(old, step, old.locate(step)[0].index), plan, [Changed()], "it")
    # The oracle: the first step of the new plan that is not before this share of its clock.
    want = next(s for s in range(plan.total_steps) if plan.progress(s) >= old.progress(step) - 1e-9)
    assert state["step"] == want and plan.locate(want)[0].index == state["epoch"]
    assert plan.progress(want) - old.progress(step) < 1.5 * max(
        (stage.stop - stage.start) / stage.steps for stage in plan.stages
    )
    anew = {"loss": [0.0, 0.0], "gradient": [0.0, 0.0]}
    assert state["meters"] == {**anew, "skipped": [0] * 4, "seconds": 1.0} and state["standing"] == {}


def test_a_plan_that_begins_in_the_same_way_resumes_at_the_very_step():
    """As searches do: stages are rounded to steps, so that the same share would be a few steps off."""
    stages = [{"until": 0.3, "input_size": 32}, {"until": 1, "input_size": 64}]
    for middle in (48, 40, 56):
        other = [stages[0], {"until": 0.7, "input_size": middle}, stages[1]]
        old, plan = (
            plan_of(8, 3, {"name": "x", "clock": "compute", "base_size": 64, "stages": s}, 100) for s in (stages, other)
        )
        step = old.stages[1].first_step
        state = adopt(state_at(old, step, old.locate(step)[0].index), plan, [Changed()], "it")
        assert state["step"] == step == plan.stages[1].first_step


def test_the_learning_rate_is_that_of_the_place():
    old, plan = plan_of(8), plan_of(8, epochs=8)
    state = adopt(state_at(old, 200, old.locate(200)[0].index), plan, [Changed()], "it")
    assert plan.lr_at(state["step"]) == pytest.approx(old.lr_at(200), rel=0.01)  # a function of the share alone


def test_nothing_left_is_refused():
    old, plan = plan_of(8), plan_of(8, epochs=8)
    with pytest.raises(UsageError, match=r"at 100.0 % of its plan, and nothing is left of the new one: .*--finetune"):
        adopt(state_at(old, old.total_steps, len(old)), plan, [Changed()], "it")


def test_a_checkpoint_that_does_not_know_its_progress_is_not_guessed_at():
    plan = plan_of(8)
    state = state_at(plan, 20, 0)
    del state["progress"], state["logged"], state["changes"]
    assert adopt(dict(state), plan, [], "it")["step"] == 20
    with pytest.raises(ValueError, match="earlier version"):
        adopt(state, plan, [Changed()], "it")


@pytest.mark.parametrize("batch", [16, 4])
def test_another_batch_size_trains_the_rest_of_the_plan(main_program, begun, tmp_path, capsys, batch):  # noqa: F811
    """And its log shows each share of the clock once."""
    shutil.copytree(begun, tmp_path / "copy")
    settings = {**SETTINGS, "output_dir": tmp_path / "copy" / "run", "data_path": begun / "data", "batch_size": batch}
    argv = flags(**settings, allow_change="batch_size")
    before = checkpoints.load(tmp_path / "copy" / "run" / "checkpoint-8.pth")
    assert main_program([*argv, "--stop_after", f"{100 * before['progress'] + 15}%"]) == 0
    said = capsys.readouterr().out
    percent = float(said.split("resuming at ")[1].split()[0])
    assert 0 <= percent - 100 * before["progress"] < 100 * batch / (22 * 8) * 4 and " % of the new plan, step " in said
    # Though its step may be a smaller number, the newer plan's checkpoint is the newest one.
    assert len(checkpoints.newest(tmp_path / "copy" / "run")[1]["changes"]) == 1
    assert main_program(argv) == 0
    assert "of the new plan" not in capsys.readouterr().out
    run = Run(tmp_path / "copy" / "run")
    log, plan = run.log(), plan_of(batch, 2, images=48)
    assert run.state()["step"] == plan.total_steps and log[-1]["progress"] == 1.0
    assert [record["start"] for record in log[1:]] == pytest.approx([record["progress"] for record in log[:-1]])
    assert log[0]["start"] == 0 and all(record["train_loss"] > 0 and record["images"] > 0 for record in log)
    assert sum(record["images"] for record in log) < 22 * 8 * 1.5
    assert results.main([str(run.output)]) == 0
    assert (run.output / "checkpoint-8-before-change-1.pth").exists()


def test_an_uninterrupted_run_is_the_oracle_for_a_change_that_changes_nothing(main_program, begun, tmp_path):  # noqa: F811
    """Another name of the same curriculum: the plan is the same, and so is every bit of the result."""
    stages = [{"until": s.until, "input_size": s.input_size} for s in plan_of(8, 2, images=48).curriculum.stages]
    curriculum = {"name": "mine", "clock": "compute", "stages": stages, "base_size": 64}
    ends = []
    for name, more in (("a", {}), ("b", {"curriculum": json.dumps(curriculum), "allow_change": "curriculum"})):
        shutil.copytree(begun, tmp_path / name)
        settings = {**SETTINGS, "output_dir": tmp_path / name / "run", "data_path": begun / "data", **more}
        assert main_program(flags(**settings)) == 0
        result = Run(tmp_path / name / "run").result()
        del result["state"]["changes"], result["state"]["identity"]
        # Step 8 is the last of the pass in progress, whose record starts anew with the change.
        assert result["log"][1]["step"] == 9 and result["log"][1].pop("images") == (24 if name == "a" else 8)
        del result["log"][1]["train_loss"], result["log"][1]["grad_norm"]
        ends.append(result)
    assert same(*ends)


def test_results_count_no_run_that_did_not_train_its_plan(train, capsys):
    run = train()
    records = run.log()
    assert results.main([str(run.output)]) == 0
    del records[1]
    (run.output / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert results.main([str(run.output)]) == 1
    assert "log.txt has no pass that trained" in capsys.readouterr().err


@pytest.mark.parametrize("processes, group", [(2, 4), (3, 2)])
def test_default_groups_are_divided_among_more_processes(folder, tmp_path, main_program, processes, group):
    """A run begun by one process, whose group was the whole batch, and continued by more: no flag is needed."""
    from processes import world

    settings = {**SETTINGS, "model": "test_convnext", "micro_batch": None, "data_path": folder}
    argv = flags(output_dir=tmp_path / "run", **settings)
    assert main_program([*argv, "--stop_after", "10 steps"]) == 0
    assert Run(tmp_path / "run").state()["config"]["micro_batch"] == 8
    programs = world(argv, tmp_path / "log", processes)
    assert {program.wait() for program in programs} == {0}, programs[0].output
    assert f"--micro_batch is {group} from here on" in programs[0].output
    assert Run(tmp_path / "run").state()["config"]["micro_batch"] == group


def test_no_setting_is_named_twice():
    text = (ROOT / "config" / "settings.py").read_text()
    for name in Config.__dataclass_fields__:
        assert text.count(f"\n    {name}: ") == 1
