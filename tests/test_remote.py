"""Shards at URLs: S3 and HTTP servers of the tests' own, against the same shards in a local folder."""

import json
import pickle
import re

import numpy as np
import pytest

from config.urls import redact
from inputs import remote
from inputs.bad_files import load
from inputs.decode import BadImage, decode
from inputs.readers import open_source
from inputs.remote import RangeFile, RemoteShards, expand
from inputs.tar import TarIndex
from inputs.views import fingerprint
from tests.buckets import SECRET, WebServer, s3_server, upload, write_shards
from tests.conftest import Run, flags, same
from utils import Unreachable

pytest.importorskip("s3fs")
pytest.importorskip("moto")
SHARDS = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 shards of two training images each, and two of validation images."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "train", SHARDS, 2)
    write_shards(root / "val", 2, 6)
    return root


@pytest.fixture(scope="module")
def bucket(data, tmp_path_factory):
    """The same in a bucket of a local S3 server, for the whole module."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
    with s3_server(patch.setenv) as client:
        upload(client, "bucket", data, "sets/one/")
        yield client
    patch.undo()


@pytest.fixture
def web(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "DELAYS", (0.01,) * 8)
    server = WebServer(data)
    yield server
    server.close()


def pull(source):
    """All images of a source, in the order that its classes do not tell."""
    return [source.read(i) for i in range(len(source))]


# ------------------------------------------------------------------------------------------------------- reading by URL


def test_a_bucket_is_the_same_data_set_as_its_files(data, bucket):
    local = open_source("tar", data, "train")
    there = open_source("tar", "s3://bucket/sets/one", "train")
    assert pull(there) == pull(local) and there.labels().tolist() == local.labels().tolist()
    assert there.classes == local.classes and fingerprint(there) == fingerprint(local)
    assert there.name(0) == "s3://bucket/sets/one/train/000.tar at byte 1536"
    one = open_source("tar", "s3://bucket/sets/one", "val/001.tar")
    assert len(one) == 6 and one.read(0) == open_source("tar", data, "val").read(6)


def test_what_is_not_in_a_bucket_is_named(bucket, monkeypatch):
    for split, said in (("test", "nothing at|no \\*.tar"), ("train/999.tar", "train/999.tar is not there")):
        with pytest.raises(ValueError, match=said):
            open_source("tar", "s3://bucket/sets/one", split)
    with pytest.raises(ValueError, match="--data_set folder reads a folder"):
        open_source("folder", "s3://bucket/sets/one", "train")
    with pytest.raises(ValueError, match="ftpx"):
        open_source("tar", "ftpx://bucket", "train")


def test_shards_are_indexed_by_ranges_once_and_renewed(data, web, tmp_path):
    write_shards(tmp_path / "large/train", 3, 4, fill=100_000)
    web.folder = tmp_path / "large"
    shards = f"{web.url}/train/{{000..002}}.tar"
    whole = sum(path.stat().st_size for path in (web.folder / "train").iterdir())
    index = TarIndex(shards)
    assert len(index) == 12 and web.sent < whole / 5
    assert all(asked for method, _, asked in web.requests if method == "GET")
    web.requests.clear()
    assert TarIndex(shards).read(7) == index.read(7)
    assert [method for method, _, _ in web.requests].count("GET") == 2  # the two images; no header again
    write_shards(tmp_path / "large/train", 3, 5, fill=90_000)
    assert len(TarIndex(shards)) == 15


def test_http_needs_names(data, web, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be listed over http.*shards\.txt.*\{000\.\.146\}"):
        open_source("tar", web.url, "train")
    listed = tmp_path / "listed"
    write_shards(listed / "train", 3, 2)
    web.folder = listed
    (listed / "train/shards.txt").write_text("# of today\n002.tar\n\n000.tar\n")
    assert open_source("tar", web.url, "train").shards.names == ["000.tar", "002.tar"]
    (listed / "train/shards.txt").write_text("000.tar?X-Amz-Signature=abcdef\n")
    with pytest.raises(ValueError, match=r"query") as caught:
        open_source("tar", web.url, "train")
    assert "abcdef" not in str(caught.value)
    web.ranges = False
    with pytest.raises(Unreachable, match=r"000\.tar: its server does not serve parts of files"):
        TarIndex(f"{web.url}/train/{{000..001}}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{0..1}-{3..4}.tar", ["0-3.tar", "0-4.tar", "1-3.tar", "1-4.tar"]),
        ("a.tar", ["a.tar"]),
    ],
)
def test_braces(pattern, names):
    assert expand(pattern) == names


def test_braces_with_something_else():
    with pytest.raises(ValueError, match="two numbers"):
        expand("{a,b}.tar")


def test_a_file_of_ranges_reads_as_the_file_does():
    rng = np.random.default_rng(0)
    content = rng.bytes(50_000)
    file = RangeFile(lambda start, stop: content[start:stop], len(content))
    for _ in range(300):
        start, size = int(rng.integers(0, 52_000)), int(rng.choice([1, 512, 9_000, 20_000]))
        assert file.seek(start) == start
        assert file.read(size) == content[start : start + size]
    assert file.seek(-10, 2) == 49_990 and file.read() == content[-10:]


# ------------------------------------------------------------------------------------------------------- a bad network


def test_dropped_connections_are_tried_again(data, web):
    web.drop = 0.2
    there = open_source("tar", web.url, f"train/{{000..{SHARDS - 1:03d}}}.tar")
    assert pull(there) == pull(open_source("tar", data, "train")) and web.dropped > 50


def test_a_server_that_is_away_is_named_after_all_tries(web, monkeypatch):
    index = TarIndex(f"{web.url}/train/000.tar")
    web.drop = 1.0
    before = len(web.requests)
    with pytest.raises(Unreachable, match=r"train/000\.tar cannot be read after 9 tries \(.*check the connection"):
        load(index, 0, decode)  # not a bad image, which another would replace
    assert len(web.requests) - before >= 9
    web.drop, web.status = 0.0, 403
    before = len(web.requests)
    with pytest.raises(Unreachable, match="check the address and the credentials"):
        index.read(0)
    assert len(web.requests) - before == 1
    web.status = 404
    with pytest.raises(BadImage, match=r"000\.tar"):  # gone, as a local file may be
        load(index, 0, decode)


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (503, Unreachable, "after 9 tries"),
        (403, Unreachable, "the credentials"),
        (404, ValueError, "train/000.tar is not there"),
    ],
)
def test_a_server_that_refuses_from_the_start(web, status, kind, said):
    web.status = status
    with pytest.raises(kind, match=said):
        open_source("tar", web.url, "train/{000..003}.tar")


def test_delays_grow():
    delays = remote.DELAYS
    assert delays[0] < 1 and list(delays) == sorted(delays) and 30 < sum(delays) < 300


def test_a_run_ends_with_one_line_when_the_server_goes(main_program, web, tmp_path, capfd):
    settings = flags(data_set="tar", data_path=web.url, train_split="train/{000..019}.tar", val_split="val/000.tar",
                     output_dir=tmp_path / "out", num_workers=1, epochs=40)  # fmt: skip
    asked = web.answer

    def fail_later(handler, body):
        web.status = 503 if len(web.requests) > 200 else None
        asked(handler, body)

    web.answer = fail_later
    assert main_program(settings) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: http://127.*\.tar cannot be read after 9 tries \(.*503", last)


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_second_pass_is_local(data, web, tmp_path):
    url = f"{web.url}/train/{{000..019}}.tar"
    index = TarIndex(url, cache_dir=tmp_path / "cache", cache_size=10**9)
    for i in range(len(index)):  # one download is on its way at a time
        index.read(i)
        index.shards.cache.wait()
    whole = [path for _, path, asked in web.requests if asked and path.endswith(".tar")]
    assert len(whole) >= 20
    web.status = 503
    again = pickle.loads(pickle.dumps(index))  # as in a worker that is started afresh
    assert pull(again) == pull(TarIndex(data / "train"))[: len(index)]


@pytest.fixture
def run(main_program, tmp_path):
    def call(name, code=0, **settings):
        base = {"data_set": "tar", "epochs": 1, "num_workers": 2, "save_interval": "7 steps", "keep_checkpoints": 9}
        assert main_program(flags(output_dir=tmp_path / name, **{**base, **settings})) == code
        return Run(tmp_path / name)

    return call


def test_two_hundred_shards_a_small_cache_dropped_connections_and_a_stop(run, data, web, tmp_path):
    """The end is that of a run on the local files, bit by bit; the cache never takes more than its quarter."""
    whole = run("local", data_path=data)
    total = sum(path.stat().st_size for path in (data / "train").glob("*.tar"))
    web.drop = 0.2
    there = {
        "data_path": web.url,
        "train_split": f"train/{{000..{SHARDS - 1}}}.tar",
        "val_split": "val/{000..001}.tar",
        "cache_dir": tmp_path / "cache",
        "cache_size": total / 4 / 1e9,
    }
    run("there", stop_after="20 steps", **there)
    assert not same(whole.result()["state"]["model"], Run(tmp_path / "there").result()["state"]["model"])
    resumed = run("there", **there)
    assert same(whole.result()["state"], resumed.result()["state"]) and whole.result()["log"] == resumed.result()["log"]
    assert web.dropped > 50
    kept = [path.stat().st_size for path in (tmp_path / "cache/shards").glob("*.shard")]
    assert total / 8 < sum(kept) <= total / 4
    other = run("seed", seed=1, **there)  # the negative control
    assert not same(whole.result()["state"]["model"], other.result()["state"]["model"])


def test_a_run_from_a_bucket_keeps_its_credentials_to_itself(run, data, bucket, tmp_path, capfd):
    there = run("bucket", data_path="s3://bucket/sets/one", cache_dir=tmp_path / "cache", epochs=0.3)
    local = run("local", data_path=data, epochs=0.3)
    assert same(there.result()["state"], local.result()["state"])
    printed = "".join(capfd.readouterr())
    assert SECRET not in printed and "AKIATESTKEY" not in printed
    for folder in (there.output, tmp_path / "cache"):
        for path in folder.rglob("*"):
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes() and b"AKIATESTKEY" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "url",
    ["https://me:hunter2@host/data", "s3://KEY:hunter2@bucket/data", "https://host/data?sig=hunter2&x=1",
     "https://host/a.tar#hunter2"],
)  # fmt: skip
def test_credentials_in_a_url_are_refused(main_program, tmp_path, capfd, url):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"data_set": "tar", "data_path": url}))
    out = tmp_path / "out"
    for argv in (flags(data_set="tar", data_path=url, output_dir=out),
                 [*flags(output_dir=out), "--recipe", str(recipe)],
                 flags(data_path=url, doctor=True), flags(data_path=url, plan="table"),
                 flags(data_path=url, suggest=True)):  # fmt: skip
        assert main_program(argv) == 2
        printed = "".join(capfd.readouterr())
        assert "hunter2" not in printed and "leave them out" in printed
    assert not out.exists()


def test_redacted():
    assert redact("x https://u:p@h/a?t=1 and s3://k@b/c.") == "x https://***@h/a?*** and s3://***@b/c."
    assert redact("url='https://h/a?X-Amz-Signature=ab', 403") == "url='https://h/a?***', 403"
    assert redact("hf://datasets/a/b@main/c at byte 3 of 5? yes") == "hf://datasets/a/b@main/c at byte 3 of 5? yes"


def test_a_library_that_prints_a_signed_address(monkeypatch):
    def fail():
        raise OSError("400, url='https://cdn/x?X-Amz-Signature=abcdef'")

    monkeypatch.setattr(remote, "DELAYS", (0.0,))
    with pytest.raises(Unreachable) as caught:
        remote.retried(fail, "hf://datasets/x")
    import traceback

    assert "abcdef" not in "".join(traceback.format_exception(caught.value))


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def fail(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(ValueError, match="pip install s3fs"):
        RemoteShards("s3://bucket/train", "*.tar")


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({}, "in every pass: set --cache_dir .* --cache_size 1,"),
        ({"cache_size": 1.0}, r"the cache suffices \(\d+% of them are in it\)"),
        ({"cache_size": 0.0001}, r"does not suffice, holds \d+% of them, .*; set --cache_size 1"),
    ],
)
def test_the_doctor_says_whether_the_cache_suffices(main_program, web, tmp_path, capsys, monkeypatch, cache, said):
    from commands import doctor

    monkeypatch.setattr(doctor, "SECONDS", 0.02)
    where = {"data_set": "tar", "data_path": web.url, "train_split": "train/{000..099}.tar"}
    cache = {**cache, "cache_dir": tmp_path / "cache"} if cache else {}
    assert main_program(flags(**where, **cache, val_per_class=1, doctor=True)) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("100 shards"))
    assert re.search(
        rf"^100 shards of 0.00 GB at {web.url}/train, read there at [\d,]+ images/s a worker.*{said}", line
    )
