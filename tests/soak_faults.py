"""The faults of tests/soak.py: functions of (rng, launch) that start a launch with something going wrong."""

import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path

from processes import Program, call_before, kill_after_step, several, signal_self, world
from test_faults_numerics import poison
from test_faults_storage import Storage
from test_faults_world import STEP, stop_for

from models import checkpoints
from utils import STOP_SIGNALS

STEPS = 22
STOPS = [getattr(signal, name) for name in STOP_SIGNALS]
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
        self.refused, self.unharmed = None, False

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
            # Loader processes of one that was killed may complain of that; a SIGINT may come before main's handler.
            if "Traceback" in program.output and code != -signal.SIGKILL and "KeyboardInterrupt" not in program.output:
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
            program.signal(rng.choice(STOPS))


def stopped_at_a_place(rng, launch):
    place = rng.choice(["after_step", "save", "after_batch", "record", "finish", "enter"])
    number = rng.choice(STOPS)
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


def second_writer(rng, launch):
    """The same command, while the first one stands still; it has to refuse, and to leave everything as it was."""
    place = partial(call_before, STEP, signal_self, signal.SIGSTOP, count=rng.randint(1, STEPS // 2))
    launch.start({0: place})
    first = launch.programs
    while first[0].process.is_alive() and not stands_still(first[0].process.pid):
        time.sleep(0.05)
    if not first[0].process.is_alive():
        return
    before = contents(launch.output)
    second = Launch(launch.argv, launch.folder, launch.size, f"{launch.number}-second")
    second.start()
    codes = second.wait()
    if set(codes) != {1} or "another run writes there" not in second.programs[0].output:
        raise Failure(f"a second writer ended with {codes}")
    if contents(launch.output) != before:
        raise Failure("a second writer changed something")
    launch.unharmed = launch.size == 1
    for program in first:
        program.signal(signal.SIGCONT)


def changed_setting(rng, launch):
    """One that changes the result is refused, and one that does not makes no difference."""
    flag, value = rng.choice([("--lr", "2e-3"), ("--mixup", "0.1"), ("--batch_size", "16"), ("--amp", "bf16")])
    if newest(launch.output) is None:  # there is nothing yet that it could differ from
        begun = Launch(launch.argv, launch.folder, launch.size, f"{launch.number}-begun")
        begun.start(dict.fromkeys(range(launch.size), partial(kill_after_step, rng.randint(STEPS // 2, STEPS))))
        begun.wait()
    known = newest(launch.output)
    launch.argv = [*launch.argv, *((flag, value) if known else ())]  # saving by the clock, it may have saved nothing
    launch.start()
    launch.refused = known and f"--allow_change {flag[2:]}"


def output_gone(rng, launch):
    """Standard output and error are full, or nobody reads them any longer; then the launch is killed."""
    lose = partial(call_before, STEP, lose_output, rng.random() < 0.5, count=rng.randint(1, 6))
    kill = partial(kill_after_step, rng.randint(1, STEPS))
    launch.start({anyone(rng, launch): partial(several, lose, kill)})


def process_stopped(rng, launch):
    """By SIGSTOP, and continued: one for a while, or all for longer than --timeout; as if nothing had been."""
    long = rng.random() < 0.2
    fault = partial(call_before, STEP, stop_for, 14 if long else rng.uniform(0.1, 2), count=rng.randint(1, STEPS))
    launch.start(dict.fromkeys(range(launch.size) if long else [anyone(rng, launch)], fault))
    launch.unharmed = True


def index_damaged(rng, launch):
    """Flipped bits in the indices of the images, between launches; the launch itself is killed."""
    cache = Path(os.environ["XDG_CACHE_HOME"], "efficienttrain")
    paths = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    if not paths:
        raise Failure("there is no index that could be damaged")
    for path in paths:
        if data := bytearray(path.read_bytes()):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            damaged = path.with_name(f".damaged-{launch.folder.name}")
            damaged.write_bytes(data)
            os.replace(damaged, path)  # others may be reading it
    killed_after_a_step(rng, launch)


FAULTS = {
    second_writer: 2,
    changed_setting: 2,
    output_gone: 2,
    process_stopped: 2,
    index_damaged: 2,
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
    process_hanging: 1,
}
DECK = random.Random(0).sample(list(FAULTS), sum(FAULTS.values()), counts=list(FAULTS.values()))  # dealt in turn


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


def stands_still(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "events" not in str(path)}


def lose_output(full):
    if full:
        handle = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, handle = os.pipe()
        os.close(reader)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def newest(output):
    try:
        return checkpoints.newest(output) if output.is_dir() else None
    except checkpoints.BadCheckpoint:
        return None
