"""The plan against the schedules of the authors' scripts, and its promises for any budget, size and curriculum."""

import itertools
import math
import re

import pytest
from reference import golden

from curriculum import Curriculum, build_plan, parse_duration, summarize, table
from curriculum.presets import PRESETS

IMAGENET = {"num_images": 1281167, "batch_size": 4096}
SCHEDULES = golden("schedules")  # {script: {budget: [[input size, epochs run, replay times], ...]}}


def preset_of(script):
    if script == "v1":
        return "efficienttrain"
    if "convnext" in script:
        return "efficienttrain++-convnext"
    return "efficienttrain++-deit" if "deit" in script else "efficienttrain++"


def official_plan(script, budget, **kwargs):
    return build_plan(preset_of(script), epochs=int(budget), **IMAGENET, **kwargs)


def sizes(plan):
    return [stage.input_size for stage in plan.stages]


def cost(plan):
    """Full-size optimizer steps of the base batch that the plan's compute equals, added up record by record."""
    return sum(
        record.steps * record.batch_size / plan.batch_size * (record.input_size / plan.base_size) ** 2
        for record in plan
    )


every_script = pytest.mark.parametrize(
    "script, budget", [(script, budget) for script, budgets in SCHEDULES.items() for budget in budgets]
)


@every_script
def test_matches_the_release(script, budget):
    plan = official_plan(script, budget)
    expected = {}
    loader_pass = {}
    for size, epochs_run, replays in SCHEDULES[script][budget]:
        expected[size] = expected.get(size, 0) + epochs_run * replays
        loader_pass[size] = replays
    assert sizes(plan) == list(expected)
    for stage in plan.stages:
        size = stage.input_size
        assert abs(stage.passes - expected[size]) <= loader_pass[size] + 1e-9


@every_script
def test_costs_the_budget(script, budget):
    plan = official_plan(script, budget)
    share = 1.0 if script != "v1" else 0.6 * (160 / 224) ** 2 + 0.2 * (192 / 224) ** 2 + 0.2
    assert abs(cost(plan) - share * int(budget) * 312) <= 1
    if script == "v1":
        assert plan.total_steps == int(budget) * 312


@every_script
def test_steps_magnitude_is_the_release_s(script, budget):
    """Stage k of the release runs at magnitude k (2 k + 1 in the ICCV code): as many passes here."""
    plan = official_plan(script, budget, magnitude="steps")
    for number, (size, epochs_run, replays) in enumerate(SCHEDULES[script][budget]):
        magnitude = 2.0 * number + 1 if script == "v1" else float(number)
        records = [record for record in plan if record.magnitude == magnitude]
        assert {record.input_size for record in records} == {size}
        passes = sum(record.steps for record in records) / 312
        assert abs(passes - epochs_run * replays) <= max(replays, 1) + 1  # a pass is at one magnitude throughout


def test_the_release_s_own_drift_would_be_noticed():
    """Negative control: the release's passes do not cost the budget, and the bound above is fine enough to see it."""
    drift = {
        script: abs(sum(e * r * (s / 224) ** 2 for s, e, r in budgets["200"]) - 200) * 312
        for script, budgets in SCHEDULES.items()
        if script != "v1"
    }
    assert all(steps > 1 for steps in drift.values())


@pytest.mark.parametrize(
    "script, budget", [(s, b) for s in ("swinT", "convnextT", "deitS", "v1") for b in (50, 100, 300)]
)
@pytest.mark.parametrize("warmup", ["20 passes", "20%"])
def test_learning_rate_does_not_jump_at_a_switch(script, budget, warmup):
    plan = official_plan(script, budget, warmup=warmup)
    assert len(plan.stages) > 1
    for stage in plan.stages[1:]:
        before, at, after = (plan.lr_at(stage.first_step + k) for k in (-1, 0, 1))
        steady = max(abs(plan.lr_at(stage.first_step - 2) - before), abs(after - at))
        assert abs(at - before) <= 1.001 * steady
        assert abs(at - before) <= 2e-3 * before  # the release jumps by 1.7 to 21 %


