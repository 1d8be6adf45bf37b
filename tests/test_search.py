"""scripts/search.py: what searches choose where the outcome is known; real trials; stops, kills, the ledger."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, flags, script

from config import Config, load_recipe
from studies.trials import CIRCUMSTANCES, OF_LATER, Trial
from utils import STOPPED

search = script("search")


class Play:
    """Stands in for main.py: notes the trials, and says what a run of these settings scores."""

    def __init__(self, score, fail_after=None):
        self.score, self.fail_after, self.seen = score, fail_after, []

    def __call__(self, trial, folder, environment, held, started):
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            return STOPPED
        self.seen.append(trial)
        (folder / "checkpoint-last.pth").touch()
        (folder / "log.txt").write_text(json.dumps({"progress": 1.0, "test_acc1": self.score(trial.config)}) + "\n")
        return 0


def sizes_of(config):
    """B for each tenth of the clock."""
    stages = config.curriculum["stages"]
    return [next(s["input_size"] for s in stages if s["until"] >= (k + 0.5) / 10) for k in range(10)]


@pytest.fixture
def find(folder, tmp_path):
    """``find(command, *arguments, launch=...)`` -> exit code of the search; its folder is ``tmp_path / "search"``."""

    def call(command, *arguments, launch, **settings):
        own = ["--output", str(tmp_path / "search"), *map(str, arguments)]
        settings = {"data_path": folder, "num_classes": 3, "warmup_epochs": "10%", **settings}
        return search.main([command, *own, *flags(**settings)], launch=launch)

    return call


def recipe(tmp_path, name):
    return load_recipe(str(tmp_path / "search" / f"{name}.yaml"))


def stages(content):
    return [(stage["until"], stage["input_size"]) for stage in content["curriculum"]["stages"]]


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------
def paper_like(config):
    """ET's landscape: the last fifth needs 224, the fourth 192, the first three 160."""
    needed = [160] * 6 + [192] * 2 + [224] * 2
    return 81.3 - sum(size < least for size, least in zip(sizes_of(config), needed))


def test_greedy_finds_efficienttrain_with_the_papers_number_of_trainings(find, tmp_path, capsys):
    play = Play(paper_like)
    arguments = ("--stages", 5, "--sizes", "96,128,160,192,224")
    assert find("greedy", *arguments, launch=play, input_size=224, epochs=10) == 0
    found = recipe(tmp_path, "greedy")
    assert stages(found) == [(0.6, 160), (0.8, 192), (1.0, 224)]
    assert found["curriculum"]["clock"] == "epochs" and found["curriculum"]["operator"] == "fourier"
    assert len(play.seen) == 7  # the baseline, and six as in the paper: "about 7 trainings"
    printed = capsys.readouterr().out
    assert "at most 9 trials, 90 full-size epochs" in printed and "7 trials of" in printed
    assert "160 160 160 192 224: 81.30 %" in printed and "128 128 160 192 224: 77.30 % (too low)" in printed


def test_tolerance_seeds_and_a_given_baseline(find, tmp_path):
    def score(config):  # a little worse for each smaller stage, and noise that the seeds cancel
        return 80 - 0.1 * sum(size < 64 for size in sizes_of(config)) + (1 if config.seed % 2 else -1)

    arguments = ("--stages", 2, "--sizes", "32,64", "--seeds", 2, "--baseline", 80)
    play = Play(score)
    assert find("greedy", *arguments, "--tolerance", 0.6, launch=play) == 0
    assert stages(recipe(tmp_path, "greedy")) == [(0.5, 32), (1.0, 64)]
    assert [trial.config.seed for trial in play.seen] == [0, 1]
    assert find("greedy", *arguments, "--tolerance", 0.4, launch=play) == 0
    assert stages(recipe(tmp_path, "greedy")) == [(1.0, 64)]
    assert len(play.seen) == 2  # the same trials: judged anew, not run again


