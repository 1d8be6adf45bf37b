"""What --plan says of devices, costs and time, and its picture."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT

import main
from curriculum import CurriculumSampler, build_plan, summarize, table
from training.charts import Series, chart, number, ticks

PLAN = build_plan("efficienttrain++", epochs=200, num_images=1281167, batch_size=4096)
FLOPS = {96: 0.8e9, 160: 2.25e9, 224: 4.5e9}
RECIPE = str(ROOT / "recipes/in1k/resnet50_etpp200.yaml")


def test_sharing_over_devices():
    summary = summarize(PLAN, 300, FLOPS, 10, CurriculumSampler(PLAN, micro_batch=128, world_size=8))
    assert (summary["devices"], summary["micro_batch"]) == (8, 128)
    rows = [(s["images_per_device"], s["forward_passes"], s["forward_batch"]) for s in summary["stages"]]
    assert rows == [(512, 1, 512), (512, 4, 128), (512, 4, 128)]  # (224/160)^2 is 1.96: not yet two groups
    assert sum(stage["compute"] for stage in summary["stages"]) == pytest.approx(1)
    assert summary["stages"][0]["cost"] == pytest.approx(0.8 / 4.5)
    assert summary["stages"][0]["loader"] == pytest.approx(4.5 / 0.8)
    text = table(summary, 300)
    assert "1 of 512 images" in text and "4 of 128 images" in text and "5.6x" in text and "hours" not in text


def test_unequal_shares_cost_time():
    sampler = CurriculumSampler(PLAN, micro_batch=512, world_size=3)
    even = CurriculumSampler(PLAN, micro_batch=512, world_size=4)
    speeds = {96: 2000.0, 160: 800.0, 224: 400.0}
    three, four = (summarize(PLAN, 300, FLOPS, 10, one, speeds) for one in (sampler, even))
    assert three["stages"][0]["groups"] == [3, 3, 2] and three["stages"][0]["images_per_device"] == 3 * 512
    assert three["stages"][0]["idle"] == pytest.approx(1 / 9) and four["stages"][0]["idle"] == 0
    # Of 8 groups the slowest takes 3 instead of 2.
    assert three["total"]["seconds"] == pytest.approx(1.5 * four["total"]["seconds"])
    assert three["stages"][0]["images_per_s"] == pytest.approx(2000 * 8 / 3)
    assert "8 groups over 3 devices: 3+3+2, 11 % of the time idle" in table(three).splitlines()
    assert "idle" not in table(four)


def test_forward_batch_caps_the_passes():
    sampler = CurriculumSampler(PLAN, micro_batch=128, forward_batch={160: 256, 96: 200}, world_size=8)
    stages = summarize(PLAN, 300, FLOPS, 10, sampler)["stages"]
    assert [stage["forward_batch"] for stage in stages] == [128, 256, 128]
    assert [stage["forward_passes"] for stage in stages] == [4, 2, 4]


def test_measured_speeds_give_time():
    speeds = {96: 2000.0, 160: 800.0, 224: 400.0}
    sampler = CurriculumSampler(PLAN, micro_batch=128, world_size=8)
    summary = summarize(PLAN, 300, FLOPS, 10, sampler, speeds)
    seconds = sum(stage["images"] / speeds[stage["input_size"]] / 8 for stage in summary["stages"])
    assert summary["total"]["seconds"] == pytest.approx(seconds)
    assert summary["total"]["device_hours"] == pytest.approx(8 * seconds / 3600)
    assert summary["stages"][0]["images_per_s"] == 16000
    assert f"{seconds / 3600:.2f} hours" in table(summary, 300)
    with pytest.raises(ValueError, match="no speed for input size 160"):
        summarize(PLAN, 300, FLOPS, 10, sampler, {96: 2000.0, 224: 400.0})


def test_command_line_json_and_speeds(tmp_path, capsys, monkeypatch):
    speeds = tmp_path / "speeds.json"
    speeds.write_text(json.dumps({"images_per_s": {"96": 4000, "160": 1500, "224": 800}}))
    arguments = ["--recipe", RECIPE, "--model", "test_convnext", "--devices", "16", "--micro_batch", "256"]
    assert main.main([*arguments, "--plan", "json", "--speeds", str(speeds)]) == 0
    line = capsys.readouterr().out
    summary = json.loads(line)
    assert line.count("\n") == 1 and summary["devices"] == 16
    assert summary["total"]["device_hours"] == pytest.approx(16 * summary["total"]["seconds"] / 3600)
    assert main.main([*arguments, "--plan", "table", "--speeds", RECIPE]) == 2
    assert 'must be a file like {"images_per_s"' in capsys.readouterr().err
    assert main.main([*arguments[:4], "--devices", "24", "--plan", "table"]) == 2
    assert "8 groups of --batch_size 4096, fewer than 24 processes; 64 would serve" in capsys.readouterr().err
    assert main.main([*arguments[:4], "--devices", "24", "--micro_batch", "64", "--plan", "table"]) == 0
    assert "64 groups over 24 devices: 16 x 3 + 8 x 2, 11 % of the time idle" in capsys.readouterr().out
    assert main.main([*arguments[:4], "--micro_batch", "auto", "--plan", "table"]) == 0
    assert "forward passes" not in capsys.readouterr().out  # they are found when training starts
    monkeypatch.setenv("RANK", "1")  # under torchrun, one process speaks
    assert main.main([*arguments, "--plan", "json"]) == 0
    assert capsys.readouterr().out == ""


def test_early_large_batch_keeps_devices_busy(capsys):
    # 64 devices: 64 images each at 96 pixels with the fixed batch, four times as many with the large one.
    fixed, large = (
        build_plan("efficienttrain++", epochs=60, num_images=13_000_000, batch_size=4096, lr=8e-3, early_large_batch=on)
        for on in (False, True)
    )
    assert [stage.batch_size for stage in large.stages] == [16384, 8192, 4096]
    for plan, images in ((fixed, [64, 64, 64]), (large, [256, 128, 64])):
        summary = summarize(plan, 120, FLOPS, 10, CurriculumSampler(plan, world_size=64))
        assert [stage["images_per_device"] for stage in summary["stages"]] == images
        assert summary["total"]["equivalent_epochs"] == pytest.approx(60, abs=0.01)
    step = large.stages[1].first_step + 10
    assert large.lr_at(step) == pytest.approx(
        2**0.5 * fixed.lr_at(2 * (step - large.stages[1].first_step) + fixed.stages[1].first_step), rel=1e-3
    )


def test_picture(tmp_path, capsys):
    assert (
        main.main(
            ["--recipe", RECIPE, "--model", "test_convnext", "--plan", "picture", "--output_dir", str(tmp_path / "a b")]
        )
        == 0
    )
    path = tmp_path / "a b" / "plan.svg"
    assert capsys.readouterr().out.strip() == str(path)
    root = ElementTree.fromstring(path.read_text())
    titles = [node.get("aria-label") for node in root.iter() if node.get("aria-label")]
    assert titles == ["Input size B", "RandAugment magnitude", "Learning rate"]
    points = [node.get("points").split() for node in root.iter() if node.tag.endswith("polyline")]
    # B's line: level, a jump up, level, a jump up, level; the vertical axis points down.
    heights = [float(point.split(",")[1]) for point in points[0]]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 3


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0), (0.0021, 0.0024), (-3, 250), (1e6, 5e6), (71.3, 71.3)])
def test_ticks_are_round_and_cover(low, high):
    values = ticks(low, high)
    assert values[0] <= low and values[-1] >= high and 2 <= len(values) <= 9
    assert all(len(number(value)) <= 7 for value in values)


def test_chart_survives_nothing_and_infinity_and_escapes():
    ElementTree.fromstring(chart("a < b & c", [Series("x", [])], "x", "y"))
    svg = chart(
        "t", [Series("a<b", [(0, 1), (1, float("inf")), (2, float("nan")), (3, 2)]), Series("c", [(0, 0)])], "x", "y"
    )
    root = ElementTree.fromstring(svg)
    assert "inf" not in svg and "nan" not in svg
    assert len([node for node in root.iter() if node.tag.endswith("circle")]) == 3