def test_learning_rate_rises_then_falls_to_its_end():
    plan = build_plan(
        "efficienttrain++", epochs=20, num_images=10000, batch_size=100, lr=4e-3, min_lr=1e-6, warmup="10%"
    )
    rates = [plan.lr_at(step) for step in range(plan.total_steps)]
    peak = rates.index(max(rates))
    assert rates[0] == 0.0
    assert plan.progress(peak) == pytest.approx(0.1, abs=1e-3)
    assert rates[peak] == pytest.approx(4e-3, rel=1e-3)
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[peak:]))
    assert 1e-6 < rates[-1] < 1.1e-6
    # A function of progress alone: half way between the end of warm-up and the end, half way between lr and min_lr.
    half = next(step for step in range(plan.total_steps) if plan.progress(step) >= 0.55)
    assert rates[half] == pytest.approx((4e-3 + 1e-6) / 2, rel=1e-2)


def test_weight_decay():
    constant = build_plan("none", epochs=3, num_images=100, batch_size=10, weight_decay=0.05)
    assert {constant.weight_decay_at(step) for step in range(30)} == {0.05}
    rising = build_plan("none", epochs=3, num_images=100, batch_size=10, weight_decay=0.04, weight_decay_end=0.4)
    values = [rising.weight_decay_at(step) for step in range(31)]
    assert values[0] == pytest.approx(0.04) and values[15] == pytest.approx(0.22) and values[30] == pytest.approx(0.4)
    assert values[10] == pytest.approx(0.13) and values[20] == pytest.approx(0.31)  # a line has 0.16 and 0.28


def test_a_plan_is_shown_in_a_few_lines():
    plan = build_plan("efficienttrain++", epochs=200, num_images=1281167, batch_size=4096)
    lines = repr(plan).splitlines()
    assert len(lines) == 4 and str(plan) == repr(plan)
    assert lines[0] == "Plan: efficienttrain++, 200 epochs at base size 224, 1,281,167 images, 141,827 steps"
    assert lines[1].startswith("  B 96: 217.8 passes, 67,946 steps of 4,096 images")


def test_table_and_summary_of_a_plan_by_default():
    plan = build_plan("efficienttrain++", epochs=200, num_images=1281167, batch_size=4096)
    assert table(plan) == table(summarize(plan)) == table(summarize(plan, 300), 300)
    assert "less compute than 300 ordinary epochs: 1.50x by pixels" in table(plan)
    assert "less compute than 600 ordinary epochs: 3.00x by pixels" in table(plan, 600)


BUDGETS = [1, 2, 2.5, 7, 30]


@pytest.mark.parametrize("epochs", BUDGETS)
@pytest.mark.parametrize("preset", PRESETS)
def test_records_cover_the_run_without_gaps(preset, epochs):
    plan = build_plan(preset, epochs=epochs, num_images=2001, batch_size=20)
    records = list(plan)
    assert [record.index for record in records] == list(range(len(plan)))
    assert [record.first_step for record in records] == list(
        itertools.accumulate((record.steps for record in records), initial=0)
    )[:-1]
    assert sum(record.steps for record in records) == plan.total_steps == sum(stage.steps for stage in plan.stages)
    assert all(1 <= record.steps <= 100 for record in records)  # a pass is floor(2001 / 20) steps
    assert records[0].start == 0.0 and records[-1].stop == 1.0
    for a, b in itertools.pairwise(records):
        assert a.start < a.stop == pytest.approx(b.start, abs=1e-12)
        assert b.stage in (a.stage, a.stage + 1)
        assert a.steps == 100 or b.stage > a.stage  # only the last pass of a stage is shortened
    seen = [plan.locate(step) for step in range(plan.total_steps)]
    assert [(record.index, place) for record, place in seen] == [
        (record.index, place) for record in records for place in range(record.steps)
    ]
    for record in records:
        assert plan.progress(record.first_step) == pytest.approx(record.start, abs=1e-12)
        assert plan.progress(record.first_step + record.steps) == pytest.approx(record.stop, abs=1e-12)
    ends = [plan.stages[k].stop for k in range(len(plan.stages))]
    if preset not in ("none", "efficienttrain-linear"):
        shares = (0.6, 0.8, 1) if preset == "efficienttrain" else [stage.until for stage in plan.curriculum.stages]
        assert ends == pytest.approx(shares, abs=1.5 / (epochs * 100))
    if plan.curriculum.clock == "compute":
        assert abs(cost(plan) - epochs * 100) <= 1
        assert plan.equivalent_epochs(plan.total_steps) == pytest.approx(epochs, abs=1 / 100)
    else:
        assert plan.total_steps == math.floor(epochs * 100)
    with pytest.raises(ValueError, match="outside"):
        plan.locate(plan.total_steps)


