"""scripts/search.py parity: factors where the curves are known, the rule of the search, stops, bad input, a run."""

import csv
import json
import math
import re

import numpy as np
import pytest
from conftest import TINY, flags
from test_search import Play, search

from studies.factors import LEVEL, Curve, factor, log_cost_of, rising, target
from utils import STOPPED

BUDGETS = (2, 3, 4.5, 6.75)


class Law(Play):
    """Stands in for main.py: accuracy = 60 + 10 log2(``gain`` x budget) at the best settings of an arm.

    ``noise``: deviation over seeds; ``best``: (lr, batch) that loses nothing; ``cap``: accuracy never exceeds it.
    """

    def __init__(self, gain=2.0, noise=0.0, best=(2e-3, 8), caps=(math.inf, math.inf), speed=1.0, **more):
        self.gain, self.noise, self.best, self.caps, self.speed = gain, noise, best, caps, speed
        super().__init__(self.outcome, **more)

    def mine(self, config):
        return config.curriculum != "none"

    def outcome(self, config):
        mine, (lr, batch) = self.mine(config), self.best
        clean = 60 + 10 * math.log2(config.epochs * (self.gain if mine else 1))
        lost = 5 * abs(math.log2(config.lr / lr)) + 3 * abs(math.log2(config.batch_size / batch))
        seed = [config.seed, config.batch_size, mine, round(1e6 * config.lr), round(1e3 * config.epochs)]
        return min(clean, self.caps[not mine]) - lost + self.noise * np.random.default_rng(seed).standard_normal()

    def __call__(self, trial, folder, *rest):
        if (code := super().__call__(trial, folder, *rest)) == 0:
            record = json.loads((folder / "log.txt").read_text())
            seconds = 10 * trial.config.epochs * (self.speed if self.mine(trial.config) else 1)
            (folder / "log.txt").write_text(json.dumps({**record, "seconds": seconds}) + "\n")
        return code


@pytest.fixture
def study(folder, tmp_path, monkeypatch, request):
    """``study(launch=..., lrs=..., **options)`` -> exit code; the arms are a curriculum and ordinary training."""
    if "law_s_factor" not in request.node.name and "real" not in request.node.name:
        monkeypatch.setattr("studies.parity_report.ParityReport.draw", lambda *_: None)  # which takes a second
    (tmp_path / "fast.yaml").write_text("curriculum: efficienttrain++\nlr: 1.0e-3\nbatch_size: 8\n")
    (tmp_path / "plain.yaml").write_text("extends: fast.yaml\ncurriculum: none\n")

    def call(launch, settings=None, more=(), **options):
        options = {"budgets": ",".join(map(str, BUDGETS)), "lrs": "1e-3,2e-3,4e-3", "batches": "8", **options}
        own = ["--recipe", str(tmp_path / "fast.yaml"), "--against", str(tmp_path / "plain.yaml")]
        own += ["--output", str(tmp_path / "search")]
        own += [text for key, value in options.items() if value is not None for text in (f"--{key}", str(value))]
        set_here = dict.fromkeys(("epochs", "lr", "batch_size", "eval_interval"))
        return search.main(
            [
                "parity",
                *own,
                *more,
                *flags(**{**set_here, "data_path": folder, "warmup_epochs": "10%", **(settings or {})}),
            ],
            launch=launch,
        )

    return call


@pytest.fixture
def result(tmp_path):
    return lambda: json.loads((tmp_path / "search" / "parity.json").read_text())


# ---- curves and factors --------------------------------------------------------------------------------------------
def test_isotonic_regression_is_scikit_learns():
    from sklearn.isotonic import isotonic_regression

    values = np.random.default_rng(0).normal(size=(50, 7)).cumsum(1)
    assert np.allclose(rising(values), [isotonic_regression(row) for row in values])
    assert np.array_equal(rising(np.array([[1.0, 2, 3]])), [[1, 2, 3]])


def curve(costs, means, noise=0.0, seeds=3, rng=None):
    rng = rng or np.random.default_rng(0)
    means = np.array(means, float)[:, None] + noise * rng.standard_normal((len(means), seeds))
    return Curve(np.repeat(np.array(costs, float)[:, None], seeds, 1), means)


