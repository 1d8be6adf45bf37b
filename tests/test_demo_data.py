"""The demo's image set: disjoint regions, determinism, refusal to overwrite."""

import hashlib
import random
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import demo_data


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "set"
    counts = demo_data.build(out, seed=0, train=2, val=1)
    return out, counts


def test_the_set_is_two_folders_of_the_same_classes(built):
    out, counts = built
    train = {folder.name: list(folder.iterdir()) for folder in (out / "train").iterdir()}
    val = {folder.name: list(folder.iterdir()) for folder in (out / "val").iterdir()}
    assert train.keys() == val.keys()
    assert len(train) == counts["classes"] >= 10
    assert {len(files) for files in train.values()} == {2}
    assert {len(files) for files in val.values()} == {1}
    for path in out.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert min(image.size) == demo_data.SHORT_SIDE
            assert max(image.size) <= demo_data.SHORT_SIDE * 4 / 3 + 1
            assert np.asarray(image).std() > 1


def test_the_same_seed_gives_the_same_files_and_another_one_others(built, tmp_path):
    random.seed(1)  # no global generator matters
    demo_data.build(tmp_path / "again", seed=0, train=2, val=1)
    assert digest(tmp_path / "again") == digest(built[0])
    demo_data.build(tmp_path / "other", seed=1, train=2, val=1)
    same = digest(tmp_path / "other").items() & digest(built[0]).items()
    assert not same


def test_bands_share_no_pixel_and_cells_neither():
    def overlap(a, b):
        return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])

    for photo in demo_data.PHOTOS:
        width, height = demo_data.load(photo).size
        boxes = [box for _, cell in demo_data.cells(photo) for box in demo_data.bands(cell)]
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
        assert sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) == width * height
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3))  # the check can fail


@pytest.mark.parametrize("place", [(60, 40, 140, 200), (0, 0, 77, 191), (100, 150, 330, 230)])
def test_rectangles_stay_inside_their_band(place):
    image = Image.new("RGB", (400, 300), (255, 0, 0))
    image.paste((0, 255, 0), place)
    rng = random.Random(0)
    for _ in range(200):
        pixels = np.asarray(demo_data.rectangle(image, place, rng))
        assert pixels[..., 0].max() == 0  # nothing of the outside
        assert pixels[..., 1].min() > 250  # nor of the black corners that turning makes
    wider = (place[0], place[1], place[2] + 60, place[3])
    assert any(np.asarray(demo_data.rectangle(image, wider, rng))[..., 0].max() > 0 for _ in range(200))


def test_training_and_validation_use_alternate_bands(monkeypatch, tmp_path):
    used = {}

    def record(image, places, rng):
        used.setdefault((image.size, tuple(places)), 0)
        return Image.new("RGB", (88, 88))

    monkeypatch.setattr(demo_data, "PHOTOS", {"brick.png": (1, 1)})
    monkeypatch.setattr(demo_data, "sample", record)
    demo_data.build(tmp_path / "set", seed=0, train=1, val=1)
    train, val = (places for _, places in used)
    assert sorted(train + val) == demo_data.bands(demo_data.cells("brick.png")[0][1])
    assert len(train) == 3 and len(val) == 2
    ordered = sorted(train + val)
    assert all((a in train) != (b in train) for a, b in pairwise(ordered))


def test_a_finished_set_is_kept_and_anything_else_is_not_touched(built, tmp_path):
    out, _ = built
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    demo_data.build(out, seed=0, train=2, val=1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(FileExistsError, match="already holds something else"):
        demo_data.build(out, seed=5, train=2, val=1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_interrupted_build_leaves_nothing(monkeypatch, tmp_path):
    calls = iter(range(3))
    real = demo_data.sample

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(demo_data, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_data.build(tmp_path / "set", seed=0, train=2, val=1)
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.setattr(sys, "argv", ["demo_data.py", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        demo_data.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} already holds something else")
    monkeypatch.setattr(demo_data, "find_spec", lambda name: None)
    demo_data.load.cache_clear()
    monkeypatch.setattr(sys, "argv", ["demo_data.py", str(tmp_path / "new")])
    with pytest.raises(SystemExit):
        demo_data.main()
    assert "pip install scikit-image" in capsys.readouterr().err
