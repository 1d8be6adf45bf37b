"""Images that cannot be used: named, recorded once, replaced the same way every time, refused beyond the budget."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from inputs.bad_files import FILE_NAME, BadFiles, budget, load
from inputs.decode import BadImage
from inputs.folder import FolderIndex
from inputs.transforms import EvalTransform, TrainTransform

COUNT = 40
TRAIN = TrainTransform(32, "lanczos", None)


def jpeg(k):
    file = io.BytesIO()
    noise = np.random.default_rng(k).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((48, 40)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path):
    """Two classes of images, of which five cannot be used, each for a reason of its own; and one that vanishes."""
    for k in range(COUNT):
        path = tmp_path / f"train/class{k % 2}/{k:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(k))
    (tmp_path / "train/class0/00.jpg").write_bytes(b"")
    (tmp_path / "train/class0/02.jpg").write_bytes(jpeg(2)[:400])
    (tmp_path / "train/class0/04.jpg").write_bytes(b"text, not pixels")
    (tmp_path / "train/class0/06.jpg").write_bytes(jpeg(6)[:200] + bytes(300))
    index = FolderIndex(tmp_path / "train")
    os.remove(tmp_path / "train/class0/08.jpg")
    return index


BAD = {0, 1, 2, 3, 4}  # by index: the first five of class 0


class Samples(Dataset):
    def __init__(self, source, bad_files):
        self.source, self.bad_files = source, bad_files

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.bad_files.load(self.source, index, 100 + index, lambda data: TRAIN(data, 24, None, 100 + index))


def test_evaluation_names_the_file_and_substitutes_nothing(source):
    transform = EvalTransform(32, 32, "lanczos")
    for index in range(COUNT):
        if index in BAD:
            with pytest.raises(BadImage, match=source.name(index)) as caught:
                load(source, index, transform)
            assert "\n" not in str(caught.value)
        else:
            assert load(source, index, transform).shape == (3, 32, 32)


def test_substitutes_are_the_same_every_time_and_recorded_once(source, tmp_path):
    samples = Samples(source, BadFiles(0.2, tmp_path))
    first = [samples[index] for index in range(COUNT)]
    again = [Samples(source, BadFiles(0.2, tmp_path))[index] for index in range(COUNT)]
    for (a, label_a), (b, label_b) in zip(first, again):
        assert torch.equal(a, b) and label_a == label_b
    for index in set(range(COUNT)) - BAD:
        assert torch.equal(first[index][0], TRAIN(source.read(index), 24, None, 100 + index))
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert len(lines) == 5 and all(any(line.startswith(source.name(index)) for line in lines) for index in BAD)
    assert "No such file" in "".join(lines)


def test_workers_share_the_record_and_the_result(source, tmp_path, capfd):
    alone = [Samples(source, BadFiles(0.2))[index] for index in range(COUNT)]
    loader = DataLoader(Samples(source, BadFiles(0.2, tmp_path)), num_workers=3, batch_size=4)
    images, labels = zip(*loader)
    assert torch.equal(torch.cat(images), torch.stack([image for image, _ in alone]))
    assert torch.cat(labels).tolist() == [label for _, label in alone]
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 5
    assert "class0/00.jpg" in capfd.readouterr().err


@pytest.fixture
def floor(monkeypatch):
    monkeypatch.setattr("inputs.bad_files.FLOOR", 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_beyond_the_budget_the_run_stops(source, tmp_path, workers, floor):
    loader = DataLoader(Samples(source, BadFiles(0.1, tmp_path)), num_workers=workers, batch_size=4)
    with pytest.raises(BadImage, match=r"5 of 40 .* --max_bad 0\.1 allows 4 .*bad_files\.txt") as caught:
        list(loader)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("5 of 40")
    assert "--max_bad 0.25 resumes" in str(caught.value)


def test_an_earlier_run_counts(source, tmp_path, floor):
    samples = Samples(source, BadFiles(0.1, tmp_path))
    for index in range(4):
        samples[index]
    with pytest.raises(BadImage, match="5 of 40"):
        Samples(source, BadFiles(0.1, tmp_path))[4]


def test_ten_files_may_be_bad_in_any_set_but_none_where_none_is_allowed(source):
    assert [budget(0.001, images) for images in (40, 1500, 20_000)] == [10, 10, 20]
    samples = Samples(source, BadFiles(0.001))
    assert all(samples[index][0].shape == (3, 24, 24) for index in BAD)
    with pytest.raises(BadImage, match="allows 0"):
        Samples(source, BadFiles(0.0))[0]


def test_no_good_image_at_all(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.jpg").write_bytes(b"x")
    with pytest.raises(BadImage, match="in a row"):
        Samples(FolderIndex(tmp_path / "train"), BadFiles(1.0))[0]