def test_the_inverse_of_a_curve():
    x = np.log([1, 2, 4, 8])
    wanted = np.array([49, 50, 55, 60, 61, 70, 71])
    found = log_cost_of(np.tile(x, (7, 1)), np.tile([50.0, 60, 60, 70], (7, 1)), wanted)
    assert found[0] == -math.inf and found[-1] == math.inf
    assert np.allclose(np.exp(found[1:-1]), [1, 2**0.5, 2, 4 * 2**0.1, 8])  # of a plateau the cheapest point
    # In whatever order the costs come.
    again = log_cost_of(np.tile(x[::-1], (7, 1)), np.tile([70.0, 60, 60, 50], (7, 1)), wanted)
    assert np.array_equal(found, again)


def test_factors_of_known_curves():
    mine, other = curve([1, 2, 4], [60, 70, 80]), curve([2, 4, 8], [60, 70, 80])
    for place in range(3):
        one = factor(mine, other, place)
        assert (one.value, one.low, one.high) == pytest.approx((2, 2, 2)) and one.state == "measured"
    never = factor(mine, curve([2, 4, 8], [60, 70, 81]), 2)
    assert (never.value, never.state, never.text()) == (0, "unreachable", "< 2.00")
    always = factor(mine, curve([2, 4, 8], [59, 70, 80]), 0)
    assert (always.value, always.state, always.text()) == (math.inf, "below the smallest budget", "> 2.00")
    single = factor(curve([1, 2], [60, 70], seeds=1), curve([1, 2], [60, 65], seeds=1), 1)
    assert single.low is None and single.value == pytest.approx(2**0.5)


def test_the_interval_of_a_factor_covers_the_truth():
    """With 3 seeds at 5 budgets; the factor is 2 by the law. An interval half as wide would cover much less."""
    rng, costs = np.random.default_rng(1), np.array([1.2, 1.7, 2.4, 3.5, 6])
    covered = narrow = 0
    for number in range(400):
        mine = curve(costs, 60 + 10 * np.log2(2 * costs), 1.0, rng=rng)
        other = curve(costs, 60 + 10 * np.log2(costs), 1.0, rng=rng)
        one = factor(mine, other, 4, seed=number)
        covered += one.low <= 2 <= one.high
        middle = math.sqrt(one.low * one.high)
        narrow += middle * (one.low / middle) ** 0.5 <= 2 <= middle * (one.high / middle) ** 0.5
    assert abs(covered / 400 - LEVEL) < 0.035
    assert narrow / 400 < 0.8


def test_the_interval_of_an_accuracy_covers_the_truth():
    rng, covered = np.random.default_rng(2), 0
    for _ in range(1000):
        one = curve([1, 2], [50, 60], 1.5, rng=rng)
        covered += abs(one.accuracy[1] - 60) <= one.half_width
    assert abs(covered / 1000 - LEVEL) < 0.02
    assert curve([1, 2], [50, 60], seeds=1).half_width is None


def test_the_target_is_the_first_budget_that_is_as_good():
    assert target(curve([1, 2, 4], [50, 60, 70]), 2) == 2
    assert target(curve([1, 2, 4, 8], [50, 70, 70, 69]), 3) == 1
    assert target(curve([1, 2, 4, 8], [50, 70, 70, 69]), 0) == 0
    noisy = Curve(np.array([[1.0] * 3, [2.0] * 3]), np.array([[69, 70, 71], [70, 71, 72.0]]))
    assert target(noisy, 1) == 0  # +- 1.6: a point is not told from none
    assert target(Curve(noisy.costs, noisy.accuracies * [[1], [1.1]]), 1) == 1


