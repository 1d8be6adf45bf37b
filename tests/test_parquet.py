"""Parquet files and TensorFlow Datasets by number, against the rows that were written."""

import io
import json
import pickle
import resource
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from inputs import remote
from inputs.bad_files import load
from inputs.decode import BadImage, decode
from inputs.parquet import ParquetIndex
from inputs.readers import open_source
from tests.buckets import WebServer, jpeg, s3_server, upload
from tests.conftest import Run, flags, same

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
NAMES = ["ant", "bee", "cow"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


def write(path, numbers, struct=True, features=FEATURES, rows=4, labels=None):
    """A file of images ``numbers`` as Hugging Face writes it, ``rows`` to a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [jpeg(k % 3, k) for k in numbers]
    columns = {
        "image": [{"bytes": data, "path": None} for data in images] if struct else images,
        "label": [k % 3 for k in numbers] if labels is None else labels,
    }
    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=rows)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set as on the hub: 60 training images in five files, 12 validation images in one."""
    root = tmp_path_factory.mktemp("parquet")
    for k in range(5):
        write(root / f"data/train-{k:05d}-of-00005.parquet", range(12 * k, 12 * k + 12))
    write(root / "data/validation-00000-of-00001.parquet", range(60, 72))
    return root


def test_rows_by_number(data):
    source = open_source(f"hfds/{data}", None, "train")
    assert len(source) == 60 and source.classes == NAMES
    for opened in (source, pickle.loads(pickle.dumps(source))):
        for i in np.random.default_rng(0).permutation(60).tolist():
            assert opened.read(i) == jpeg(i % 3, i) and opened.label(i) == i % 3
    assert source.labels().tolist() == [k % 3 for k in range(60)]
    assert source.name(17).endswith("train-00001-of-00005.parquet row 1 of group 1")
    val = open_source("parquet", data, "val", source.classes, part="val")
    assert len(val) == 12 and val.read(3) == jpeg(0, 63)
    with pytest.raises(IndexError):
        source.read(60)


def read_all(source, batch):
    """A function of the module: from Python 3.14 on, workers get it pickled."""
    return [source.read(index) for index in batch]


def test_the_workers_of_a_loader_read_them(data):
    source = open_source("parquet", data, "train")
    source.read(0)
    loader = DataLoader(range(60), num_workers=2, collate_fn=partial(read_all, source), timeout=60)
    assert [each for batch in loader for each in batch] == [jpeg(i % 3, i) for i in range(60)]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "c", "a"], ["a", "b", "c"]),
        ([10, 9, 100, 9], ["9", "10", "100"]),
    ],
)
def test_plain_columns(tmp_path, labels, classes):
    write(tmp_path / "train.parquet", range(4), struct=False, features=None, labels=labels)
    source = open_source("parquet", tmp_path, "train")
    assert source.classes == classes and [source.read(i) for i in range(4)] == [jpeg(k % 3, k) for k in range(4)]
    assert [source.classes[label] for label in source.labels()] == list(map(str, labels))


def test_splits_are_found_where_they_usually_lie(tmp_path):
    for place in ("a/train/0.parquet", "b/train.parquet", "c/train-0.parquet", "d/data/train-0.parquet"):
        write(tmp_path / place, range(3))
        write(tmp_path / place.replace("train", "train_more"), range(9))
        assert len(open_source("parquet", tmp_path / place[0], "train")) == 3
    both = open_source("parquet", tmp_path / "a", "train+train_more")
    assert len(both) == 12 and both.read(5) == jpeg(2, 2)


