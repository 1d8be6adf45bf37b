"""The folder index against torchvision's ImageFolder, and what happens when the tree or the index changes."""

import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from inputs import folder, index_file
from inputs.folder import FolderIndex
from inputs.index_file import INDEX_NAME


def touch(root, *paths, age=60):
    """Empty files below root, in folders that were last changed `age` seconds ago."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    settle(root, age)


def settle(root, age=60):
    for place, _, _ in os.walk(root):
        os.utime(place, times=(time.time() - age, time.time() - age))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the user's indices, empty and not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "efficienttrain"


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "train"
    names = [f"{c}/{k:03d}.JPEG" for c in ("cat", "dog", "äpfel") for k in range(40)]
    names += ["dog/sub-x/1.png", "dog/sub/deep/2.jpg", "dog/sub/0.webp", "cat/with space.JPG"]
    touch(root, *names, "cat/notes.txt", "README.md")
    return root


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a tree is listed."""
    calls = []
    original = folder.list_tree
    monkeypatch.setattr(folder, "list_tree", lambda root: calls.append(root) or original(root))
    return calls


def samples(index):
    return [(index.path(i), index.label(i)) for i in range(len(index))]


def test_equals_torchvision(tree):
    expected = ImageFolder(tree)
    index = FolderIndex(tree)
    assert index.classes == expected.classes and samples(index) == expected.samples
    assert np.array_equal(index.labels(), expected.targets)


def test_index_is_reused_and_survives_pickling(tree, builds):
    first = FolderIndex(tree)
    second = FolderIndex(tree)
    assert len(builds) == 1 and samples(first) == samples(second)
    assert samples(pickle.loads(pickle.dumps(second))) == samples(first)
    assert len(pickle.dumps(first)) < 1000


@pytest.mark.parametrize("change", ["add", "remove", "rename", "add nested", "new class", "remove class"])
def test_a_changed_tree_is_listed_again(tree, builds, change):
    FolderIndex(tree)
    if change == "add":
        (tree / "cat/new.jpg").touch()
    elif change == "remove":
        (tree / "cat/003.JPEG").unlink()
    elif change == "rename":
        (tree / "cat/003.JPEG").rename(tree / "cat/x.JPEG")
    elif change == "add nested":
        (tree / "dog/sub/deep/3.jpg").touch()
    elif change == "new class":
        touch(tree, "emu/1.jpg")
    else:
        for path in (tree / "cat").iterdir():
            path.unlink()
        (tree / "cat").rmdir()
    assert samples(FolderIndex(tree)) == ImageFolder(tree).samples
    assert len(builds) == 2


def test_a_tree_changed_moments_ago_is_not_trusted(tree, builds):
    (tree / "cat/new.jpg").touch()
    FolderIndex(tree)
    (tree / "cat/newer.jpg").touch()
    os.utime(tree / "cat", ns=(os.stat(tree / "cat").st_atime_ns, os.stat(tree / "cat").st_mtime_ns))
    assert samples(FolderIndex(tree)) == ImageFolder(tree).samples


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:100], lambda b: b"", lambda b: b[:-8] + bytes(8), lambda b: bytes(len(b))]
)
def test_a_broken_index_is_built_again(tree, builds, spoil, cache):
    FolderIndex(tree)
    (path,) = cache.glob("*" + INDEX_NAME)
    path.write_bytes(spoil(path.read_bytes()))
    assert samples(FolderIndex(tree)) == ImageFolder(tree).samples and len(builds) == 2


def test_the_data_folder_stays_as_it_was(tree, cache):
    before = sorted(tree.rglob("*"))
    FolderIndex(tree)
    assert sorted(tree.rglob("*")) == before and len(list(cache.glob("*" + INDEX_NAME))) == 1
    assert cache.stat().st_mode & 0o777 == 0o700


def test_without_any_writable_place_the_index_stays_in_memory(tree, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(index_file.tempfile, "NamedTemporaryFile", refuse)
    index = FolderIndex(tree)
    assert samples(pickle.loads(pickle.dumps(index))) == samples(index) == ImageFolder(tree).samples


def test_cache_dir_is_used(tree, tmp_path, cache):
    FolderIndex(tree, cache_dir=tmp_path / "here")
    assert len(list((tmp_path / "here").glob("*" + INDEX_NAME))) == 1 and not list(cache.glob("*"))


def build(root, queue):
    index = FolderIndex(root)
    queue.put((len(index), index.path(len(index) - 1)))


def test_several_processes_at_once(tree, cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=build, args=(tree, queue)) for _ in range(6)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
    expected = ImageFolder(tree).samples
    assert results == {(len(expected), expected[-1][0])}
    assert len(list(cache.glob("*" + INDEX_NAME))) == 1


def test_validation_takes_the_training_labels(tree, tmp_path):
    touch(tmp_path / "val", "dog/1.jpg", "äpfel/2.jpg")
    train = FolderIndex(tree)
    val = FolderIndex(tmp_path / "val", classes=train.classes)
    assert [val.label(i) for i in range(len(val))] == [1, 2] and val.classes == train.classes
    touch(tmp_path / "val", "zebra/1.jpg")
    with pytest.raises(ValueError, match="training set lacks: zebra"):
        FolderIndex(tmp_path / "val", classes=train.classes)


def test_links_that_lead_back_up_are_left_out(tree):
    (tree / "cat/loop").symlink_to(tree / "cat")
    assert len(FolderIndex(tree)) == 124


def test_hidden_files_are_left_out(tree):
    touch(tree, "cat/._000.JPEG", ".ipynb_checkpoints/1.jpg")
    assert len(FolderIndex(tree)) == 124


@pytest.mark.parametrize("i", [-1, 124])
def test_index_outside_the_range(tree, i):
    with pytest.raises(IndexError):
        FolderIndex(tree).path(i)


def test_clear_errors(tmp_path):
    with pytest.raises(ValueError, match=r"--data_path.*no folder"):
        FolderIndex(tmp_path / "none")
    with pytest.raises(ValueError, match="no class folders"):
        FolderIndex(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no images"):
        FolderIndex(tmp_path)
    touch(tmp_path, "b/1.jpg")
    with pytest.raises(ValueError, match="without images: a"):
        FolderIndex(tmp_path)