# ---- EfficientTrain++ ----------------------------------------------------------------------------------------------
def test_constrained_solves_stages_in_order_from_the_checkpoints_before(find, tmp_path, capsys):
    best = [32, 48, 48, 64, 64]
    chains = {}

    def score(config):
        if config.stop_after is not None:
            chains[Path(config.output_dir or "").name] = config
            return 0.0
        parent = next(trial for trial in play.seen if trial.key == Path(config.finetune).parent.name)
        tried = sizes_of(parent.config)[1::2]
        done = round(5 * at(parent) / TOTAL)
        return 50 - abs(tried[done - 1] - best[done - 1])

    TOTAL = 8 * 12
    play = Play(score)
    arguments = ("--stages", 5, "--sizes", "32,48,64", "--tune_epochs", 1, "--confirm", 0)
    assert find("constrained", *arguments, launch=play, epochs=16, curriculum="none") == 0
    assert stages(recipe(tmp_path, "constrained")) == [(0.2, 32), (0.6, 48), (1.0, 64)]
    grown = [trial for trial in play.seen if trial.config.stop_after]
    assert len(grown) == 3 + 3 + 2  # 40 % are full-size: three stages; B only grows
    assert len(play.seen) == 2 * len(grown)
    for trial in grown[3:]:
        parent = next(one for one in grown if one.key == Path(trial.config.resume).parent.name)
        assert at(parent) < at(trial)
        assert trial.config.allow_change == "curriculum"
    assert grown[0].config.resume is None
    tuned = play.seen[1].config
    assert (tuned.curriculum, tuned.epochs, tuned.magnitude, tuned.stop_after) == ("none", 1, "constant", None)
    assert tuned.finetune == str(tmp_path / "search" / "trials" / grown[0].key / "checkpoint-last.pth")
    line = "stage 2, 20-40 % of compute, after 32: 32: 34.00 %; 48: 50.00 %; 64: 34.00 % -> 48"
    assert line in capsys.readouterr().out


def at(trial):
    """Share of compute at which a stage's trial ends, in full-size steps."""
    steps, compute, stages = int(trial.config.stop_after.split()[0]), 0.0, trial.config.curriculum["stages"]
    start = 0.0
    for stage in stages:
        cost = (stage["input_size"] / 64) ** 2
        here = min(steps, round((stage["until"] - start) * 96 / cost))
        compute, steps, start = compute + here * cost, steps - here, stage["until"]
    return compute


