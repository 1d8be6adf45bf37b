"""scripts/demo.py: one arm trained for real, the table and the picture from known numbers."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import demo
from demo_data import build


@pytest.fixture
def known():
    """Results of two seeds: accuracy 60 + 5 log2(share) of ordinary training, of the others at 1/2, 1/3, 1/4 of it."""
    save = {"ordinary": 1, "muon": 2, "etpp": 3, "fast": 4}
    rows = {}
    for arm in demo.ARMS:
        top = 60 + 5 * math.log2(arm.share * save[arm.name.split("-")[0]])
        cost = {"compute": arm.share, "seconds": 100 * arm.share**0.5, "images": 2200}
        rows[arm.name] = [{"accuracy": top + noise, **cost} for noise in (-1, 1)]
    return rows


@pytest.mark.parametrize("kind", ["fast", "muon"])
def test_an_arm_trains_the_recipe_on_the_photographs(kind, tmp_path):
    build(tmp_path / "data", seed=0, train=4, val=2)
    demo.train(demo.Arm("short", *demo.LABELS[kind], 1 / 2), 6, tmp_path / "data", tmp_path / "out", seed=0)
    row = demo.result(tmp_path / "out")
    assert 0.3 < row["compute"] < 0.55 and 0 <= row["accuracy"] <= 100 and row["seconds"] > 0 and row["images"] == 44


def test_table_gives_mean_spread_and_speed_up(known):
    lines = demo.table(known).splitlines()
    assert len(lines) == 1 + len(demo.ARMS)
    assert "60.0 +- 1.4 %" in lines[1] and lines[1].endswith("1.00x")
    half = lines[2].split()
    assert half[:6] == ["ordinary,", "AdamW", "0.50", "55.0", "+-", "1.4"] and half[-1] == "1.41x"


def test_factors_are_those_that_the_results_were_made_of(known):
    one = {name: rows[1:] for name, rows in known.items()}
    etpp, fast, same = demo.factors(one)
    assert "61.0 % of ordinary, AdamW: EfficientTrain++, AdamW takes > 2.00 x less" in etpp  # no budget so small
    assert "fast recipe takes 4.00 x less compute and 2.00 x less training time" in fast
    assert "of ordinary, Muon: fast recipe takes 2.00 x less compute" in same
    assert "4.00 (" in demo.factors(known)[1]  # with an interval


def test_one_seed_has_no_spread(known):
    one = {name: rows[:1] for name, rows in known.items()}
    assert "+-" not in demo.table(one)
    assert demo.half_width(one, "ordinary, AdamW")[-1] == pytest.approx(196 * (0.59 * 0.41 / 2200) ** 0.5)


def test_picture_is_drawn(known, tmp_path):
    demo.draw(known, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