# ---- the study -----------------------------------------------------------------------------------------------------
def test_a_law_s_factor_is_found(study, result, tmp_path, capsys):
    play = Law(gain=2.0, speed=1.5)
    assert study(play) == 0
    found = result()["factors"][0]
    # Two budgets apart by 1.5: log-linear between them, so interpolation is exact but for plans that end at a step.
    assert found["budget"] == 6.75 and not found["saturated"] and found["compute"]["state"] == "measured"
    assert found["time"]["value"] == pytest.approx(2 / 1.5, rel=1e-6)
    assert found["compute"]["value"] == pytest.approx(2, rel=0.1)
    assert found["compute"]["low"] == pytest.approx(found["compute"]["value"])  # without noise
    # At 2, the curriculum's smallest budget is already better.
    assert found["by_budget"][0]["time"]["state"] == "below the smallest budget"
    assert found["by_budget"][0]["time"]["text"].startswith("> ")
    for arm in result()["arms"].values():
        assert [(point["lr"], point["batch_size"]) for point in arm] == [(2e-3, 8)] * 4
        assert not any(point["notes"] for point in arm)
    printed = capsys.readouterr().out
    assert re.search(r"fast takes [\d.]+ x less compute and 1\.33 x less training time", printed)
    for name in ("parity.png", "parity.svg", "parity.md", "parity.csv"):
        assert (tmp_path / "search" / name).stat().st_size > 0


def test_the_rule_is_the_same_for_both_arms_and_within_its_bound(study, tmp_path, capsys):
    play = Law(noise=0.0)
    assert study(play, lrs="5e-4,1e-3,2e-3,4e-3,8e-3", batches="4,8,16") == 0
    rows = list(csv.DictReader((tmp_path / "search" / "parity.csv").read_text().splitlines()))
    assert len(rows) == len(play.seen)
    for arm in ("fast", "plain"):
        for number, budget in enumerate(BUDGETS):
            mine = [row for row in rows if row["arm"] == arm and float(row["budget"]) == budget]
            count = {role: sum(row["for"] == role for row in mine) for role in ("grid", "choice", "result")}
            assert count == {"grid": 9 if number else 15, "choice": 3 if number else 5, "result": 3}
            seeds = {role: {int(row["seed"]) for row in mine if row["for"] == role} for role in count}
            assert seeds == {"grid": {0}, "choice": {1}, "result": {2, 3, 4}}
    assert all(trial.config.eval_interval == "100%" for trial in play.seen)
    printed = capsys.readouterr().out
    # 15 + 5 + 2 x 3 trials at most at each of 4 budgets of 2 arms.
    trials, compute = re.search(r"at most (\d+) trials, ([\d.]+) full-size epochs", printed).groups()
    assert int(trials) == 208 and float(compute) == pytest.approx(26 * 2 * sum(BUDGETS), rel=0.05)
    assert f"{len(play.seen)} trials of" in printed and len(play.seen) == 2 * (23 + 3 * 15)
    assert not [*(tmp_path / "search").glob("trials/*/*.pth")]


def test_the_search_follows_the_best_settings_over_the_grid(study, result):
    """The best rate doubles from budget to budget; a window that did not move would lose it."""

    class Moving(Law):
        def outcome(self, config):
            self.best = (2.5e-4 * 2 ** [*BUDGETS].index(config.epochs) * (4 if config.epochs > 4 else 1), 8)
            return super().outcome(config)

    play = Moving()
    assert study(play, lrs=",".join(f"{2.5e-4 * 2**k:g}" for k in range(7))) == 0
    assert [point["lr"] for point in result()["arms"]["plain"]] == [2.5e-4, 5e-4, 4e-3, 8e-3]
    assert "edge of --lrs" in result()["arms"]["plain"][0]["notes"][0]
    assert result()["arms"]["plain"][3]["notes"] == []


def test_saturated_unreachable_and_edges(study, result, capsys):
    assert study(Law(gain=2.0, caps=(math.inf, 80.0))) == 0  # ordinary training ends at 80, which it has from 4 on
    found = result()["factors"][0]
    assert found["saturated"] and found["budget"] == 4.5 and found["accuracy"] == pytest.approx(80)
    assert found["time"]["value"] == pytest.approx(2 * 4.5 / 4, rel=1e-3)
    assert "plain is saturated: its budgets above 4.5 gain nothing" in capsys.readouterr().out


