"""scripts/results.py on made-up finished runs: grouping, comparison, speed-ups, files and complaints."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT, script

from config import Config
from utils import duration_text

results = script("results")


@pytest.fixture
def make(tmp_path):
    """``make("name", top1, seconds, ...)`` writes what a run leaves behind."""

    def call(
        name, top1, seconds, curriculum="efficienttrain++", speedup=1.52, progress=1.0, devices="8 x H100", **settings
    ):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        settings = {"model": "swin_tiny", "curriculum": curriculum, "output_dir": str(path), **settings}
        config = json.loads(json.dumps(asdict(Config(**settings))))
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        of_stage = {"input_size": 224, "passes": 1.0, "steps": 3, "images": 24, "magnitude": [0.0, 9.0]}
        of_stage |= {"batch_size": 8, "compute": 1.0, "forward_passes": None, "forward_batch": None}
        stages = [of_stage] * (1 if curriculum == "none" else 3)
        total = {"speedup_flops": speedup, "speedup_pixels": 1.5, "equivalent_epochs": 200.0}
        total |= {"steps": 9, "params": None, "flops": None}
        plan = {"curriculum": curriculum, "base_size": 224, "epochs": 200, "stages": stages, "total": total}
        (path / "plan.json").write_text(json.dumps(plan))
        record = {"step": 9, "progress": progress, "seconds": seconds / 2, "test_acc1": top1, "epoch": 1, "images": 8}
        record |= {"equivalent_epochs": 1.0, "train_loss": 1.0, "images_per_s": 10.0}
        (path / "log.txt").write_text("".join(json.dumps(r) + "\n" for r in ({**record, "progress": 0.5}, record)))
        (path / "environment.json").write_text(json.dumps({"devices": devices}))
        return path

    return call


def lines_of(*paths):
    papers = json.loads((ROOT / "recipes" / "papers.json").read_text())
    return results.collect(results.find_runs(paths), papers)


def test_seeds_are_one_line_beside_the_papers(make):
    for seed, top1 in enumerate((81.4, 81.6, 81.8)):
        root = make(f"s{seed}", top1, 3600, seed=seed, rows=["pp.t7.swin_tiny", "pp.f7.swin_tiny.200"]).parent
    make("other", 70.0, 3600, lr=1e-3)
    make("base/0", 81.3, 5400, "none", 1.0, rows=["pp.t7.swin_tiny.baseline"])
    make("base/elsewhere", 81.3, 90000, "none", 1.0, seed=1, devices="1 x CPU", rows=["pp.t7.swin_tiny.baseline"])
    table = {line["row"]: line for line in lines_of(root)}
    line = table["pp.t7.swin_tiny"]
    assert (line["table"], line["runs"], line["top-1"]) == ("++ Table 7", "3", "81.60 +- 0.20")
    assert (line["theirs"], line["difference"]) == ("81.6", "+0.00")
    assert (line["less compute"], line["theirs "]) == ("1.52x", "1.51x")
    assert (line["less time"], line["theirs  "]) == ("1.50 +- 0.00x", "1.49x")  # against the run on as many devices
    assert line["training time"] == "1:00:00"
    assert table["pp.f7.swin_tiny.200"]["table"] == "++ Fig. 7"
    assert table["pp.t7.swin_tiny.baseline"]["runs"] == "2" and table["pp.t7.swin_tiny.baseline"]["less time"] == ""
    assert (table[""]["table"], table[""]["theirs"], table[""]["difference"]) == ("Other runs", "", "")


def test_the_average_counts_where_there_is_one_and_fine_tuning_for_pre_training(make):
    path = make("a", 80.0, 60, rows=["iccv.t7.cswin_base"])
    log = path / "log.txt"
    log.write_text(log.read_text().replace('"test_acc1": 80.0', '"test_acc1": 80.0, "test_acc1_ema": 82.5'))
    (line,) = lines_of(path)
    assert line["top-1"] == "82.50" and line["theirs"] == ""  # 85.6 is the accuracy after fine-tuning
    tuned = make("b", 85.5, 60, "none", rows=["iccv.t7.cswin_base"], finetune="weights.pth")
    (line,) = lines_of(tuned)
    assert (line["theirs"], line["difference"]) == ("85.6", "-0.10")


def test_files(make, tmp_path, capsys):
    make("one", 80.5, 60, rows=["pp.t7.swin_tiny"])
    make("unfinished", 10.0, 60, progress=0.7)
    assert results.main([str(tmp_path / "runs"), "--output", str(tmp_path / "an out")]) == 0
    printed = capsys.readouterr()
    assert "unfinished: not finished" in printed.err
    assert printed.out.startswith((tmp_path / "an out" / "results.md").read_text() + "\n")
    assert "## ++ Table 7" in printed.out and "| pp.t7.swin_tiny | swin_tiny |" in printed.out
    (row,) = csv.DictReader((tmp_path / "an out" / "results.csv").open())
    assert (row["top-1"], row["top-1, theirs"], row["less compute, theirs"]) == ("80.50", "81.6", "1.51x")
    for name in ("compute", "time"):
        drawn = (tmp_path / "an out" / f"{name}.svg").read_text()
        ElementTree.fromstring(drawn)
        assert "swin_tiny efficienttrain++" in drawn and f"Accuracy against {name}" in drawn
        assert (tmp_path / "an out" / f"{name}.png").stat().st_size > 1000


def test_nothing_to_collect(make, tmp_path, capsys):
    assert results.main([str(tmp_path)]) == 1 and "holds no run" in capsys.readouterr().err
    make("unfinished", 10.0, 60, progress=0.7)
    assert results.main([str(tmp_path)]) == 1 and "no run is finished" in capsys.readouterr().err


def test_a_real_run(train, capsys):
    """Its line says what its own files say."""
    run = train(epochs=1)
    assert results.main([str(run.output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in printed[-1 if printed[-1] else -2].strip("|").split("|")]
    log, total = run.log(), json.loads((run.output / "plan.json").read_text())["total"]
    assert cells[:6] == ["", "tests.tiny_models:convnet", "efficienttrain++", "1", "1", f"{log[-1]['test_acc1']:.2f}"]
    assert f"{total['speedup_flops'] or total['speedup_pixels']:.2f}x" in cells
    assert cells[-1] == duration_text(sum(record["seconds"] for record in log))


def test_runs_of_several_labels_are_judged_by_their_map(make):
    path = make("several", 50.0, 60, task="multilabel")
    log = path / "log.txt"
    log.write_text(log.read_text().replace("test_acc1", "test_map"))
    (line,) = lines_of(path)
    assert line["top-1"] == "50.00"


@pytest.mark.parametrize(
    "other", [{"labels": "/x/b.csv"}, {"class_map": "/x/m.txt"}, {"val_share": "10%"}, {"images": 48}]
)
def test_runs_on_other_data_are_not_repetitions(make, other):
    make("a", 80.0, 60, labels="/here/a.csv")
    make("b", 81.0, 60, labels="/elsewhere/a.csv", seed=1)
    images = other.pop("images", None)
    path = make("c", 20.0, 60, **{"labels": "/here/a.csv", **other})
    if images:
        plan = json.loads((path / "plan.json").read_text())
        plan["stages"][0]["images"] = images
        (path / "plan.json").write_text(json.dumps(plan))
    lines = lines_of(path.parent)
    assert sorted((line["runs"], line["top-1"]) for line in lines) == [("1", "20.00"), ("2", "80.50 +- 0.71")]