def test_real_trials_go_on_from_each_other_and_the_recipe(find, tmp_path, in_process, main_program, folder, capsys):
    arguments = ("--shares", "10,30,30,30", "--sizes", "32,64", "--tune_epochs", 0.5, "--confirm", 1)
    assert find("constrained", *arguments, "--parallel", 2, launch=in_process, epochs=4) == 0
    ledger = [json.loads(line) for line in (tmp_path / "search" / "ledger.jsonl").read_text().splitlines()]
    grown = [entry for entry in ledger if entry["settings"]["stop_after"]]
    assert all(entry["accuracy"] is None for entry in grown) and len({entry["key"] for entry in ledger}) == len(ledger)
    for entry in grown:
        output = tmp_path / "search" / "trials" / entry["key"]
        console = (output / "console.txt").read_text()
        if entry["settings"]["resume"]:
            assert f"resuming from {entry['settings']['resume']}" in console
        assert "as --stop_after says" in console
    printed = capsys.readouterr().out
    assert "full-size epochs of compute: " in printed and "searched, 4" in printed and "ordinary, 4" in printed
    # What the stages cost adds up: one chain is the share that was searched.
    chain = sum(entry["compute"] for entry in grown if entry["label"].startswith("32") and "64" not in entry["label"])
    assert 0.5 <= chain <= 0.7 * 4
    path = tmp_path / "search" / "constrained.yaml"
    text = path.read_text()
    assert text.startswith("# Found by python scripts/search.py constrained") and "stage 1, 0-10 % of compute" in text
    assert "--model tests.tiny_models:convnet" in text  # said, because no file may name a function
    argv = [
        "--recipe",
        str(path),
        "--model",
        "tests.tiny_models:convnet",
        "--data_path",
        str(folder),
        "--output_dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main_program([*argv, "--num_workers", "0", "--epochs", "1"]) == 0
    # Again: nothing is run.
    assert find("constrained", *arguments, launch=Play(None, fail_after=0), epochs=4) == 0
    assert "0 trials of 0 full-size epochs" in capsys.readouterr().out
    assert path.read_text() == text.replace("--parallel 2 ", "")


@pytest.fixture
def in_process(main_program, monkeypatch, capsys):
    """Real trials, by main.py inside this process, one at a time: signal handlers and generators are global."""
    import threading

    guard = threading.Lock()
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # trials are not in the main thread

    def call(trial, folder, environment, held, started):
        from contextlib import redirect_stdout

        from config import to_yaml

        (folder / "trial.yaml").write_text(to_yaml(trial.config))
        with guard, open(folder / "console.txt", "a") as console, redirect_stdout(console):
            return main_program(
                ["--recipe", str(folder / "trial.yaml"), "--model", trial.config.model, "--output_dir", str(folder)]
            )

    return call


# ---- magnitudes, learning rates ------------------------------------------------------------------------------------
def test_magnitude(find, tmp_path):
    scores = {("linear", 9): 60, ("linear", 5): 62, ("constant", 9): 55, ("none", 9): 58, ("steps", 9): 61.95}
    play = Play(lambda config: scores[config.magnitude, config.max_magnitude])
    assert find("magnitude", launch=play) == 0
    found = recipe(tmp_path, "magnitude")
    assert found["magnitude"] == "linear" and found["max_magnitude"] == 5 and len(play.seen) == 5
    steps = next(trial.config for trial in play.seen if trial.config.magnitude == "steps")
    assert steps.curriculum["magnitude_steps"] == [3, 9]
    assert [(s["until"], s["input_size"]) for s in steps.curriculum["stages"]] == [(0.2, 32), (0.6, 48), (1.0, 64)]
    assert (
        find("magnitude", "--magnitudes", "steps:3,9", "linear:5", launch=play) == 0
    )  # within the tolerance: the first
    assert recipe(tmp_path, "magnitude")["magnitude"] == "steps" and len(play.seen) == 5


def test_tune_gives_both_arms_the_same_grid(find, tmp_path, capsys):
    def score(config):
        peak = 4e-3 if config.curriculum == "none" else 1e-3
        return 60 - abs(config.lr - peak) * 1e3 - (config.batch_size == 16)

    play = Play(score)
    arguments = ("--lrs", "1e-3,2e-3,4e-3", "--batch_sizes", "8,16")
    assert find("tune", *arguments, launch=play) == 0
    grids = {str(c.curriculum): set() for c in (trial.config for trial in play.seen)}
    for trial in play.seen:
        grids[str(trial.config.curriculum)].add((trial.config.lr, trial.config.batch_size))
    assert len(grids) == 2 and all(len(grid) == 6 for grid in grids.values())
    assert (
        recipe(tmp_path, "tune-ordinary")["lr"] == 4e-3 and recipe(tmp_path, "tune-ordinary")["magnitude"] == "linear"
    )
    assert recipe(tmp_path, "tune-curriculum")["lr"] == 1e-3
    printed = capsys.readouterr().out
    assert "best ordinary 60.00 %, best with the curriculum 60.00 %" in printed
    assert "note: ordinary is best at the edge of --lrs (0.004)" in printed


# ---- stops, failures, the ledger -----------------------------------------------------------------------------------
def test_interrupted_and_continued_no_trial_is_repeated(find, tmp_path, capsys):
    whole = Play(paper_like)
    arguments = ("greedy", "--stages", 5, "--sizes", "96,128,160,192,224")
    settings = {"input_size": 224, "epochs": 10}
    first = Play(paper_like, fail_after=3)
    assert find(*arguments, launch=first, **settings) == STOPPED
    assert "the same command resumes" in capsys.readouterr().out
    assert find(*arguments, launch=whole, **settings) == 0
    assert [trial.label for trial in first.seen + whole.seen] == list(
        dict.fromkeys(trial.label for trial in first.seen + whole.seen)
    )
    assert len(whole.seen) == 7 - 3 and "4 trials of" in capsys.readouterr().out
    assert stages(recipe(tmp_path, "greedy")) == [(0.6, 160), (0.8, 192), (1.0, 224)]


def test_other_settings_are_other_trials_and_circumstances_are_not(find):
    arguments = ("greedy", "--stages", 2, "--sizes", "32,64")
    counts = []
    for settings in (
        {},
        {"num_workers": 3},
        {"log_interval": "1 steps"},
        {"lr": 2e-3},
        {"seed": 5},
        {"device": "auto"},
    ):
        play = Play(lambda config: 50.0)
        assert find(*arguments, launch=play, **settings) == 0
        counts.append(len(play.seen))
    assert counts == [2, 0, 0, 2, 2, 0]


def test_a_failed_trial_ends_the_search_and_a_diverged_one_counts_nothing(find, tmp_path, capsys):
    def broken(trial, folder, *_):
        (folder / "console.txt").write_text("stage 1\nerror: --opt lambb: no such optimizer\n")
        return 1

    assert find("greedy", "--stages", 2, "--sizes", "32,64", launch=broken) == 1
    assert "no such optimizer" in capsys.readouterr().err
    assert not (tmp_path / "search" / "ledger.jsonl").exists()

    def diverging(trial, folder, *rest):
        if trial.config.lr > 1e-3:
            (folder / "nonfinite-7").mkdir()
            return 1
        return Play(lambda config: 50.0)(trial, folder, *rest)

    assert find("tune", "--lrs", "1e-3,1e2", launch=diverging) == 0
    assert recipe(tmp_path, "tune-ordinary")["lr"] == 1e-3
    assert "lr 100, batch 8: 0.00 %" in capsys.readouterr().out


def test_a_stage_whose_checkpoint_is_gone_is_trained_again(find, tmp_path):
    arguments = ("constrained", "--shares", "20,80", "--sizes", "32,64", "--tune_epochs", 1, "--confirm", 0)
    play = Play(lambda config: 50.0)
    assert find(*arguments, launch=play, epochs=8) == 0
    count = len(play.seen)
    stage = play.seen[0]
    (tmp_path / "search" / "trials" / stage.key / "checkpoint-last.pth").unlink()
    assert find(*arguments, launch=play, epochs=8) == 0
    assert [trial.key for trial in play.seen[count:]] == [stage.key]


@pytest.mark.parametrize(
    "arguments, settings, words",
    [
        (["greedy", "--sizes", "32,999"], {}, "--sizes 999"),
        (["greedy", "--sizes", "30"], {"model": "test_vit"}, "input size 30"),
        (["greedy", "--seeds", "0"], {}, "--seeds is 0"),
        (["constrained", "--full_share", "90"], {}, "--full_share 90"),
        (["constrained"], {"epochs": 0.5}, "too short"),
        (["magnitude", "--magnitudes", "cubic:9"], {}, "cubic:9"),
        (["constrained"], {"epochs": "160 steps"}, "--epochs is '160 steps'"),
        (["greedy"], {"epochs": "160 steps"}, "--epochs is '160 steps'"),
        (["tune"], {"data_path": "/nowhere"}, "/nowhere"),
        (["greedy"], {"output_dir": "x"}, "--output_dir is not for searches"),
    ],
)
def test_bad_input(find, arguments, settings, words, capsys):
    assert find(*arguments, launch=Play(lambda config: 1.0), **settings) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_damaged_ledger_is_refused(find, tmp_path, capsys):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "ledger.jsonl").write_text("half a li")
    assert find("greedy", launch=Play(None)) == 1
    assert "is not a ledger" in capsys.readouterr().err


