"""The cache of whole shards: what makes room, what stays, several processes, and deaths in the middle."""

import multiprocessing
import os

from inputs import cache as cache_module
from inputs.cache import ShardCache
from utils import Unreachable


def fetcher(content, calls):
    def fetch(start, stop):
        calls.append((start, stop))
        return content[start:stop]

    return fetch


def test_the_least_recently_used_shard_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BUSY", 0.0)
    cache, calls = ShardCache(tmp_path / "c", 2500), []
    for k, key in enumerate("abc"):
        assert cache.fill(key, 1000, fetcher(bytes([k]) * 1000, calls))
        os.utime(cache._whole(key), (k + 1, k + 1))
        if key == "b":
            cache._touched.clear()
            assert cache.read("a", 5, 10) == b"\0" * 10  # a is now used after b
    assert cache.held(["a", "b", "c"]) == [True, False, True]
    assert cache.read("b", 0, 1) is None and len(calls) == 3
    assert not cache.fill("huge", 3000, fetcher(b"", calls)) and cache.held(["a", "c"]) == [True, True]


def test_a_shard_in_use_stays(tmp_path):
    cache, calls = ShardCache(tmp_path, 1500), []
    assert cache.fill("a", 1000, fetcher(b"a" * 1000, calls))
    assert not cache.fill("b", 1000, fetcher(b"b" * 1000, calls)) and calls == [(0, 1000)]
    assert cache.read("a", 0, 3) == b"aaa"


def test_a_reader_notices_that_another_process_evicted(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BUSY", 0.0)
    mine, other = ShardCache(tmp_path, 1500), ShardCache(tmp_path, 1500)
    mine.fill("a", 1000, fetcher(b"a" * 1000, []))
    assert mine.read("a", 0, 3) == b"aaa"
    assert other.fill("b", 1000, fetcher(b"b" * 1000, []))
    assert mine.read("a", 0, 3) is None and mine.read("b", 0, 3) == b"bbb"


def _fill_many(folder, shards, log):
    cache = ShardCache(folder, 10**6)
    for key in shards:
        content = key.encode() * 500
        if not cache.held([key])[0]:
            cache.fill(key, 1000, lambda start, stop, key=key, content=content: _logged(log, key, content[start:stop]))


def _logged(log, key, data):
    with open(log, "a") as file:
        file.write(key + "\n")
    return data


def test_processes_download_each_shard_once(tmp_path):
    keys = [f"{k:02d}" for k in range(40)]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_fill_many, args=(tmp_path / "c", keys, tmp_path / "log")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted((tmp_path / "log").read_text().split()) == keys
    assert all(ShardCache(tmp_path / "c", 1).read(key, 0, 1000) == key.encode() * 500 for key in keys)


def _die_in_the_middle(folder):
    def fetch(start, stop):
        if start:
            os._exit(9)
        return b"x" * (stop - start)

    ShardCache(folder, 10**9).fill("a", cache_module.CHUNK + 1, fetch)


def test_a_process_that_is_killed_leaves_nothing_that_is_used(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_die_in_the_middle, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9 and (tmp_path / "a.part").exists()
    cache = ShardCache(tmp_path, cache_module.CHUNK + 100)  # room for one: the part must go first
    assert cache.read("a", 0, 1) is None
    assert cache.fill("a", 1000, fetcher(b"y" * 1000, []))
    assert cache.read("a", 0, 2) == b"yy" and not (tmp_path / "a.part").exists()


def test_a_failed_download_leaves_nothing(tmp_path):
    def fetch(start, stop):
        raise Unreachable("away")

    cache = ShardCache(tmp_path, 10**6)
    assert not cache.fill("a", 1000, fetch)
    assert [path.name for path in tmp_path.iterdir()] == [cache_module.LOCK]
