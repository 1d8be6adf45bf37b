"""What holds of local data holds at URLs and in other containers: labels, held-out images, the summary, bad images."""

import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

from inputs import open_files, remote
from inputs.readable import drop_unreadable
from inputs.readers import open_source
from inputs.summary import describe
from inputs.tables import read_table
from inputs.tar import TarIndex
from inputs.views import fingerprint, hold_out, path_hashes
from tests.buckets import WebServer, jpeg, pack, write_shards
from tests.conftest import Run, flags
from utils import Unreachable

pytest.importorskip("aiohttp")


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server of tmp_path/data, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "DELAYS", (0.01,) * 3)
    (tmp_path / "data").mkdir()
    server = WebServer(tmp_path / "data")
    yield server
    server.close()


def parquet_files(folder, count=60, files=3):
    """train-0.parquet, ... of plain columns; row k of all is jpeg(k % 3, k) of class k % 3."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    each = count // files
    for f in range(files):
        numbers = range(f * each, f * each + each)
        table = pyarrow.table({"image": [jpeg(k % 3, k) for k in numbers], "label": [k % 3 for k in numbers]})
        parquet.write_table(table, folder / f"train-{f}.parquet", row_group_size=7)
    return folder


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_in_json_side_files_at_a_url(web):
    members = [
        (name, data)
        for k in range(12)
        for name, data in (
            (f"{k:04d}.json", json.dumps({"species": ["newt", 7, "10"][k % 3]}).encode()),
            (f"{k:04d}.photo.jpg", jpeg(k % 3, k)),
            (f"{k:04d}.txt", b"a caption"),
        )
    ]
    (web.folder / "train").mkdir()
    for shard in range(2):
        (web.folder / f"train/{shard:05d}.tar").write_bytes(pack(members[18 * shard : 18 * shard + 18]))
    there = open_source("tar", web.url, "train/{00000..00001}.tar", label_key="species")
    local = open_source("tar", web.folder, "train", label_key="species")
    assert there.classes == local.classes == ["7", "10", "newt"]
    assert [there.classes[there.label(k)] for k in range(12)] == ["newt", "7", "10"] * 4
    with pytest.raises(ValueError, match=r"state no label.*keys in its \.json files: species.*--label_key"):
        open_source("tar", web.url, "train/{00000..00001}.tar")


@pytest.mark.parametrize("column", [False, True])
def test_labels_in_a_table_of_shards_at_a_url(web, tmp_path, column):
    for shard in range(2):
        data = pack([(f"{k}.jpg", jpeg(0, k)) for k in range(4 * shard, 4 * shard + 4)])
        (web.folder / f"{shard:03d}.tar").write_bytes(data)
    (web.folder / "shards.txt").write_text("000.tar\n001.tar\n")
    rows = [f"{k},kind_{k % 5}" + (",train" if k < 6 else ",val") * column for k in range(8)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label" + ",split" * column, *rows]))
    table = read_table(tmp_path / "labels.csv")
    there = open_source("tar", web.url, "train" if column else ".", table=table)
    assert len(there) == (6 if column else 8) and there.classes == [f"kind_{k}" for k in range(5)]
    assert [there.label(k) for k in range(6)] == [k % 5 for k in range(6)] and there.read(5) == jpeg(0, 5)


# ----------------------------------------------------------------------------------------------- held out, the summary


def test_the_same_images_are_held_out_there_and_here(web):
    write_shards(web.folder / "train", 10, 20)
    there, here = open_source("tar", web.url, "train/{000..009}.tar"), TarIndex(web.folder / "train")
    held = [hold_out(source, share=0.2)[1] for source in (there, here)]
    assert 20 < len(held[0]) < 60
    assert [held[0].read(k) for k in range(len(held[0]))] == [held[1].read(k) for k in range(len(held[1]))]
    assert fingerprint(held[0]) == fingerprint(held[1]) != fingerprint(hold_out(here, share=0.2)[0])


def test_rows_of_parquet_files_are_held_out_by_file_and_row(tmp_path):
    source = open_source("parquet", parquet_files(tmp_path / "a"), "train")
    assert [source.relative(k) for k in (0, 19, 20, 47)] == [
        "train-0.parquet/0", "train-0.parquet/19", "train-1.parquet/0", "train-2.parquet/7"]  # fmt: skip
    assert [path.decode() for path in source.relatives()] == [source.relative(k) for k in range(60)]
    before = {source.relative(k) for k in hold_out(source, share=0.3)[1].places()}
    assert 5 < len(before) < 35
    parquet_files(tmp_path / "a", 80, 4)  # one file more: none of the others' rows moves
    more = open_source("parquet", tmp_path / "a", "train")
    after = {more.relative(k) for k in hold_out(more, share=0.3)[1].places()}
    assert {path for path in after if "train-3" not in path} == before != after
    assert len(np.unique(path_hashes(more))) == 80 and fingerprint(more) != fingerprint(source)


def test_the_first_line_of_a_run_from_parquet(main_program, tmp_path, capsys):
    settings = {"data_set": "parquet", "data_path": parquet_files(tmp_path / "a"), "epochs": 1, "val_share": "30%"}
    assert main_program(flags(output_dir=tmp_path / "run", **settings)) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert "--val_share 30%" in line and "3 classes in alphabetical order: 0, 1, 2" in line
    assert f"{tmp_path / 'a'}: 60 rows of 3 Parquet files" in line
    assert Run(tmp_path / "run").result()


def test_the_usual_names_of_splits_in_parquet(tmp_path):
    parquet_files(tmp_path / "data").joinpath("train-2.parquet").rename(tmp_path / "data/test-0.parquet")
    assert len(open_source("parquet", tmp_path, "val", part="val")) == 20
    with pytest.raises(ValueError, match="no Parquet files of a split val"):  # a training split is not called test
        open_source("parquet", tmp_path, "val", part="train")


def test_the_summary_of_shards_at_a_url(web):
    write_shards(web.folder / "train", 2, 6)
    source = open_source("tar", web.url, "train/{000..001}.tar")
    said = describe(source, source, "twice")
    assert f"{web.url}/train: 12 .jpg" in said and "0, 1, 2" in said
    web.status = 503
    with pytest.raises(Unreachable, match="after 4 tries"):  # not an image that cannot be opened
        describe(source, source, "twice")


# ---------------------------------------------------------------------------------------------------- validation images


def test_validation_images_at_a_url_are_checked_once(web, tmp_path):
    broken = [jpeg(0, k) if k != 3 else jpeg(0, k)[:-60] for k in range(8)]
    (web.folder / "000.tar").write_bytes(pack([(f"a/{k}.jpg", data) for k, data in enumerate(broken)]))
    cache = {"cache_dir": tmp_path / "cache", "cache_size": None}
    source = TarIndex(f"{web.url}/000.tar", **cache)
    web.status = 503
    with pytest.raises(Unreachable, match="after 4 tries"):
        drop_unreadable(source, 0.01)
    web.status = None
    for reads in (8 + 1, 1):  # all of them, later the bad one alone
        web.requests.clear()
        kept = drop_unreadable(TarIndex(f"{web.url}/000.tar", **cache), 0.01)
        assert [kept.read(k) for k in range(7)] == broken[:3] + broken[4:]
        assert len(kept.dropped) == 1 and f"{web.url}/000.tar at byte" in kept.dropped[0]
        assert sum(asked is not None for _, _, asked in web.requests) == reads + 7
    (web.folder / "000.tar").write_bytes(pack([(f"a/{k}.jpg", jpeg(0, k)) for k in range(8)]))
    assert len(drop_unreadable(TarIndex(f"{web.url}/000.tar", **cache), 0.01)) == 8


# -------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("kind", ["tar", "parquet", "cache"])
def test_threads_read_what_was_asked_for_though_files_are_closed(tmp_path, monkeypatch, kind):
    """With one open file at a time, sixteen threads read from many: each gets its own bytes."""
    monkeypatch.setattr(open_files, "LIMIT", 1)
    monkeypatch.setattr("inputs.parquet.OPEN_FILES", 1)
    if kind == "parquet":
        source = open_source("parquet", parquet_files(tmp_path / "train", 60, 10), "train")
    else:
        write_shards(tmp_path / "train", 12, 5)
        source = TarIndex(tmp_path / "train")
    if kind == "cache":
        source = TarIndex(f"file://{tmp_path}/train", cache_dir=tmp_path / "cache", cache_size=10**9)
        shards = source.shards
        for k in range(12):
            shards.cache.fill(shards.keys[k], shards.stamps[k][0], lambda a, b, k=k: shards.fetch(k, a, b))
        monkeypatch.setattr(shards, "fetch", None)  # all comes from the cache
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        order = np.random.default_rng(0).integers(0, 60, 1200).tolist()
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(lambda k: source.read(k) == jpeg(k % 3, k), order))
    finally:
        sys.setswitchinterval(interval)
    assert pickle.loads(pickle.dumps(source)).read(59) == jpeg(59 % 3, 59) or kind == "cache"


# ------------------------------------------------------------------------------------------------------------- suggest


def test_a_suggestion_for_shards_at_a_url(main_program, web, tmp_path, capsys):
    write_shards(web.folder / "train", 4, 12)
    where = {"data_path": web.url, "train_split": "train/{000..003}.tar", "val_share": "20%"}

    def suggest(**settings):
        given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        code = main_program(["--suggest", "true", "--output_dir", str(tmp_path / "out"), *given])
        return code, *capsys.readouterr()

    code, out, _ = suggest(data_set="tar", **where)
    recipe = yaml.safe_load(out)
    assert code == 0 and "3 classes" in out
    assert {key: recipe[key] for key in ("data_set", *where)} == {"data_set": "tar", **where}
    code, _, err = suggest(**where)
    assert code == 2 and "--data_set tar and parquet read shards" in err and len(err.strip().splitlines()) == 1