def test_linear_magnitude_is_nine_times_the_progress_at_the_start():
    plan = build_plan("efficienttrain++", epochs=30, num_images=2000, batch_size=20)
    for record in plan:
        assert record.magnitude == 9.0 * record.start
    assert plan.records[0].magnitude == 0.0 and plan.records[-1].magnitude < 9.0
    assert {r.magnitude for r in build_plan("none", epochs=3, num_images=100, batch_size=10)} == {9.0}
    off = build_plan("efficienttrain++", epochs=3, num_images=100, batch_size=10, magnitude="none")
    assert {r.magnitude for r in off} == {None}
    five = build_plan("none", epochs=2, num_images=100, batch_size=10, magnitude="linear", max_magnitude=5)
    assert [r.magnitude for r in five] == [0.0, 2.5]


# The rules worked by hand: ET++ round_m(B g / 224); ET 160, round_m((160 + g) / 2), g from g = 224 on, and below in
# proportion; halves round up; equal neighbours merge.
SIZES = [
    ("efficienttrain++", 224, 16, [96, 160, 224]),
    ("efficienttrain++", 224, 32, [96, 160, 224]),
    ("efficienttrain++", 224, 14, [98, 154, 224]),
    ("efficienttrain++", 64, 16, [32, 48, 64]),
    ("efficienttrain++", 64, 32, [32, 64]),
    ("efficienttrain++", 192, 16, [80, 144, 192]),  # 82.3, 137.1
    ("efficienttrain++", 256, 16, [112, 176, 256]),
    ("efficienttrain++", 256, 32, [96, 192, 256]),
    ("efficienttrain++", 384, 16, [160, 272, 384]),
    ("efficienttrain++", 384, 32, [160, 288, 384]),
    ("efficienttrain++", 512, 16, [224, 368, 512]),
    ("efficienttrain++", 32, 16, [16, 32]),
    ("efficienttrain++", 16, 16, [16]),
    ("efficienttrain++", 250, 16, [112, 176, 250]),  # 107.1 -> 112, 178.6 -> 176; the base is as asked
    ("efficienttrain++-fast", 64, 8, [24, 32, 64]),
    ("efficienttrain++-fast", 224, 16, [80, 112, 224]),  # 84
    ("efficienttrain++-fast", 224, 32, [96, 128, 224]),  # 112 = 3.5 x 32: halves up
    ("efficienttrain++-deit", 224, 16, [96, 160, 192, 224]),
    ("efficienttrain++-deit", 384, 16, [160, 272, 336, 384]),  # 164.6, 274.3, 329.1 (20.57 of 16)
    ("efficienttrain++-convnext", 224, 16, [160, 224]),
    ("efficienttrain", 224, 16, [160, 192, 224]),
    ("efficienttrain", 256, 16, [160, 208, 256]),
    ("efficienttrain", 384, 16, [160, 272, 384]),
    ("efficienttrain", 384, 32, [160, 288, 384]),  # 272 = 8.5 x 32: halves up
    ("efficienttrain", 512, 32, [160, 352, 512]),
    ("efficienttrain", 112, 16, [80, 96, 112]),
    ("efficienttrain", 64, 16, [48, 64]),  # 45.7 and 54.9 both round to 48
    ("none", 224, 32, [224]),
    ("none", 100, 16, [100]),
]


