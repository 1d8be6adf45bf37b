"""CIFAR, Flowers-102 and Stanford Dogs in their authors' file formats (tiny copies), through the recipes for them."""

import hashlib
import io
import pickle

import numpy as np
import pytest
from conftest import ROOT, Run, flags
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from config import Config
from datasets import build_source
from inputs.decode import decode


def jpeg(value):
    out = io.BytesIO()
    Image.new("RGB", (40, 36), (value, 80, 200)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Pickled arrays, 32 to train and 12 to test; the checksums are those of these files."""
    folder = tmp_path / datasets.CIFAR100.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums = {}
    for name, count in (("train", 32), ("test", 12), ("meta", 0)):
        content = {"fine_label_names": [f"thing {k}" for k in range(100)]}
        if count:
            pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            content = {
                "data": pixels,
                "fine_labels": [(7 * k) % 100 for k in range(count)],
                "coarse_labels": [0] * count,
            }
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": sums["meta"]})
    return tmp_path


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """30 images of labels 1 to 102, numbered from 1; splits in MATLAB's row vectors."""
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 31):
        (folder / "jpg" / f"image_{number:05d}.jpg").write_bytes(jpeg(8 * number))
    labels = np.array([[1 + (101 * k) // 29 for k in range(30)]], dtype=np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels})
    order = np.random.default_rng(1).permutation(30) + 1
    splits = {"trnid": order[None, :10], "valid": order[None, 10:18], "tstid": order[None, 18:]}
    savemat(folder / "setid.mat", {name: ids.astype(np.uint16) for name, ids in splits.items()})
    table = dict(datasets.Flowers102._file_dict)
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        table[key] = (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", table)
    return tmp_path, labels[0], order


@pytest.fixture
def dogs(tmp_path):
    """Two images of each of 120 breeds, one to train and one to test; lists as cell arrays of strings."""
    names = [f"n{2085620 + k:08d}-breed_{(k * 37) % 120:03d}" for k in range(120)]
    (tmp_path / "lists").mkdir()
    for split, offset in (("train", 0), ("test", 1)):
        files = [f"{name}/{name.partition('-')[0]}_{10 * k + offset}.jpg" for k, name in enumerate(names)]
        for k, file in enumerate(files):
            path = tmp_path / "Images" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(2 * k + offset))
        cells = np.empty((120, 1), dtype=object)
        cells[:, 0] = files
        labels = np.arange(1, 121, dtype=np.uint8)[:, None]
        savemat(tmp_path / "lists" / f"{split}_list.mat", {"file_list": cells, "labels": labels})
    return tmp_path, names


def sources(**settings):
    config = Config(**{key: str(value) for key, value in settings.items()})
    return build_source(config, train=True), build_source(config, train=False)


def run_recipe(main_program, name, root, output, **settings):
    """Trains what the recipe says on these files, reduced to the tiny model and one pass."""
    words = ["--recipe", str(ROOT / "recipes" / "transfer" / name)]
    reduced = flags(data_path=root, output_dir=output, epochs=1, amp="none", warmup_epochs="10%", **settings)
    assert main_program([*words, *reduced]) == 0
    return Run(output)


def test_cifar100(cifar100, main_program, tmp_path):
    train, val = sources(data_set="cifar100", data_path=cifar100)
    assert (len(train), len(val)) == (32, 12) and train.classes[3] == "thing 3"
    assert train.labels().tolist() == [(7 * k) % 100 for k in range(32)] and train.label(2) == 14
    run = run_recipe(main_program, "cifar100.yaml", cifar100, tmp_path / "run", input_size=32)
    assert run.log()[-1]["eval_images"] == 12 and run.state()["model"]["head.weight"].shape[0] == 100


def test_flowers(flowers, main_program, tmp_path):
    root, labels, order = flowers
    train, test = sources(data_set="flowers102", data_path=root, train_split="train+val", val_split="test")
    assert (len(train), len(test)) == (18, 12)
    assert train.labels().tolist() == (labels[order[:18] - 1] - 1).tolist()
    assert test.labels().tolist() == (labels[order[18:] - 1] - 1).tolist()
    assert train.classes == test.classes and len(set(train.classes)) == 102
    assert decode(train.read(12))[5, 5, 0] == pytest.approx(8 * order[12], abs=3)
    assert train.name(12).endswith(f"image_{order[12]:05d}.jpg")
    run = run_recipe(main_program, "flowers.yaml", root, tmp_path / "run")
    assert run.log()[-1]["eval_images"] == 12 and run.state()["model"]["head.weight"].shape[0] == 102


def test_dogs(dogs, main_program, tmp_path):
    root, names = dogs
    train, test = sources(data_set="stanford_dogs", data_path=root, val_split="test")
    assert train.classes == test.classes == names
    assert (len(train), len(test)) == (120, 120) and test.label(7) == 7
    assert decode(test.read(60))[5, 5, 0] == pytest.approx(121, abs=3)
    run = run_recipe(main_program, "dogs.yaml", root, tmp_path / "run", batch_size=40, micro_batch=20)
    assert run.log()[-1]["eval_images"] == 120 and run.state()["classes"] == names
    (root / "lists" / "test_list.mat").rename(root / "test_list.mat")  # unpacked without a folder of their own
    assert len(sources(data_set="stanford_dogs", data_path=root, val_split="test")[1]) == 120


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data_set": "cifar10", "train_split": "tran"}, "cifar10 has no split 'tran': choose train or val"),
        ({"data_set": "flowers102", "train_split": "val+tst"}, "no split 'tst'"),
        ({"data_set": "stanford_dogs", "val_split": "test"}, "images.tar and lists.tar"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, settings, message, monkeypatch):
    for maker in (datasets.CIFAR10, datasets.Flowers102):
        monkeypatch.setattr(maker, "download", lambda self: None)
        monkeypatch.setattr(maker, "_check_integrity", lambda self: True)
    with pytest.raises(ValueError, match=message):
        sources(data_path=tmp_path, **settings)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no route")

    monkeypatch.setattr(datasets.Flowers102, "download", fail)
    with pytest.raises(ValueError, match="--data_path has no Flowers102, and it cannot be downloaded: no route"):
        sources(data_set="flowers102", data_path=tmp_path)


def test_a_damaged_list_is_named(dogs):
    path = dogs[0] / "lists" / "train_list.mat"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"train_list.mat is not a list of Stanford Dogs"):
        sources(data_set="stanford_dogs", data_path=dogs[0], val_split="test")
