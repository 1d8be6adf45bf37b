"""Shards at a URL: a pass from a warm cache against local tar files; memory of the book-keeping (`bench.py shards`)."""

import argparse
import io
import multiprocessing
import os
import random
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_index import memory
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inputs.tar
from curriculum.augment import RandAugment
from inputs.cache import WHOLE
from inputs.members import Member, Scan
from inputs.tar import TarIndex
from inputs.transforms import TrainTransform

LOOKUPS = 100_000
PER_SHARD = 1000  # images, in the simulated set


def run(args: argparse.Namespace) -> dict:
    """One core, images of 500 x 375 in shards of 200; the URL is a file:// one, so that no network is measured."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="shards_"))
    try:
        return {**passes(root, args.images, args.repetitions), **bookkeeping(root / "large", args.members)}
    finally:
        shutil.rmtree(root)


def passes(root: Path, images: int, repetitions: int) -> dict:
    """Images/s of both, with and without decoding and augmenting; ratios of the medians, taken in turn."""
    write_shards(root / "train", images)
    local = TarIndex(root / "train")
    cached = TarIndex(f"file://{root}/train", cache_dir=root / "cache", cache_size=10**12)
    for k, (key, stamp) in enumerate(zip(cached.shards.keys, cached.shards.stamps)):
        cached.shards.cache.fill(key, stamp[0], lambda start, stop, k=k: cached.shards.fetch(k, start, stop))
    transform = TrainTransform(224, "lanczos", RandAugment())
    order = random.Random(0).sample(range(len(local)), len(local))
    seconds = {(name, whole): [] for name in ("local", "cached") for whole in (True, False)}
    for _ in range(repetitions + 1):
        for whole in (True, False):
            for name, source in (("local", local), ("cached", cached)):
                start = time.perf_counter()
                for i in order:
                    data = source.read(i)
                    if whole:
                        transform(data, 160, 9.0, i)
                seconds[name, whole].append(time.perf_counter() - start)
    rate = {key: len(order) / float(np.median(times[1:])) for key, times in seconds.items()}
    result = {
        "cached_to_local": round(rate["cached", True] / rate["local", True], 3),
        "cached_to_local_reading": round(rate["cached", False] / rate["local", False], 3),
    }
    print(
        f"a pass at B 160: local tar files {rate['local', True]:,.0f} images/s, warm cache "
        f"{rate['cached', True]:,.0f}, {result['cached_to_local']:.3f}x; reading alone {rate['local', False]:,.0f} and "
        f"{rate['cached', False]:,.0f}, {result['cached_to_local_reading']:.3f}x"
    )
    return result


def write_shards(folder: Path, images: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for first in range(0, images, 200):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as archive:
            for k in range(first, min(first + 200, images)):
                small = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
                file = io.BytesIO()
                small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
                info = tarfile.TarInfo(f"{k % 10}/{k:07d}.jpg")
                info.size = file.tell()
                file.seek(0)
                archive.addfile(info, file)


def bookkeeping(root: Path, members: int) -> dict:
    """Memory that a process needs for the index and the cache of a simulated set, all of which is in the cache."""
    shards = -(-members // PER_SHARD)
    (root / "train").mkdir(parents=True)
    for k in range(shards):
        (root / f"train/{k:06d}.tar").touch()
    inputs.tar.scan = lambda source, k, **_: Scan(
        [
            Member(1024 + j * 112_128, 110_000, f"{(k * PER_SHARD + j) % 21_841:05d}/{k * PER_SHARD + j:08d}.jpg")
            for j in range(min(PER_SHARD, members - k * PER_SHARD))
        ]
    )
    grown = []
    for _ in range(2):  # the first time writes the index, the second is what is measured
        with multiprocessing.get_context("fork").Pool(1) as pool:
            grown = pool.apply(look_up, (root,))
            pool.close()
            pool.join()  # leaving the block would end the worker by a signal that the program may have taken over
    size = sum(path.stat().st_size for path in (root / "cache").glob("*image_index*"))
    result = {"members": members, "private_mb": round(grown[0], 1), "index_mb": round(size / 1e6, 1)}
    print(
        f"{members:,} members in {shards:,} shards: index file of {result['index_mb']} MB; after {LOOKUPS:,} random "
        f"look-ups a process has {grown[0]:.1f} MB of its own for index and cache ({grown[1]:.1f} MB resident, with "
        "pages of the file that the system may drop)"
    )
    return result


def look_up(root: Path) -> tuple[float, float]:
    """(own, resident) MB that this process grows by: it opens the set and looks up images at random."""
    before = memory()
    index = TarIndex(f"file://{root}/train", cache_dir=root / "cache", cache_size=10**15)
    if not index.shards.cache.held(index.shards.keys[:1])[0]:
        for key in index.shards.keys:  # files of holes
            path = root / "cache/shards" / (key + WHOLE)
            path.touch()
            os.truncate(path, PER_SHARD * 112_128 + 1024)
        return 0.0, 0.0
    rng = random.Random(0)
    for _ in range(LOOKUPS):
        i = rng.randrange(len(index))
        shard, offset, _ = index._entry(i)
        index.label(i)
        if index.shards.cache.read(index.shards.keys[shard], offset, 1) is None:
            raise SystemExit(f"error: image {i} is not in the cache")
    after = memory()
    return after[0] - before[0], after[1] - before[1]