@pytest.mark.parametrize("preset, base, multiple, expected", SIZES)
def test_sizes_at_other_bases(preset, base, multiple, expected):
    plan = build_plan(preset, epochs=20, base_size=base, size_multiple=multiple, num_images=10000, batch_size=100)
    assert sizes(plan) == expected
    assert plan.base_size == base
    if plan.curriculum.clock == "compute":
        assert abs(cost(plan) - 2000) <= 1


def test_merged_stages_keep_their_share_of_the_clock():
    plan = build_plan("efficienttrain", epochs=100, base_size=64, num_images=1000, batch_size=10)
    assert [stage.passes for stage in plan.stages] == [80.0, 20.0]


def test_linear_schedule_costs_what_efficienttrain_costs():
    """ICCV Table 13(c) compares the two at equal cost."""
    linear = build_plan("efficienttrain-linear", epochs=300, **IMAGENET)
    assert sizes(linear) == sorted(set(sizes(linear))) and sizes(linear)[-1] == 224
    assert all(b - a == 16 for a, b in itertools.pairwise(sizes(linear)))
    stepped = build_plan("efficienttrain", epochs=300, **IMAGENET)
    assert cost(linear) == pytest.approx(cost(stepped), rel=5e-3)
    assert linear.total_steps == stepped.total_steps == 300 * 312


def test_custom_stages():
    mapping = {
        "name": "mine",
        "clock": "epochs",
        "base_size": 128,
        "operator": "bicubic",
        "magnitude": "steps",
        "magnitude_steps": [1, 2],
        "stages": [{"until": 0.5, "input_size": 64}, {"until": 1.0, "input_size": 128}],
    }
    plan = build_plan(mapping, epochs=4, base_size=128, num_images=100, batch_size=10)
    assert [(r.input_size, r.magnitude) for r in plan] == [(64, 1.0), (64, 1.0), (128, 2.0), (128, 2.0)]
    assert plan.operator == "bicubic"
    # The same for another base size, in proportion; and as an object.
    assert sizes(build_plan(mapping, epochs=4, base_size=256, num_images=100, batch_size=10)) == [128, 256]
    curriculum = Curriculum("mine", "epochs", ((0.25, 64), (1.0, 128)), base_size=128)
    plan = build_plan(curriculum, epochs=4, base_size=128, num_images=100, batch_size=10, operator="nearest")
    assert [stage.passes for stage in plan.stages] == [1.0, 3.0]
    assert plan.operator == "nearest"


def test_a_curriculum_may_return_to_a_size():
    stages = [{"until": u, "input_size": s} for u, s in ((0.25, 128), (0.5, 64), (1, 128))]
    plan = build_plan(
        {"clock": "compute", "base_size": 128, "stages": stages}, epochs=8, base_size=128, num_images=100, batch_size=10
    )
    assert sizes(plan) == [128, 64, 128]
    assert [stage.passes for stage in plan.stages] == [2.0, 8.0, 4.0]


def test_warmup_in_each_unit():
    def warm(warmup, preset="efficienttrain++"):
        return build_plan(preset, epochs=200, warmup=warmup, **IMAGENET).warmup_progress

    assert warm("20%") == pytest.approx(0.2)
    assert warm(3.7) == warm("3.7") == warm("3.7 epochs") == pytest.approx(3.7 / 200)
    # The release's 20 passes are 3.7 equivalent epochs at 96 pixels and 10.2 at 160.
    assert 200 * warm("20 passes") == pytest.approx(20 * (96 / 224) ** 2, rel=1e-3) == pytest.approx(3.67, abs=0.01)
    assert 200 * warm("20 passes", "efficienttrain++-convnext") == pytest.approx(10.2, abs=0.01)
    assert warm("6240 steps") == pytest.approx(warm("20 passes"))
    assert warm("20 passes", "none") == warm("20", "none") == pytest.approx(0.1)
    assert warm(0) == 0.0
    # A warm-up longer than the first stage.
    plan = build_plan("efficienttrain++", epochs=200, warmup="300 passes", **IMAGENET)
    expected = 40 + (300 - plan.stages[0].passes) * (160 / 224) ** 2
    assert 200 * plan.warmup_progress == pytest.approx(expected, rel=1e-3)


