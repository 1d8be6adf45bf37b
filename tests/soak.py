"""Many short runs with random faults, each of which has to end as if nothing had been: scripts/soak.sh.

Every run draws its settings and its faults from its own seed, which is printed, so ``--only SEED`` does it again; the
first fault is dealt, so that every kind comes first in some run of each len(DECK) consecutive seeds. A fault spoils
one launch; then the same command is launched again, until one is left alone and has to finish with the
weights, moments, averages and log of a run without faults.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Run, flags, same, write_images
from processes import free_port
from soak_faults import DECK, STOPS, Failure, Launch, newest, newest_checkpoint_damaged

COMMON = {"model_ema": True, "micro_batch": 2, "eval_interval": "10%", "log_interval": "3 steps", "timeout": 0.2}
SETTINGS = {  # by name: number of processes, settings
    "one": (1, {"save_interval": "2 steps"}),
    "one, loader process": (1, {"save_interval": "0.003 minutes", "num_workers": 1, "clip_grad": 1.0}),
    "one, fp16": (1, {"save_interval": "3 steps", "amp": "fp16", "opt": "lamb"}),
    "one, Transformer": (1, {"save_interval": "1 steps", "model": "test_vit", "drop_path": 0.1}),
    "two": (2, {"save_interval": "2 steps"}),
    "two, loader processes": (2, {"save_interval": "0.003 minutes", "num_workers": 1}),
}


# -- runs --------------------------------------------------------------------------------------------------------------


def beyond_saving(codes):
    return set(codes) - {0, 1, 75, 130, *(-number for number in (signal.SIGKILL, *STOPS))}


def soak(seed, root, expected, counts):
    """One run with one to three faults. Raises Failure where it does not end as ``expected``."""
    rng = random.Random(seed)
    name = rng.choice(list(SETTINGS))
    size, settings = SETTINGS[name]
    folder = root / f"soak-{seed}"
    folder.mkdir()
    argv = flags(output_dir=folder / "run", data_path=root / "data", **COMMON, **settings)
    told = []
    for number in range(rng.randint(1, 3)):
        fault = rng.choice(DECK) if number else DECK[seed % len(DECK)]
        before = newest(folder / "run")
        launch = Launch(argv, folder, size, number)
        fault(rng, launch)
        codes = launch.wait()
        told.append(f"{fault.__name__} {codes}")
        counts[fault.__name__] += 1
        if beyond_saving(codes) - ({2} if launch.refused else set()):
            raise Failure(f"exit codes {told}")
        if launch.unharmed and set(codes) != {0}:
            raise Failure(f"a process that was stopped and continued ended with {codes}: {told}")
        if launch.refused and (set(codes) != {2} or launch.refused not in launch.programs[0].output):
            raise Failure(f"a changed setting was not refused: {codes}: {told}")
        after = newest(folder / "run")
        lost = before is not None and (after is None or after[1]["step"] < before[1]["step"])
        if lost and fault is not newest_checkpoint_damaged:
            raise Failure(f"lost the checkpoint of step {before[1]['step']}: {told}")
        if 75 in codes and not (folder / "run" / "stopped.json").exists():
            raise Failure(f"stopped without a note: {told}")
    launch = Launch(argv, folder, size, "-last")
    launch.start()
    codes = launch.wait()
    if set(codes) != {0}:
        raise Failure(f"the launch without a fault ended with {codes} after {told}")
    if not same(Run(folder / "run").result(), expected[name]):
        raise Failure(f"ended otherwise than without faults: {told}")
    shutil.rmtree(folder)
    return name, told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more runs are begun after this")
    parser.add_argument("--seed", type=int, default=0, help="the runs have the seeds from here on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", type=int, help="do the run of this seed alone, and keep its folder")
    options = parser.parse_args()
    free_port()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    write_images(root / "data" / "train", [16, 16, 16])
    write_images(root / "data" / "val", [5, 5, 5], seed=1)
    expected = {}
    for name, (size, settings) in SETTINGS.items():
        folder = root / f"undisturbed-{len(expected)}"
        folder.mkdir()
        argv = flags(output_dir=folder / "run", data_path=root / "data", **COMMON, **settings)
        launch = Launch(argv, folder, size, 0)
        launch.start()
        assert set(launch.wait()) == {0}, launch.programs[0].output
        expected[name] = Run(folder / "run").result()
    # Negative control: the comparison tells runs apart.
    assert not same(expected["one"], expected["one, fp16"])

    counts, ends, failures = Counter(), Counter(), []

    def one(seed):
        if time.monotonic() - started > 60 * options.minutes:
            ends["not begun"] += 1
            return
        try:
            name, told = soak(seed, root, expected, counts)
            ends["identical"] += 1
            print(f"seed {seed}: {name}: {', '.join(told)}: identical", flush=True)
        except Exception as error:
            ends["failed"] += 1
            failures.append(seed)
            print(f"seed {seed}: FAILED: {error} (see {root / f'soak-{seed}'})", flush=True)

    seeds = [options.only] if options.only is not None else range(options.seed, options.seed + options.runs)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, seeds))
    print(f"\nfaults injected: {sum(counts.values())}")
    for name, count in counts.most_common():
        print(f"  {count:4d}  {name.replace('_', ' ')}")
    runs = ends["identical"] + ends["failed"]
    print(f"runs: {runs}, identical endings: {ends['identical']}, failed: {ends['failed']}", end="")
    print(f", not begun for lack of time: {ends['not begun']}", end="" if ends["not begun"] else "\r")
    print(f"\nseconds: {time.monotonic() - started:.0f}")
    if failures:
        print(f"failed seeds: {failures}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
