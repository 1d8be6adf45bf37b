"""Many short runs with random faults, each of which has to end as if nothing had been: scripts/soak.sh.

Every run draws its settings and its faults from its own seed, which is printed, so ``--only SEED`` does it again. A
fault spoils one launch; then the same command is launched again, until one is left alone and has to finish with the
weights, moments, averages and log of a run without faults.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Run, flags, same, write_images
from processes import Program, call_before, free_port, kill_after_step, signal_self, world
from test_faults_numerics import poison
from test_faults_storage import Storage

from models import checkpoints

STEPS = 22
COMMON = {"model_ema": True, "micro_batch": 2, "eval_interval": "10%", "log_interval": "3 steps", "timeout": 0.2}
SETTINGS = {  # by name: number of processes, settings
    "one": (1, {"save_interval": "2 steps"}),
    "one, loader process": (1, {"save_interval": "0.003 minutes", "num_workers": 1, "clip_grad": 1.0}),
    "one, fp16": (1, {"save_interval": "3 steps", "amp": "fp16", "opt": "lamb"}),
    "one, Transformer": (1, {"save_interval": "1 steps", "model": "test_vit", "drop_path": 0.1}),
    "two": (2, {"save_interval": "2 steps"}),
    "two, loader processes": (2, {"save_interval": "0.003 minutes", "num_workers": 1}),
}
lock = threading.Lock()  # around starting processes: their server takes one at a time


class Failure(AssertionError):
    """A promise that was not kept."""


# -- faults: functions of (rng, launch) that start a launch's processes with something going wrong ---------------------


class Launch:
    """The same command, again: processes, where their output goes, and what was saved before."""

    def __init__(self, argv, folder, size, number):
        self.argv, self.folder, self.size, self.number = argv, folder, size, number
        self.output = folder / "run"
        self.programs = []

    def start(self, faults=None):
        log = self.folder / f"log{self.number}"
        with lock:
            if self.size == 1:
                self.programs = [Program(self.argv, f"{log}.0", fault=(faults or {}).get(0))]
            else:
                self.programs = world(self.argv, log, self.size, faults=faults)

    def wait(self):
        codes = [program.wait(120) for program in self.programs]
        for program, code in zip(self.programs, codes):
            # Loader processes of one that was killed may complain of that.
            if "Traceback" in program.output and code != -signal.SIGKILL:
                raise Failure(f"a traceback in {program.log}")
        return codes


def anyone(rng, launch):
    return rng.randrange(launch.size)


def killed_at_a_random_time(rng, launch):
    launch.start()
    time.sleep(rng.uniform(0, 2.5))
    program = launch.programs[anyone(rng, launch)]
    if program.process.is_alive():
        program.signal(signal.SIGKILL)


def all_killed_at_a_random_time(rng, launch):
    launch.start()
    time.sleep(rng.uniform(0, 2.5))
    for program in launch.programs:
        if program.process.is_alive():
            program.signal(signal.SIGKILL)


def killed_after_a_step(rng, launch):
    launch.start({anyone(rng, launch): partial(kill_after_step, rng.randint(1, STEPS))})


def stopped_at_a_random_time(rng, launch):
    launch.start()
    time.sleep(rng.uniform(0, 2.5))
    program = launch.programs[anyone(rng, launch)]
    for _ in range(rng.randint(1, 3)):
        if program.process.is_alive():
            program.signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))


def stopped_at_a_place(rng, launch):
    place = rng.choice(["after_step", "save", "after_batch", "record", "finish", "enter"])
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
    fault = partial(call_before, f"training.session:Session.{place}", signal_self, number, count=rng.randint(1, 6))
    launch.start({anyone(rng, launch): fault})


def disk_failing(rng, launch):
    launch.start({0: partial(fail_storage, rng.randint(1, 600), rng.choice([28, 5, 30]), rng.randint(1, 200))})


def killed_while_writing(rng, launch):
    launch.start({0: partial(kill_in_storage, rng.randint(1, 600), rng.random() < 0.5)})


def newest_checkpoint_damaged(rng, launch):
    """Between launches; the launch itself is killed."""
    found = newest(launch.output)
    if found is not None:
        path = found[0]
        data = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        for name in launch.output.glob("checkpoint-*.pth"):
            if name.samefile(path) and name != path:
                name.unlink()
        path.write_bytes(data)
        if newest(launch.output) is None:  # a person would have to look: here, they start again
            for name in launch.output.glob("checkpoint-*.pth"):
                name.unlink()
    killed_after_a_step(rng, launch)


def loss_not_finite(rng, launch):
    kind = "gradient" if "--clip_grad" in launch.argv else "loss"
    rank = anyone(rng, launch)
    launch.start({rank: partial(poison, rng.randrange(STEPS), kind=kind, rank=rank)})


def loader_process_killed(rng, launch):
    fault = partial(call_before, "inputs.bad_files:load", end_if_loader, signal.SIGKILL, count=rng.randint(1, 60))
    launch.start({anyone(rng, launch): fault})


def process_hanging(rng, launch):
    fault = partial(call_before, "training.session:Session.after_step", time.sleep, 1000, count=rng.randint(1, STEPS))
    launch.start({anyone(rng, launch): fault})


FAULTS = {
    killed_at_a_random_time: 4,
    all_killed_at_a_random_time: 2,
    killed_after_a_step: 4,
    stopped_at_a_random_time: 4,
    stopped_at_a_place: 4,
    disk_failing: 3,
    killed_while_writing: 3,
    newest_checkpoint_damaged: 3,
    loss_not_finite: 2,
    loader_process_killed: 1,
    process_hanging: 0.5,
}


def fail_storage(number, error, calls):
    """From the ``number``-th call by which checkpoints are written on, ``calls`` of them fail."""
    import pytest

    def fail():
        storage.left = 1 if storage.failed < calls else -1
        storage.failed += 1
        raise OSError(error, os.strerror(error))

    storage = Storage(number, fail)
    storage.failed = 0
    storage.install(pytest.MonkeyPatch())


def kill_in_storage(number, half):
    import pytest

    Storage(number, partial(os.kill, os.getpid(), signal.SIGKILL), half).install(pytest.MonkeyPatch())


def end_if_loader(number):
    import multiprocessing

    if multiprocessing.current_process().daemon:  # as loader processes are
        os.kill(os.getpid(), number)


# -- runs --------------------------------------------------------------------------------------------------------------


def newest(output):
    try:
        return checkpoints.newest(output) if output.is_dir() else None
    except checkpoints.BadCheckpoint:
        return None


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
        fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
        before = newest(folder / "run")
        launch = Launch(argv, folder, size, number)
        fault(rng, launch)
        codes = launch.wait()
        told.append(f"{fault.__name__} {codes}")
        counts[fault.__name__] += 1
        if set(codes) - {0, 1, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1}:
            raise Failure(f"exit codes {told}")
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
    parser.add_argument("--minutes", type=float, default=10.0, help="no more runs are begun after this")
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