def test_parquet_errors(tmp_path, data):
    with pytest.raises(ValueError, match=r"no Parquet files of a split nothing.*--train_split"):
        open_source("parquet", data, "nothing")
    with pytest.raises(ValueError, match="training set lacks: cow"):
        open_source("parquet", data, "train", ["ant", "bee"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a/train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as a Parquet file"):
        open_source("parquet", tmp_path / "a", "train")
    table = pyarrow.table({"photo": [b"x"], "thumb": [b"y"], "label": [1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"an image; its columns are photo \(binary\).*call it image"):
        open_source("parquet", tmp_path, "train")
    write(tmp_path / "train.parquet", range(3), labels=[0, None, 1])
    with pytest.raises(ValueError, match="row 1 has no label"):
        open_source("parquet", tmp_path, "train")
    write(tmp_path / "train.parquet", range(3), labels=[0, 5, 1])
    with pytest.raises(ValueError, match="label 5 that is not one of its 3 classes"):
        open_source("parquet", tmp_path, "train")
    table = pyarrow.table({"image": [jpeg(0, 0), None], "label": [0, 1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(BadImage, match=r"train\.parquet row 1 of group 0: the row has no image"):
        load(open_source("parquet", tmp_path, "train"), 1, decode)


def test_a_look_up_does_not_hold_its_row_group(tmp_path):
    """40 MB in one row group; reading its images takes a few of them."""
    noise = [np.random.default_rng(k).bytes(400_000) for k in range(100)]
    parquet.write_table(pyarrow.table({"image": noise, "label": [0] * 100}), tmp_path / "train.parquet")
    source = ParquetIndex(tmp_path)
    source.read(0)
    before = pyarrow.default_memory_pool().max_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [source.read(i) == noise[i] for i in (99, 50, 3)] == [True] * 3
    assert pyarrow.default_memory_pool().bytes_allocated() < 20e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 30_000  # KB


def test_a_run_from_parquet_resumes_bit_by_bit(main_program, data, tmp_path):
    def run(name, **settings):
        base = {"data_set": "parquet", "data_path": data, "epochs": 1, "num_workers": 2, "save_interval": "4 steps"}
        assert main_program(flags(output_dir=tmp_path / name, **{**base, **settings})) == 0
        return Run(tmp_path / name).result()["state"]

    whole = run("whole")
    assert not same(run("part", stop_after="5 steps")["model"], whole["model"])
    assert same(run("part"), whole)


def test_data_path_has_no_use_for_the_hub(main_program, data, tmp_path, capsys):
    settings = flags(data_set=f"hfds/{data}", data_path=tmp_path, plan="table")
    assert main_program(settings) == 2
    assert "--data_path" in capsys.readouterr().err


def test_parquet_in_a_bucket(data, tmp_path, monkeypatch):
    pytest.importorskip("moto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with s3_server(monkeypatch.setenv) as client:
        upload(client, "parquet", data)
        source = open_source("parquet", "s3://parquet", "train", cache_dir=tmp_path / "c", cache_size=10**9)
        assert source.labels().tolist() == [k % 3 for k in range(60)]
        for i in range(60):
            assert source.read(i) == jpeg(i % 3, i)
            source.shards.cache.wait()
        assert all(source.shards.cache.held(source.shards.keys))


def test_parquet_over_http_that_drops_connections(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "DELAYS", (0.01,) * 8)
    server = WebServer(data, drop=0.2)
    try:
        source = open_source("parquet", server.url, "data/train-{00000..00004}-of-00005.parquet")
        assert [source.read(i) for i in range(60)] == [jpeg(i % 3, i) for i in range(60)]
    finally:
        server.close()


def test_the_hub_is_read_where_its_data_lie(data, tmp_path, monkeypatch):
    """hfds/NAME through a file system that stands for the hub's: the data set's own files, else its Parquet branch."""
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem

    class Hub(DirFileSystem):
        protocol = "hf"

        def __init__(self, **_):
            super().__init__(path=str(tmp_path / "hub"), fs=fsspec.filesystem("file"))

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("hf://")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    (tmp_path / "hub/datasets/me").mkdir(parents=True)
    (tmp_path / "hub/datasets/me/set").symlink_to(data)
    write(tmp_path / "hub/datasets/me/other@~parquet/default/train/0000.parquet", range(6))
    own = open_source("hfds/me/set", None, "train")
    assert own.name(0).startswith("hf://datasets/me/set/data/train-00000") and own.read(30) == jpeg(0, 30)
    assert len(open_source("hfds/me/other", None, "train")) == 6
    with pytest.raises(ValueError, match="hf://datasets/me/none has no Parquet files"):
        open_source("hfds/me/none", None, "train")


# ---------------------------------------------------------------------------------------------------------------- TFDS


PREPARE = """
import io, sys
import tensorflow_datasets as tfds
from PIL import Image

class SmallSet(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image, label = tfds.features.Image(encoding_format="png"), tfds.features.ClassLabel(names=["ant", "bee", "cow"])
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(dict(image=image, label=label)))

    def _split_generators(self, _):
        return {"train": self._generate_examples(0, 16), "validation": self._generate_examples(16, 24)}

    def _generate_examples(self, start, stop):
        for k in range(start, stop):
            file = io.BytesIO()
            Image.new("RGB", (40, 40), (10 * k, 0, 100)).save(file, "PNG")
            yield k, {"image": io.BytesIO(file.getvalue()), "label": k % 3}

SmallSet(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def png(k):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (10 * k, 0, 100)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of 24 PNGs in ArrayRecord files, prepared by the library itself, in a process of its own."""
    pytest.importorskip("array_record")
    pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", PREPARE, str(root)], check=True, capture_output=True)
    return root


def test_tfds_by_number_without_tensorflow(prepared):
    source = open_source("tfds/small_set", prepared, "train")
    found = [source.read(i) for i in range(len(source))]
    assert sorted(found) == sorted(png(k) for k in range(16)) and source.classes == NAMES
    assert [png(k) for k in range(16)] != found  # the library shuffles when it prepares
    label_of = {png(k): k % 3 for k in range(16)}
    assert [label_of[each] for each in found] == source.labels().tolist() == [source.label(i) for i in range(16)]
    loader = DataLoader(range(16), num_workers=2, collate_fn=lambda batch: [source.read(i) for i in batch], timeout=60)
    assert [each for batch in loader for each in batch] == found  # after this process has read
    part = open_source("tfds/small_set:1.0.0", prepared, "train[:50%]", source.classes)
    assert [part.read(i) for i in range(len(part))] == found[:8]
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"no split val: train, validation.*--val_split"):
        open_source("tfds/small_set", prepared, "val")
    with pytest.raises(ValueError, match=r"cannot be read from --data_path .*array_record"):
        open_source("tfds/nothing", prepared, "train")


def test_a_run_from_tfds(main_program, prepared, tmp_path):
    settings = {"data_set": "tfds/small_set", "data_path": prepared, "val_split": "validation", "epochs": 1}
    assert main_program(flags(output_dir=tmp_path / "a", num_workers=0, **settings)) == 0
    assert main_program(flags(output_dir=tmp_path / "b", num_workers=2, **settings)) == 0
    assert same(Run(tmp_path / "a").result(), Run(tmp_path / "b").result())
