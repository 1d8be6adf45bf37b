"""scripts/demo.py: one arm trained for real, the table and the picture from known numbers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import demo
from demo_data import build


@pytest.fixture
def known():
    """Results of two seeds, in which the curriculum at half the compute is as good as the full schedule."""
    rows = {
        arm.name: [{"accuracy": 60.0 + seed, "compute": arm.share, "seconds": 100 * arm.share} for seed in (0, 2)]
        for arm in demo.ARMS
    }
    rows["etpp-1of2"][0]["accuracy"] = 50.0
    return rows


def test_an_arm_trains_the_recipe_on_the_photographs(tmp_path):
    build(tmp_path / "data", seed=0, train=4, val=2)
    arm = demo.Arm("short", "EfficientTrain++", "efficienttrain++", "linear", 1 / 2)
    demo.train(arm, 6, tmp_path / "data", tmp_path / "out", seed=0)
    row = demo.result(tmp_path / "out")
    assert 0.3 < row["compute"] < 0.55 and 0 <= row["accuracy"] <= 100 and row["seconds"] > 0


def test_table_gives_mean_spread_and_speed_up(known):
    lines = demo.table(known).splitlines()
    assert len(lines) == 1 + len(demo.ARMS)
    half = lines[-1].split()
    assert half[:6] == ["EfficientTrain++", "0.50", "56.0", "+-", "8.5", "%"] and half[-1] == "2.00x"
    assert "61.0 +- 1.4 %" in lines[2] and lines[2].endswith("1.00x")


def test_one_seed_has_no_spread(known):
    assert "+-" not in demo.table({name: rows[:1] for name, rows in known.items()})


def test_picture_is_drawn(known, tmp_path):
    demo.draw(known, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
