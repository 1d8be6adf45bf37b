"""Data sets other than one folder: tar archives against timm's reader, views against brute force."""

import io
import pickle
import random
import tarfile

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from inputs.bad_files import load
from inputs.decode import BadImage, decode
from inputs.folder import FolderIndex
from inputs.index_file import INDEX_NAME
from inputs.readers import open_source
from inputs.tar import TarIndex
from inputs.views import Joined, View, fingerprint, hold_out, map_classes


def jpeg(k):
    file = io.BytesIO()
    Image.new("RGB", (8 + k % 5, 8), (k % 256, 100, 200)).save(file, "JPEG")
    return file.getvalue()


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


class Numbers:
    """A source of ``labels`` whose image k is the number k."""

    def __init__(self, labels, classes):
        self._labels, self.classes = np.asarray(labels), classes

    def __len__(self):
        return len(self._labels)

    def read(self, i):
        return i

    def name(self, i):
        return f"number {i}"

    def label(self, i):
        return int(self._labels[i])

    def labels(self):
        return self._labels


# ---------------------------------------------------------------------------------------------------------------- tar


@pytest.fixture
def shards(tmp_path):
    """One archive per class, as timm's reader expects them."""
    for c, name in enumerate(("cat", "dog", "emu")):
        pack(tmp_path / f"tars/{name}.tar", [(f"{k}.jpg", jpeg(10 * c + k)) for k in range(4 + c)] + [("x.txt", b"")])
    return tmp_path / "tars"


def test_an_archive_per_class_equals_timms_reader(shards):
    index = TarIndex(shards)
    reader = ReaderImageInTar(str(shards))
    theirs = sorted((file.read(), int(label)) for file, label in (reader[i] for i in range(len(reader))))
    assert sorted((index.read(i), index.label(i)) for i in range(len(index))) == theirs
    assert index.classes == list(reader.class_name_to_idx)
    assert index.labels().tolist() == [index.label(i) for i in range(len(index))]


def test_webdataset_shards_by_number(tmp_path):
    for shard in range(3):
        members = []
        for k in range(5):
            number = 5 * shard + k
            members += [(f"{number:04d}.jpg", jpeg(number)), (f"{number:04d}.cls", str(number % 11).encode())]
        pack(tmp_path / f"train-{shard:03d}.tar", members)
    pack(tmp_path / "val-000.tar", [("1.jpg", jpeg(1)), ("1.cls", b"10")])
    index = TarIndex(tmp_path, pattern="train-*.tar")
    assert index.classes == [str(k) for k in range(11)]  # by number, not 0 1 10 2
    for order in (range(15), reversed(range(15))):
        for i in order:
            assert index.label(i) == i % 11 and np.array_equal(decode(index.read(i)), decode(jpeg(i)))
    assert TarIndex(tmp_path, pattern="val-*.tar", classes=index.classes).label(0) == 10


def test_class_folders_inside_one_archive(tmp_path):
    pack(tmp_path / "all.tar", [(f"data/{c}/{k}.PNG", jpeg(k)) for c in "ba" for k in range(3)])
    index = TarIndex(tmp_path / "all.tar")
    assert index.classes == ["a", "b"] and index.labels().tolist() == [1, 1, 1, 0, 0, 0]


