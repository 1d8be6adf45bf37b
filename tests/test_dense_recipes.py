"""The recipes of the papers' COCO and ADE20K rows: settings, steps, sizes, and what their first lines say."""

import json
import re
from pathlib import Path

import pytest

from commands.plan import make_summary
from config import Config
from config.checks import check_settings
from config.command_line import parse_config
from training.build import make_plan

ROOT = Path(__file__).parents[1] / "recipes"
PAPERS = {row: want for row, want in json.loads((ROOT / "papers.json").read_text()).items() if "head" in want}
RECIPES = sorted(path.name for path in (ROOT / "dense").glob("*.yaml") if path.name.startswith(("coco_", "ade20k_")))
# M parameters and G multiply-adds: those published, or counted where no source prints them (DeiT-S's FLOPs).
COSTS = {
    ("retinanet", "swin_tiny"): (38.46, 247.6),
    ("cascade", "swin_tiny"): (85.63, 744.8),
    ("cascade", "swin_small"): (106.95, 836.8),
    ("cascade", "swin_base"): (144.98, 981.3),
    ("upernet", "deit_small"): (51.78, 359.2),
    ("upernet", "swin_tiny"): (59.94, 944.4),
    ("upernet", "swin_small"): (81.26, 1037.4),
    ("upernet", "swin_base"): (121.28, 1187.4),
}


def resolve(name: str) -> Config:
    return parse_config(["--recipe", str(ROOT / "dense" / name)])


def cost(name: str) -> tuple[float, float]:
    config = resolve(name)
    plan = make_plan(config, config.num_images, config.num_classes)
    total = make_summary(config, plan, config.num_classes, None)["total"]
    return round(total["params"] / 1e6, 2), round(total["flops"] / 1e9, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_settings_and_steps_are_the_rows(name):
    config = resolve(name)
    check_settings(config)
    plan = make_plan(config, config.num_images, config.num_classes)
    for row in config.rows or []:
        want = PAPERS[row]
        for key in ("batch_size", "lr", "weight_decay", "model", "head", "drop_path"):
            if key in want:
                assert getattr(config, key) == want[key], (row, key)
        assert plan.total_steps == want.get("steps", 87960)
        assert config.amp == ("fp16" if want["dataset"] == "COCO" else "none")
    if config.task == "detection":
        steps = plan.total_steps
        first, second = (1 / 12 * e for e in ((8, 11) if steps == 87960 else (9, 11)))
        lrs = [plan.lr_at(round(steps * share) + shift) / config.lr for share in (first, second) for shift in (-1, 0)]
        assert lrs == pytest.approx([1, 0.1, 0.1, 0.01])
        assert plan.lr_at(250) == pytest.approx(config.lr / 2)
    else:
        half = plan.total_steps // 2
        assert plan.lr_at(half) == pytest.approx(config.lr / 2) and plan.lr_at(750) < 0.51 * config.lr


def test_every_row_has_one_recipe_and_there_are_25():
    rows = [row for name in RECIPES for row in resolve(name).rows or []]
    assert sorted(rows) == sorted(PAPERS) and len(rows) == 25
    assert len(RECIPES) == 30  # five oracles with public figures, of no row


@pytest.mark.parametrize("pair", COSTS, ids="-".join)
def test_plans_print_the_parameters_and_flops_of_the_tables(pair):
    name = next(name for name in RECIPES if (resolve(name).head, resolve(name).model) == pair)
    assert cost(name) == COSTS[pair]


@pytest.mark.parametrize("name", RECIPES)
def test_first_lines_say_command_weights_row_and_expectation(name):
    text = (ROOT / "dense" / name).read_text()
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"bash scripts/train.sh recipes/dense/{name} --finetune WEIGHTS" in head
    assert "Expect: " in head and "Certain: " in head
    config = resolve(name)
    for row in config.rows or []:
        assert PAPERS[row]["table"] in head
        for figure in PAPERS[row]["metrics"].values():
            assert re.search(rf"\b{figure:g}", head), (row, figure)
        (weights,) = re.findall(r"recipes/in1k/\S+\.yaml", head)
        assert (ROOT.parent / weights).is_file() and config.model in weights
    assert max(map(len, text.splitlines())) <= 120
