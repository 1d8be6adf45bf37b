"""The benchmarks of input and index in small: their tables, their JSON, their errors."""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench_input(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield importlib.import_module("bench_input")
    sys.modules.pop("bench_input")


def options(folder):
    return argparse.Namespace(data_path=folder, images=4, seed=0, sizes=[24, 32], base_size=32, repetitions=2)


def test_ratios_and_differences(bench_input, tmp_path, capsys):
    (tmp_path / "a/b").mkdir(parents=True)
    for k in range(6):
        noise = np.random.default_rng(k).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 60)).save(tmp_path / f"a/b/{k}.jpg")
    result = bench_input.run(options(tmp_path))
    for name in ("exact", "fast"):
        assert set(result[name]) == {"24", "32"} and all(ratio > 0 for ratio in result[name].values())
        assert all(low <= high for low, high in result["spread"][name].values())
    assert max(result["difference"]["exact"].values()) < 1 < result["difference"]["fast"]["24"]
    assert "reference" in capsys.readouterr().out


def test_a_folder_without_images(bench_input, tmp_path):
    with pytest.raises(SystemExit, match="--data_path"):
        bench_input.run(options(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_simulated_index(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    bench_index = importlib.import_module("bench_index")
    monkeypatch.setattr(bench_index, "LOOKUPS", 2000)
    result = bench_index.run(argparse.Namespace(images=50_000, classes=70, workers=2))
    assert result["images"] == 50_000 and result["opened_s"] < 2 and result["worker_private_mb"] < 50
    sys.modules.pop("bench_index")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_shards_at_a_url(monkeypatch, capfd):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    bench_shards = importlib.import_module("bench_shards")
    monkeypatch.setattr(bench_shards, "LOOKUPS", 2000)
    monkeypatch.setattr("inputs.tar.scan", importlib.import_module("inputs.tar").scan)  # which it replaces
    result = bench_shards.run(argparse.Namespace(images=4, members=30_000, repetitions=1))
    assert result["cached_to_local"] > 0 and result["index_mb"] == pytest.approx(30_000 * 65 / 1e6, rel=0.2)
    assert result["private_mb"] < 50 and "look-ups" in capfd.readouterr().out