def test_the_index_is_reused_pickled_and_renewed(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    index = TarIndex(shards)
    place = next((tmp_path / "xdg").rglob("*" + INDEX_NAME + "*tar"))
    written = place.stat().st_mtime_ns
    assert TarIndex(shards).read(3) == index.read(3) and place.stat().st_mtime_ns == written
    assert pickle.loads(pickle.dumps(index)).read(5) == index.read(5)
    pack(shards / "fox.tar", [("1.jpg", jpeg(99))])
    assert TarIndex(shards).classes == ["cat", "dog", "emu", "fox"]


def test_an_archive_cut_short(shards):
    whole = (shards / "dog.tar").read_bytes()
    with tarfile.open(shards / "dog.tar") as archive:
        last = archive.getmembers()[-2]
    (shards / "dog.tar").write_bytes(whole[: last.offset_data + 40])
    index = TarIndex(shards)
    dogs = np.flatnonzero(index.labels() == 1)
    assert len(dogs) == 5  # the last one, of which a part is there, is known and found bad
    for i in dogs[:-1]:
        decode(index.read(int(i)))
    with pytest.raises(BadImage, match=r"dog\.tar at byte .* cut short"):
        load(index, int(dogs[-1]), decode)
    (shards / "emu.tar").unlink()
    with pytest.raises(BadImage, match=r"emu\.tar"):
        load(index, len(index) - 1, decode)


def test_tar_errors(tmp_path, shards):
    with pytest.raises(ValueError, match=r"no \*\.tar"):
        TarIndex(tmp_path)
    with pytest.raises(ValueError, match="training set lacks: dog, emu"):
        TarIndex(shards, classes=["cat"])
    (shards / "no.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"no\.tar cannot be read"):
        TarIndex(shards)
    pack(tmp_path / "empty/a.tar", [("readme.txt", b"x")])
    with pytest.raises(ValueError, match="no images"):
        TarIndex(tmp_path / "empty")


# -------------------------------------------------------------------------------------------------------------- views


def test_view_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        source = Numbers(rng.integers(0, 4, 50), list("abcd"))
        keep = rng.random(50) < rng.random()
        view = View(source, keep)
        chosen = np.flatnonzero(keep).tolist()
        assert [view.read(i) for i in range(len(view))] == chosen
        assert view.labels().tolist() == [source.label(k) for k in chosen] == [view.label(i) for i in range(len(view))]
        with pytest.raises(IndexError):
            view.read(len(view))


def test_a_subset_of_a_large_folder_is_small():
    source = Numbers(np.repeat(np.arange(1000), 1000), [f"{k:03d}" for k in range(1000)])
    view = View(source, source.labels() % 3 == 0)
    assert len(view) == 334000 and len(view._first) == 334


def test_label_map_and_subset(tmp_path):
    source = Numbers([0, 1, 2, 3, 1, 0], ["ant", "bee", "cow", "dog"])
    path = tmp_path / "map.txt"
    path.write_text("# insects first\nbee\tinsect\nant\tinsect\n\ndog\n")
    view = map_classes(source, path)
    assert view.classes == ["insect", "dog"]
    assert [view.read(i) for i in range(len(view))] == [0, 1, 3, 4, 5] and view.labels().tolist() == [0, 0, 1, 0, 0]
    assert view.name(2) == "number 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no class"), ("ant\nant\n", "twice"), ("ant\nyak\n", "no class yak"), (None, "cannot be read")],
)
def test_label_map_errors(tmp_path, text, message):
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
    with pytest.raises(ValueError, match=f"--class_map.*{message}"):
        map_classes(Numbers([0], ["ant"]), tmp_path / "map.txt")


def taken(view):
    return {view.read(i) for i in range(len(view))}


def test_held_out_images_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [3000, 450, 1, 12000]))
    source = Numbers(labels, list("abcd"))
    train, val, none = hold_out(source, 100)
    assert taken(train) | taken(val) == set(range(len(labels))) and not taken(train) & taken(val)
    counts = np.bincount(val.labels(), minlength=4)
    assert 50 < counts[0] < 150 and 50 < counts[3] < 150
    assert abs(counts[1] - 45) < 25  # at most a tenth
    assert counts[2] == 0 and none == ["c"]  # too small
    share = hold_out(source, share=0.2)[1]
    assert abs(len(share) / len(labels) - 0.2) < 0.02