def test_early_large_batch():
    usual = build_plan("efficienttrain++", epochs=50, **IMAGENET)
    for rule, power in (("sqrt", 0.5), ("linear", 1.0)):
        plan = build_plan("efficienttrain++", epochs=50, early_large_batch=True, lr_rule=rule, **IMAGENET)
        assert [stage.batch_size for stage in plan.stages] == [16384, 8192, 4096]  # 5.4 -> 4, 1.96 -> 2, 1
        assert abs(cost(plan) - 50 * 312) <= 4  # to one step, here of 4 batches at a fifth of the pixels
        for stage, other in zip(plan.stages, usual.stages):
            assert stage.passes == pytest.approx(other.passes, rel=0.01)
            middle, other_middle = (s.first_step + s.steps // 2 for s in (stage, other))
            ratio = plan.lr_at(middle) / usual.lr_at(other_middle)
            assert ratio == pytest.approx((stage.batch_size / 4096) ** power, rel=0.02)


def test_durations():
    assert parse_duration("3.7") == parse_duration(3.7) == (3.7, "epochs")
    assert parse_duration("20 passes") == (20, "passes") and parse_duration("1 pass") == (1, "passes")
    assert parse_duration("20%") == parse_duration(" 20 % ") == (20, "%")
    assert parse_duration("500 steps") == parse_duration("500steps") == (500, "steps")
    assert parse_duration("1e3 steps") == (1000, "steps")
    for wrong in ("", "often", "5 parsecs", "-1", "20 %%", ".", "1.2.3", "passes", "nan", "inf"):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            parse_duration(wrong)


@pytest.mark.parametrize(
    "duration", ["1 steps", "7 steps", "1", "0.3", "1 passes", "0.37 passes", "5%", "33.3%", "100%"]
)
def test_due_as_often_as_it_says(duration):
    plan = build_plan("efficienttrain++", epochs=4, num_images=200, batch_size=10)
    value, unit = parse_duration(duration)
    times = [step for step in range(1, plan.total_steps + 1) if plan.due(duration, step)]
    total = {"steps": plan.total_steps, "epochs": 4, "%": 100, "passes": sum(s.passes for s in plan.stages)}[unit]
    most = min(math.floor(total / value + 1e-6), plan.total_steps)
    assert len(times) == most
    gaps = [plan.measure(b, unit) - plan.measure(a, unit) for a, b in itertools.pairwise([0, *times])]
    longest_step = max(plan.measure(s + 1, unit) - plan.measure(s, unit) for s in range(plan.total_steps))
    assert all(abs(gap - value) <= longest_step + 1e-9 for gap in gaps)
    for record in plan:  # over a stretch: due if it is due at any of its steps
        end = record.first_step + record.steps
        inside = any(record.first_step < time <= end for time in times)
        assert plan.due(duration, end, since=record.first_step) == inside


def test_never_due():
    plan = build_plan("none", epochs=2, num_images=100, batch_size=10)
    assert not any(plan.due("0", step) for step in range(1, plan.total_steps + 1))


def test_measures_end_at_the_whole():
    plan = build_plan("efficienttrain++", epochs=2.5, num_images=500, batch_size=10)
    end = plan.total_steps
    assert plan.measure(end, "steps") == end
    assert plan.measure(end, "%") == 100
    assert plan.measure(end, "epochs") == 2.5
    assert plan.measure(end, "passes") == pytest.approx(sum(stage.passes for stage in plan.stages))
    assert [plan.measure(0, unit) for unit in ("steps", "%", "epochs", "passes")] == [0, 0, 0, 0]


def test_plan_is_immutable_and_pure():
    settings = {"epochs": 3, "num_images": 300, "batch_size": 10}
    plan = build_plan("efficienttrain++", **settings)
    assert plan == build_plan("efficienttrain++", **settings)
    assert plan != build_plan("efficienttrain++", **{**settings, "epochs": 4})
    with pytest.raises(AttributeError):
        plan.epochs = 5
    with pytest.raises(AttributeError):
        plan.records[0].input_size = 5


WRONG = [
    ({"epochs": 0.01}, "`epochs` 0.01 is too short.*96"),
    ({"epochs": 0}, "`epochs` is 0"),
    ({"epochs": -3}, "`epochs` is -3"),
    ({"epochs": math.nan}, "`epochs` is nan"),
    ({"epochs": math.inf}, "`epochs` is inf"),
    ({"batch_size": 2000}, "1000 images but `batch_size` is 2000"),
    ({"batch_size": 0}, "`batch_size` is 0"),
    ({"base_size": 0}, "`base_size` is 0"),
    ({"lr": -1.0}, "`lr` is -1"),
    ({"max_magnitude": 11}, "`max_magnitude` is 11"),
    ({"lr_rule": "cube"}, "`lr_rule` is 'cube'"),
    ({"warmup": "10 parsecs"}, "10 parsecs"),
    ({"warmup": "100%"}, "`warmup` 100%"),
    ({"warmup": 10}, "`warmup` 10 is not shorter"),
    ({"warmup": "99999 steps"}, "`warmup` 99999 steps"),
    ({"warmup": "9999 passes"}, "`warmup` 9999 passes"),
    ({"operator": "wavelet"}, "operator is 'wavelet'.*lanczos"),
    ({"magnitude": "loud"}, "magnitude is 'loud'.*steps"),
    ({"curriculum": "efficienttrian"}, "'efficienttrian' is unknown.*efficienttrain[+][+]"),
    ({"curriculum": {"stages": []}}, "clock missing"),
    ({"curriculum": {"clock": "compute", "stages": [], "speed": 3}}, "unknown key 'speed'"),
    ({"curriculum": {"clock": "compute", "stages": []}}, "end at 1"),
    ({"curriculum": {"clock": "compute", "stages": [{"until": 1}]}}, "until: SHARE, input_size: PIXELS"),
    ({"curriculum": {"clock": "compute", "stages": [{"until": 0.5, "input_size": 64}]}}, "end at 1"),
    (
        {"curriculum": {"clock": "epochs", "stages": [{"until": u, "input_size": 64} for u in (0.5, 0.4, 1)]}},
        "must rise",
    ),
    ({"curriculum": {"clock": "epochs", "stages": [{"until": 1, "input_size": -64}]}}, "positive"),
    ({"curriculum": {"clock": "sundial", "stages": [{"until": 1, "input_size": 64}]}}, "clock is 'sundial'"),
    ({"curriculum": {"clock": "epochs", "stages": 7}}, "stages must be a list"),
    ({"curriculum": {"clock": "epochs", "base_size": "big", "stages": [{"until": 1, "input_size": 64}]}}, "base_size"),
    ({"curriculum": {"clock": "epochs", "base_size": 0, "stages": [{"until": 1, "input_size": 64}]}}, "base_size"),
    (
        {"curriculum": {"clock": "epochs", "magnitude_steps": [], "stages": [{"until": 1, "input_size": 64}]}},
        "magnitude_steps",
    ),
    (
        {"curriculum": {"clock": "epochs", "magnitude_steps": "a", "stages": [{"until": 1, "input_size": 64}]}},
        "magnitude_steps",
    ),
    ({"curriculum": {"clock": "epochs", "stages": [{"until": 1, "input_size": 448}]}}, "448"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_wrong_settings_are_named(change, message):
    settings = {"curriculum": "efficienttrain++", "epochs": 5, "num_images": 1000, "batch_size": 20, **change}
    with pytest.raises(ValueError, match=message):
        build_plan(settings.pop("curriculum"), **settings)


def test_summary_is_what_the_interface_says():
    plan = build_plan("efficienttrain++", epochs=200, **IMAGENET)
    summary = summarize(plan, 300, flops={96: 1, 160: 3, 224: 6}, params=10)
    assert {"curriculum", "base_size", "epochs", "num_images", "batch_size", "stages", "total"} <= set(summary)
    stage_keys = {"input_size", "passes", "steps", "images", "magnitude", "lr", "progress", "batch_size"}
    assert all(stage_keys <= set(stage) for stage in summary["stages"])
    total = summary["total"]
    assert set(total) >= (
        {"steps", "images", "passes", "equivalent_epochs", "speedup_pixels", "speedup_flops", "params", "flops"}
    )
    assert total["speedup_pixels"] == pytest.approx(1.5, abs=1e-3)
    spent = sum(stage.passes * {96: 1, 160: 3, 224: 6}[stage.input_size] for stage in plan.stages)
    assert total["speedup_flops"] == pytest.approx(300 * 6 / spent, rel=1e-6)
    assert (total["params"], total["flops"]) == (10, 6)
    assert total["images"] == plan.total_steps * 4096
    text = table(summary, 300)
    assert "1.50x by pixels" in text and len(text.splitlines()) == 8


def test_a_stage_may_filter_and_mix_less():
    """ICCV Table 2: the first half of training sees the disc of radius 60 alone; the radius scales with the base."""
    stages = [{"until": 0.5, "input_size": 224, "radius": 60}, {"until": 1, "input_size": 224}]
    mapping = {"clock": "epochs", "stages": stages}
    plan = build_plan(mapping, epochs=4, num_images=100, batch_size=10)
    assert [(s.input_size, s.radius, s.mixing, s.passes) for s in plan.stages] == [(224, 60, 1, 2), (224, None, 1, 2)]
    assert [epoch.radius for epoch in plan] == [60, 60, None, None]
    half = build_plan(mapping, epochs=4, base_size=112, num_images=100, batch_size=10)
    assert [epoch.radius for epoch in half] == [30, 30, None, None]
    same = [{**stage, "radius": 60, "mixing": 0.5} for stage in stages]
    assert len(build_plan({**mapping, "stages": same}, epochs=4, num_images=100, batch_size=10).stages) == 1
    for bad, words in (({"radius": -1}, "radius is -1"), ({"mixing": 1.5}, "mixing is 1.5"), ({"size": 1}, "mixing")):
        with pytest.raises(ValueError, match=words):
            build_plan(
                {**mapping, "stages": [{**stages[0], **bad}, stages[1]]}, epochs=4, num_images=100, batch_size=10
            )


def test_sizes_of_ones_own_curriculum_stay_as_they_are_at_its_base():
    mapping = {"clock": "compute", "base_size": 64, "stages": [{"until": u, "input_size": s} for u, s in STAGES]}
    own = build_plan(mapping, epochs=9, base_size=64, num_images=1000, batch_size=10)
    assert sizes(own) == [24, 40, 64]
    assert sizes(build_plan(mapping, epochs=9, base_size=128, num_images=1000, batch_size=10)) == [48, 80, 128]


STAGES = ((0.2, 24), (0.6, 40), (1.0, 64))


def test_progressive_learning_raises_all_three():
    plan = build_plan("progressive", epochs=8, **IMAGENET)
    seen = [(e.input_size, e.magnitude, round(e.mixing, 3)) for e in plan]
    assert seen[::2] == [(128, 3, 0), (160, 5, 0.333), (192, 7, 0.667), (224, 9, 1)]
    assert plan.operator == "bicubic" and cost(plan) / plan.total_steps == pytest.approx(0.643, abs=1e-3)


def test_first_step_after_a_duration():
    plan = build_plan("efficienttrain++", epochs=10, num_images=1000, batch_size=10)
    for duration in ("20%", "3.3", "7 passes", "77 steps"):
        step = plan.first_after(duration)
        value, unit = parse_duration(duration)
        assert plan.measure(step, unit) >= value - 1e-9 > plan.measure(step - 1, unit)
    assert plan.first_after("77 steps") == 77 and plan.first_after("0%") == 0
    assert plan.first_after("200%") == plan.first_after("1e9 steps") == plan.total_steps


# -- detection and segmentation: step and polynomial schedules, budgets in steps ---------------------------------------


def dense_plan(**options):
    options = {"num_images": 117266, "batch_size": 16, "base_size": 800, "lr": 1e-4, "min_lr": 0.0, **options}
    return build_plan("none", **options)


def test_budgets_in_steps_are_met_to_the_step():
    assert dense_plan(epochs="87960 steps").total_steps == 87960
    for steps in (80000, 160000):
        assert dense_plan(epochs=f"{steps} steps", num_images=20210).total_steps == steps
    assert dense_plan(epochs=12).total_steps == 12 * (117266 // 16)
    with pytest.raises(ValueError, match=r"`epochs` is '20%'; write a number of epochs, or e\.g\. 160000 steps"):
        dense_plan(epochs="20%")


def test_step_schedule_falls_to_a_tenth_where_it_should_after_a_linear_warmup():
    drops = ["58640 steps", "80630 steps"]  # epochs 8 and 11 of 12, of 7,330 steps each
    plan = dense_plan(epochs="87960 steps", schedule="steps", lr_steps=drops, warmup="500 steps")
    for step in (0, 1, 250, 499, 500, 7000, 58639, 58640, 80629, 80630, 87959):
        expected = 1e-4 * min(1, step / 500) * 0.1 ** ((step >= 58640) + (step >= 80630))
        assert plan.lr_at(step) == pytest.approx(expected, rel=1e-9), step
    assert dense_plan(epochs=12, schedule="steps", lr_steps=(8, 11)).lr_at(8 * 7329) == pytest.approx(1e-5)


def test_poly_schedule_is_mmsegmentations_with_warmup_as_a_factor():
    plan = dense_plan(epochs="160000 steps", num_images=20210, lr=6e-5, schedule="poly", warmup="1500 steps")
    for step in (1, 700, 1499, 1500, 80000, 159999):
        # mmcv's warm-up: (1 - (1 - step / 1500) (1 - ratio)) of the regular rate, of which the ratio is 1e-6.
        warm = 1 - (1 - min(1, step / 1500)) * (1 - 1e-6)
        assert plan.lr_at(step) == pytest.approx(6e-5 * (1 - step / 160000) * warm, rel=2e-3 if step == 1 else 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 40])
def test_steps_given_as_shares_fit_a_run_of_any_length(steps):
    options = {"num_images": 320, "batch_size": 8, "base_size": 64, "epochs": f"{steps} steps", "lr": 1.0, "warmup": 0}
    plan = build_plan("none", **options, schedule="steps", lr_steps=("67%", "92%"))
    lrs = [plan.lr_at(step) for step in range(plan.total_steps)]
    assert plan.total_steps == steps and lrs[0] == 1 and lrs == sorted(lrs, reverse=True)
    assert steps < 40 or (lrs[26], lrs[27], lrs[36], lrs[37]) == (1, 0.1, 0.1, pytest.approx(0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "exp"}, "`schedule` is 'exp'; choose cosine, steps, poly"),
        ({"schedule": "steps"}, "`schedule` steps needs `lr_steps`"),
        ({"lr_steps": (8,)}, "`lr_steps` is for the schedule steps"),
        ({"schedule": "steps", "lr_steps": (8, 13)}, "`lr_steps` 8 13: they must rise, within the run of 12 epochs"),
        ({"schedule": "steps", "lr_steps": (11, 8)}, "`lr_steps` 11 8: they must rise"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dense_plan(epochs=12, **options)


def test_dense_curriculum_spends_three_tenths_of_the_compute_at_half_and_at_three_quarters():
    plan = build_plan("dense-experimental", epochs=12, num_images=8000, batch_size=16, base_size=800, size_multiple=32)
    assert sizes(plan) == [416, 608, 800]
    for stage, share in zip(plan.stages, (0.3, 0.3, 0.4)):
        assert stage.steps * (stage.input_size / 800) ** 2 / (12 * 500) == pytest.approx(share, abs=1e-3)