def test_predict_trains_nothing(find, tmp_path, capsys):
    assert find("constrained", "--predict", launch=None, epochs=20) == 0
    assert capsys.readouterr().out.startswith("at most ") and not (tmp_path / "search").exists()


def test_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(search.torch.cuda, "device_count", lambda: 2)
    assert search.make_slots(None, "auto") == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in search.make_slots(3, "cuda")] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in search.make_slots(None, "cuda")] == ["5", "7"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert search.make_slots(2, "cpu") == [{"OMP_NUM_THREADS": "3"}] * 2


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.extended), signal.SIGKILL], ids=lambda number: number.name
)
def test_killed_search_goes_on_with_real_processes(folder, tmp_path, number):
    """Ended in the middle of its second trial: the first is not run again, and the second goes on where it was."""
    settings = flags(data_path=folder, num_classes=3, save_interval="2 steps", warmup_epochs="10%", epochs=12)
    output = tmp_path / "search"
    command = [sys.executable, str(ROOT / "scripts/search.py"), "greedy", "--output", str(output)]
    command += ["--stages", "2", "--sizes", "32,64", "--baseline", "0", "--seeds", "2", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    ledger = output / "ledger.jsonl"
    wait_for(lambda: ledger.exists() and any(path.parent.name not in ledger.read_text() for path in saved(output)))
    process.send_signal(number)
    assert process.wait(60) == (STOPPED if number == signal.SIGTERM else -number)
    first = ledger.read_text()
    assert first.count("\n") == 1
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 trials of" in done.stdout and "1 more were known" in done.stdout
    assert ledger.read_text().startswith(first) and ledger.read_text().count("\n") == 2
    (second,) = (path for path in (output / "trials").iterdir() if path.name not in first)
    assert (second / "console.txt").read_text().count("resuming from") == 1
    assert yaml.safe_load((output / "greedy.yaml").read_text())["curriculum"]["stages"][0]["input_size"] == 32


def saved(output):
    return output.glob("trials/*/checkpoint-last.pth")


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_trials_on_other_labels_or_held_out_images_are_other_trials():
    def key(**settings):
        return Trial(Config(data_path="d", **settings), "x", 1.0).key

    plain_settings = {name: value for name, value in asdict(Config(data_path="d")).items() if name not in CIRCUMSTANCES}
    known = {name: value for name, value in plain_settings.items() if name not in OF_LATER}
    assert key() == hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]  # as ledgers have it
    others = [{"val_share": "10%"}, {"val_share": 0.2}, {"labels": "a.csv"}, {"labels": "b.csv"}, {"label_key": "cls"}]
    assert len({key(), *(key(**other) for other in others)}) == len(others) + 1
    assert key(num_workers=3) == key()


def test_a_found_recipe_holds_out_what_its_trials_held_out(find, tmp_path):
    assert find("magnitude", "--magnitudes", "none", launch=Play(lambda config: 50.0), val_share="30%") == 0
    assert recipe(tmp_path, "magnitude")["val_share"] == "30%"


@pytest.mark.parametrize("more", [{"patience": "10%"}, {"stop_if": "test_acc1 < 5 after 10%"}, {"suggest": True}])
def test_trials_run_to_their_end(find, capsys, more):
    assert find("tune", launch=Play(lambda config: 50.0), **more) == 2
    assert f"--{next(iter(more))}" in capsys.readouterr().err
