"""What a large folder costs each process: a simulated index, its opening time and memory (`bench.py index`)."""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inputs.folder import Directory, FolderIndex, write_index
from inputs.index_file import INDEX_NAME, open_or_build

LOOKUPS = 200_000


def run(args: argparse.Namespace) -> dict:
    """Simulates a folder of many classes and images, opens it, and looks up images at random in several workers."""
    root = Path(tempfile.mkdtemp(prefix="index_"))
    try:
        return measure(root, args.images, args.classes, args.workers)
    finally:
        shutil.rmtree(root)


def measure(root: Path, images: int, classes: int, workers: int) -> dict:
    names = [f"n{k:08d}" for k in range(classes)]
    for name in names:
        (root / name).mkdir()
    start = time.perf_counter()
    cache = root / ".cache"
    open_or_build(
        str(root), INDEX_NAME, cache, lambda file: write_index(file, listing(root, names, images)), lambda _: False
    )
    built = time.perf_counter() - start
    start = time.perf_counter()
    index = FolderIndex(root, cache_dir=cache)
    opened = time.perf_counter() - start
    if len(index) != images:
        raise SystemExit(f"error: the index has {len(index)} of {images} images")
    fork = multiprocessing.get_context("fork")
    with fork.Pool(workers, initializer=keep, initargs=(index,)) as pool:
        grown = pool.map(look_up, range(workers), chunksize=1)
        pool.close()
        pool.join()  # leaving the block would end the workers by a signal that the program may have taken over
    result = {
        "images": images,
        "classes": classes,
        "index_mb": round(os.path.getsize(index._index.place) / 1e6, 1),
        "written_s": round(built, 1),
        "opened_s": round(opened, 2),
        "worker_private_mb": round(max(private for private, _, _ in grown), 1),
        "worker_resident_mb": round(max(resident for _, resident, _ in grown), 1),
        "lookup_us": round(max(lookup for _, _, lookup in grown), 1),
    }
    print(
        f"{images} images in {classes} classes: index of {result['index_mb']} MB, opened in {result['opened_s']} s; "
        f"after {LOOKUPS} random look-ups each of {workers} workers has {result['worker_private_mb']} MB more of its "
        f"own ({result['worker_resident_mb']} MB more resident), {result['lookup_us']} us a look-up"
    )
    return result


def listing(root: Path, names: list[str], images: int):
    """Classes of about equal size, with file names like ImageNet's; the folders are really there, empty."""
    for k, name in enumerate(names):
        count = images * (k + 1) // len(names) - images * k // len(names)
        files = [f"{name}_{number}.JPEG" for number in range(count)]
        yield name, [Directory(name, os.stat(root / name).st_mtime_ns, files)]


def keep(index: FolderIndex) -> None:
    global kept
    kept = index


def look_up(worker: int) -> tuple[float, float, float]:
    """(own MB, resident MB) that this process grows by, and CPU microseconds per look-up."""
    kept.path(0), kept.label(0)
    before = memory()
    rng = random.Random(worker)
    start = time.process_time()
    for _ in range(LOOKUPS):
        i = rng.randrange(len(kept))
        kept.path(i)
        kept.label(i)
    seconds = time.process_time() - start
    after = memory()
    return after[0] - before[0], after[1] - before[1], 1e6 * seconds / LOOKUPS


def memory() -> tuple[float, float]:
    """(own, resident) MB of this process; Linux only."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]:
        key, value = line.split(":")
        fields[key] = int(value.split()[0]) / 1024
    return fields["Private_Clean"] + fields["Private_Dirty"], fields["Rss"]