def test_unreachable_and_untuned(study, result, capsys):
    assert study(Law(gain=0.5, best=(8e-3, 8)), at=4.5) == 0
    found = result()["factors"][0]
    assert found["budget"] == 4.5 and found["compute"]["state"] == "unreachable"
    assert found["compute"]["value"] is None and found["by_budget"][0]["compute"]["state"] == "measured"
    printed = capsys.readouterr().out
    assert "(unreachable)" in printed
    assert printed.count("not tuned: 0.004 is the edge of --lrs, try values beyond it") >= 8
    assert "--batches had one value" in printed


def test_diverged_trials(study, result, tmp_path):
    """4e-3 diverges with one seed of the results at the largest budget: the second best takes its place. What
    diverges in the grid is last."""

    class Diverging(Law):
        def __call__(self, trial, folder, *rest):
            config = trial.config
            if config.lr == 4e-3 and ((config.seed == 3 and config.epochs == 6.75) or config.batch_size == 16):
                self.seen.append(trial)
                (folder / "nonfinite-7").mkdir()
                return 1
            return super().__call__(trial, folder, *rest)

    assert study(Diverging(best=(4e-3, 8)), lrs="1e-3,2e-3,4e-3,8e-3", batches="8,16") == 0
    for arm in result()["arms"].values():
        assert [point["lr"] for point in arm] == [4e-3] * 3 + [arm[3]["lr"]] and arm[3]["lr"] != 4e-3
        assert "lr 0.004, batch 8 diverged" in arm[3]["notes"] and len(arm[3]["accuracies"]) == 3


def test_an_arm_that_always_diverges_has_no_result(study, result, capsys):
    class Never(Law):
        def __call__(self, trial, folder, *rest):
            if self.mine(trial.config):
                return super().__call__(trial, folder, *rest)
            (folder / "nonfinite-7").mkdir(exist_ok=True)
            return 1

    assert study(Never()) == 0
    assert result()["factors"] == [] and "One of them has no result." in capsys.readouterr().out
    assert [point["accuracy"] for point in result()["arms"]["plain"]] == [None] * 4


def test_stopped_and_resumed_no_trial_is_repeated(study, result, tmp_path, capsys):
    first, rest = Law(noise=0.3, fail_after=17), Law(noise=0.3)
    assert study(first) == STOPPED
    assert "the same command resumes" in capsys.readouterr().out
    assert study(rest) == 0
    assert not {trial.key for trial in first.seen} & {trial.key for trial in rest.seen}
    assert f"{len(first.seen)} more were known" in capsys.readouterr().out
    stopped = result()
    again = Law(noise=0.3)
    assert study(again) == 0 and again.seen == [] and result() == stopped
    whole = Law(noise=0.3)
    for path in (tmp_path / "search").glob("ledger*"):
        path.unlink()
    assert study(whole) == 0 and result() == stopped
    # More seeds, and a grid that is only the best: what is known stays known.
    more = Law(noise=0.3)
    assert study(more, seeds=4) == 0
    assert {trial.config.seed for trial in more.seen} == {5} and len(more.seen) == 8


def test_two_arms_that_are_the_same(study, result, tmp_path):
    (tmp_path / "plain.yaml").write_text("extends: fast.yaml\n")
    play = Law(noise=0.5)
    assert study(play) == 0
    assert len({trial.key for trial in play.seen}) == len(play.seen)  # no trial is run for each of them
    found = result()["factors"][0]["by_budget"]
    assert all(row["compute"]["value"] == pytest.approx(1) for row in found)
    assert found[1]["compute"]["low"] < 1 < found[1]["compute"]["high"]


