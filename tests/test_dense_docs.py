"""docs/dense.md from start to end, its commands run in order on scenes made on the spot; the dense demo, cut short."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dense_data
from dense_data import CLASSES, scenes

from dense import export

# What a CPU can bear: a narrow body and head, small images, an optimizer step or four.
BODY = [
    "--model",
    "resnet18",
    "--model_args",
    '{"channels": [16, 16, 16, 16]}',
    "--device",
    "cpu",
    "--num_workers",
    "0",
]
REDUCED = {
    "own_detection": [
        *["--head_args", '{"channels": 16, "width": 32, "sampled": 16}', "--train_sides", "[96,128]"],
        *["--max_side", "160", "--test_side", "112", "--batch_size", "8", "--epochs", "4 steps", "--lr", "1e-3"],
    ],
    "own_segmentation": [
        *["--head_args", '{"width": 16, "auxiliary_width": 16}', "--crop", "64", "--test_side", "96"],
        *["--max_side", "200", "--batch_size", "8", "--epochs", "4 steps", "--lr", "1e-3"],
    ],
}


def commands(page):
    """The words of each command in the page's bash blocks; continued lines are joined."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense docs")
    (root / "recipes").symlink_to(ROOT / "recipes")
    for split, made in (("train", scenes(16)), ("val", scenes(4, seed=1))):
        content = dense_data.write_coco(root / "my_data", made, split)
        (root / f"my_data/annotations/instances_{split}.json").rename(root / f"my_data/annotations/{split}.json")
        assert len(content["images"]) == len(made)
        dense_data.write_masks(root / "my_scenes", made, split)
    (root / "new_photos").mkdir()
    for path in sorted((root / "my_data/val").iterdir())[:3]:
        shutil.copy(path, root / "new_photos")
    return root


def test_the_page_s_commands_lead_to_predictions(site, main_program, monkeypatch, capsys):
    monkeypatch.chdir(site)
    said = {}
    for words in commands("docs/dense.md"):
        if words[:3] == ["python", "-m", "dense.export"]:
            assert export.main(words[3:]) == 0 and (site / words[4]).stat().st_size > 10_000
            continue
        assert words[:2] == ["python", "main.py"], words
        arguments = words[2:]
        recipe = Path(arguments[1]).stem if arguments[0] == "--recipe" else None
        reduced = [*BODY, *REDUCED[recipe]] if recipe in REDUCED else []
        code = main_program([*arguments, *reduced])
        out = capsys.readouterr()
        assert code == 0, (words, out.err)
        said[" ".join(arguments)] = out.out
    detection, segmentation = (json.loads(text) for line, text in said.items() if "--eval" in line)
    log = [json.loads(line) for line in (site / "output/mine/log.txt").read_text().splitlines()]
    assert detection["images"] == segmentation["images"] == 4
    assert {"box_AP", "box_AP50", "mask_AP"} <= detection.keys() and set(detection["per_class"]) == set(CLASSES)
    assert detection["box_AP"] == pytest.approx(max(record.get("test_box_AP", 0) for record in log))
    assert 0 <= segmentation["mIoU"] <= 100 and set(segmentation["per_class"]) == {*CLASSES, "background"}
    predicted = json.loads((site / "predictions/predictions.json").read_text())
    assert [image["file_name"] for image in predicted["images"]] == [f"scene_{k:02d}.jpg" for k in range(3)]
    assert [category["name"] for category in predicted["categories"]] == list(CLASSES)
    for folder, pictures in (("predictions", 3), ("labels", 3)):
        assert len(list((site / folder / "pictures").iterdir())) == pictures
    assert sorted(path.name for path in (site / "labels").glob("*.png")) == [f"scene_{k:02d}.png" for k in range(3)]
    assert (site / "output/mine/report.html").stat().st_size > 10_000


@pytest.mark.parametrize("change, message", [("category_id", "annotation 100 of image 10"), ("bbox", "has no area")])
def test_a_bad_annotation_ends_a_run_before_it_starts(change, message, site, main_program, tmp_path, capsys):
    content = json.loads((site / "my_data/annotations/train.json").read_text())
    content["annotations"][0][change] = 77 if change == "category_id" else [5, 5, 0, 5]
    shutil.copytree(site / "my_data", tmp_path / "data")
    (tmp_path / "data/annotations/train.json").write_text(json.dumps(content))
    recipe = ["--recipe", str(ROOT / "recipes/dense/own_detection.yaml"), *BODY, *REDUCED["own_detection"]]
    run = [*recipe, "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    assert main_program(run) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line and "--max_bad 0.001 allows 0" in line and "bad_annotations.txt" in line
    assert not list((tmp_path / "out").glob("*.pth"))
    assert main_program([*run, "--max_bad", "0.05", "--epochs", "1 steps"]) == 0
    assert "warning: dropped 1 of" in capsys.readouterr().err
    assert len((tmp_path / "out/bad_annotations.txt").read_text().splitlines()) == 1


@pytest.mark.extended
def test_the_demo(tmp_path):
    """The whole script in a copy of the repository, each run cut to a few steps."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".git", ".venv", "data", "output", "tests"))
    done = subprocess.run(
        ["bash", "scripts/demo_dense.sh", "--epochs", "3 steps", "--device", "cpu"],
        cwd=tmp_path / "copy",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    output = tmp_path / "copy/output/demo_dense"
    for task in ("detection", "segmentation"):
        assert len(list((output / task / "predictions/pictures").glob("*.jpg"))) == 8
        assert (output / task / "report.html").is_file()