def test_what_is_held_out_does_not_depend_on_other_images(tmp_path):
    for name, count in (("a", 60), ("b", 100), ("c", 24)):
        (tmp_path / name).mkdir()
        for k in range(count):
            (tmp_path / name / f"{k}.jpg").touch()
    rng = random.Random(0)

    def held(**how):
        view = hold_out(FolderIndex(tmp_path), **how)[1]
        return {view.source.relative(int(place)) for place in view.places()}

    ways = ({"per_class": 10}, {"share": 0.3})
    before = [held(**how) for how in ways]
    assert all(5 < len(names) < 120 for names in before)
    for _ in range(6):
        gone = rng.choice(sorted(tmp_path.rglob("*.jpg")))
        gone.unlink()
        new = tmp_path / rng.choice("abc") / f"{rng.random()}.jpg"
        new.touch()
        changed = {str(path.relative_to(tmp_path)) for path in (gone, new)}
        now = [held(**how) for how in ways]
        assert all(a - changed == b - changed for a, b in zip(before, now))
        before = now


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"per_class": 0}, "--val_per_class is 0"),
        ({"share": 1.5}, "--val_share is 1.5"),
        ({"share": 0.1, "per_class": 1}, "give one"),
        ({}, "give one"),
        ({"share": 1e-9}, "holds out none of 5"),
    ],
)
def test_holding_out_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        hold_out(Numbers([0] * 5, ["a"]), **how)


def test_fingerprints_tell_sets_of_images_apart(tmp_path):
    for name in ("x/a/1.jpg", "x/a/2.jpg", "x/b/1.jpg", "y/a/1.jpg", "y/a/2.jpg", "y/b/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    x, y = FolderIndex(tmp_path / "x"), FolderIndex(tmp_path / "y", classes=["b", "a"])
    first = fingerprint(x)
    assert first["images"] == 3 and first["classes"] == 2
    assert first["digest"] == fingerprint(y)["digest"]  # nor place nor order of classes matter
    assert first["order"] != fingerprint(y)["order"] and first == fingerprint(FolderIndex(tmp_path / "y"))
    assert fingerprint(View(x, np.array([True, True, False]))) != first
    (tmp_path / "y/b/1.jpg").rename(tmp_path / "y/b/2.jpg")
    assert fingerprint(FolderIndex(tmp_path / "y")) != first
    (tmp_path / "y/b/2.jpg").rename(tmp_path / "y/b/1.jpg")
    assert fingerprint(FolderIndex(tmp_path / "y")) == first
    relabelled = View(x, np.ones(3, dtype=bool), ["a", "b"], np.array([1, 0]))
    assert fingerprint(relabelled) != first


def test_joined_folders_as_the_processed_imagenet_22k_has_them(tmp_path):
    layout = {"imagenet21k_train": "bd", "imagenet21k_small_classes": "ac", "imagenet21k_val": "bd"}
    for part, classes in layout.items():
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(3):
                (tmp_path / part / name / f"{k}.jpg").write_bytes(jpeg(k))
    train = open_source("folder", tmp_path, "imagenet21k_train+imagenet21k_small_classes")
    assert train.classes == list("abcd") and len(train) == 12
    assert train.labels().tolist() == [train.label(i) for i in range(12)] == [1] * 3 + [3] * 3 + [0] * 3 + [2] * 3
    assert "small_classes/a" in train.name(6) and train.read(7) == jpeg(1)
    val = open_source("folder", tmp_path, "imagenet21k_val", classes=train.classes)
    assert sorted(set(val.labels().tolist())) == [1, 3]
    with pytest.raises(ValueError, match="not the training set's: a, c"):
        Joined([train], classes=["b", "d"])


# ------------------------------------------------------------------------------------------------------------- readers


def test_names(tmp_path, shards):
    assert isinstance(open_source("tar", shards.parent, "tars"), TarIndex)
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.jpg").write_bytes(jpeg(0))
    assert isinstance(open_source("folder", tmp_path, "train"), FolderIndex)
    with pytest.raises(ValueError, match="--data_set lmdb is not known"):
        open_source("lmdb", tmp_path, "train")


@pytest.mark.parametrize("name", ["hfids/x", "wds/x"])
def test_streams_are_refused_with_a_way_out(tmp_path, name):
    with pytest.raises(ValueError, match=f"--data_set {name}.*by number.*tar"):
        open_source(name, tmp_path, "train")