def test_several_arms_and_one_seed(study, result, tmp_path):
    (tmp_path / "half.yaml").write_text("extends: fast.yaml\ncurriculum: efficienttrain\n")
    more = ["--against", str(tmp_path / "half.yaml")]
    assert study(Law(), more=more, seeds=1, lrs="2e-3") == 0
    found = result()
    assert [one["against"] for one in found["factors"]] == ["plain", "half"]
    assert found["factors"][0]["compute"]["low"] is None
    # Its clock counts epochs, which cost less: the budget is compute all the same.
    for point in found["arms"]["half"]:
        assert point["epochs"] == pytest.approx(point["budget"], abs=0.2)  # a step
    text = (tmp_path / "search" / "parity.md").read_text()
    assert "One seed: there are no intervals" in text and "## fast against half" in text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budgets": "2"}, "--budgets is 2; write 2 or more numbers that rise"),
        ({"budgets": "4,2"}, "--budgets is 4,2; write"),
        ({"budgets": "0,2"}, "--budgets has 0; they are positive"),
        ({"budgets": "2,nan"}, "--budgets has nan"),
        ({"budgets": "2,x"}, "argument --budgets: '2,x' is not a list"),
        ({"budgets": "0.1,2"}, "budget 0.1, batch size 8"),
        ({"lrs": "1e-3,1e-3"}, "--lrs is 0.001,0.001"),
        ({"lrs": "-1"}, "--lrs has -1"),
        ({"batches": "8,6.5"}, "argument --batches: '8,6.5'"),
        ({"batches": "8,100"}, "batch size 100: the training set has 48 images"),
        ({"batches": "6"}, "batch size 6"),
        ({"seeds": "0"}, "--seeds is 0"),
        ({"at": "5"}, "--at 5 is none of the --budgets"),
        ({"settings": {"epochs": 3}}, "--epochs is not for searches"),
        ({"settings": {"lr": 3}}, "--lr is not for searches"),
        ({"settings": {"output_dir": "x"}}, "--output_dir is not for searches"),
        ({"more": ["--against", "/nowhere.yaml"]}, "/nowhere.yaml"),
        ({"settings": {"data_path": "/nowhere"}}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(study, options, words, capsys):
    try:
        code = study(Law(fail_after=0), **options)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_arms_are_judged_on_the_same_images(study, tmp_path, capsys):
    (tmp_path / "plain.yaml").write_text("extends: fast.yaml\nnum_classes: 5\n")
    assert study(Law()) == 2
    assert "plain has 5: give all arms the same validation images" in capsys.readouterr().err
    assert study(Law(), more=["--against", str(tmp_path / "plain.yaml")]) == 2
    assert "is named twice" in capsys.readouterr().err


def test_default_grid(study, tmp_path, capsys):
    (tmp_path / "plain.yaml").write_text("curriculum: none\nlr: 4.0e-3\nbatch_size: 16\n")
    play = Law(best=(2e-3, 16))
    assert study(play, lrs=None, batches=None) == 0
    assert {trial.config.lr for trial in play.seen} == {5e-4, 1e-3, 2e-3, 4e-3, 8e-3}
    assert {trial.config.batch_size for trial in play.seen} == {8, 16}


def test_a_real_study(study, result, tmp_path, main_program, monkeypatch):
    """A few seconds: two arms, two budgets, two seeds, as main.py trains them."""
    from contextlib import redirect_stdout

    from config import to_yaml

    monkeypatch.setattr("signal.signal", lambda *_: None)  # trials are not in the main thread

    def call(trial, folder, environment, held, started):
        (folder / "trial.yaml").write_text(to_yaml(trial.config))
        with open(folder / "console.txt", "a") as console, redirect_stdout(console):
            model = ["--model", TINY["model"]]
            return main_program(["--recipe", str(folder / "trial.yaml"), *model, "--output_dir", str(folder)])

    assert study(call, budgets="1,2", lrs="1e-2", seeds=2, settings={"model_ema": True}) == 0
    found = result()
    for arm in found["arms"].values():
        for point in arm:
            assert point["epochs"] == pytest.approx(point["budget"], rel=0.2) and point["seconds"] > 0
            assert len(point["accuracies"]) == 2
    rows = list(csv.DictReader((tmp_path / "search" / "parity.csv").read_text().splitlines()))
    one = next(row for row in rows if row["for"] == "result" and row["arm"] == "plain")
    output = tmp_path / "search" / "trials" / one["key"]
    log = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    assert float(one["accuracy"]) == pytest.approx(log[-1]["test_acc1_ema"], rel=1e-5)
    assert float(one["seconds"]) == pytest.approx(sum(record["seconds"] for record in log), rel=1e-3)
    plan = json.loads((output / "plan.json").read_text())
    images, each = plan["total"]["images"], plan["total"]["flops"]
    assert float(one["flops"]) == pytest.approx(6 * images * each, rel=1e-5)
    assert not [*output.glob("*.pth")]
