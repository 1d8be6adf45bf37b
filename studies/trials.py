"""Trials: runs of main.py with settings of their own, several at once, each once in a lifetime, noted in a ledger."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import queue
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import msgspec
from typing_extensions import TypedDict

from config import Config, plain, to_yaml
from config.files import read_text
from config.kinds import named
from models.run_files import read_log
from utils import STOPPED, duration_text, write_text

ROOT = Path(__file__).resolve().parent.parent
# Settings that say what the data are; keys of before they were there are those of their defaults.
OF_LATER = ("val_share", "labels", "label_columns", "label_separator", "label_key")
# Settings that say where and how a run is carried out, and not what comes out of it: where it starts and ends, and the
# data by name, are part of what it is.
CIRCUMSTANCES = tuple(
    {*named(Config, "free")}
    - {"resume", "stop_after", "data_path", "data_set", "train_split", "val_split", "val_per_class", "class_map"}
    - {*OF_LATER}
)
DEFAULTS = Config()


class Entry(TypedDict):
    """A line of the ledger, as far as it is read back."""

    key: str
    label: str
    accuracy: float | None
    compute: float
    seconds: float


def _open_lock(path: Path) -> TextIO:
    """Opens a lock file without following a link, waiting for a FIFO's other end or emptying what is there.

    Raises:
        ValueError: it is none.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "not a regular file")
        return open(handle, "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} is not a search's lock ({error.strerror}); remove it") from None


class SearchStopped(Exception):
    """A signal ended the search; its trials have saved."""


@dataclass(frozen=True)
class Trial:
    """One run of main.py.

    Attributes:
        config: all its settings but the output folder.
        label: what people call it.
        compute: full-size epochs' worth of compute that it takes (by pixels).
        keep_weights: whether its checkpoints are needed when it has ended.
    """

    config: Config
    label: str
    compute: float
    keep_weights: bool = True

    @cached_property
    def key(self) -> str:
        """A digest of the settings, and so of all that is continued from too: such paths are named by their keys."""
        settings = {
            name: value
            for name, value in asdict(self.config).items()
            if name not in CIRCUMSTANCES and not (name in OF_LATER and value == getattr(DEFAULTS, name))
        }
        for name in ("resume", "finetune"):
            if settings[name] and Path(settings[name]).parent.parent.name == "trials":
                settings[name] = Path(settings[name]).parent.name
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def launch(trial: Trial, folder: Path, environment: dict[str, str], held: int, started: Callable) -> int:
    """Runs main.py to its end and returns its exit code.

    Args:
        folder: main.py's output folder; what it prints goes to console.txt there.
        environment: variables of this trial's own.
        held: a file descriptor that the process inherits: the lock on the search's folder lives as long as a trial.
        started: is called with the process.
    """
    write_text(folder / "trial.yaml", to_yaml(trial.config))
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        "--recipe",
        str(folder / "trial.yaml"),
        "--model",  # which may be one's own, and then counts only where it is said
        trial.config.model,
        "--output_dir",
        str(folder),
    ]
    with open(folder / "console.txt", "a", encoding="utf-8") as console:
        process = subprocess.Popen(
            command,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            pass_fds=(held,),
            start_new_session=True,  # Ctrl-C reaches the search alone, which lets its trials save
        )
    started(process)
    return process.wait()


class Laboratory:
    """Runs trials that were not run yet, several at once, and remembers the outcomes of all.

    Args:
        folder: holds ledger.jsonl and trials/KEY/; made if need be. One search at a time works there.
        slots: an environment for each trial that may run at a time (which device it sees).
        launch: as :func:`launch`.
        most: the most compute that the search may take, for the time that is left.

    Raises:
        ValueError: the ledger cannot be read.
    """

    def __init__(
        self, folder: Path, slots: Sequence[dict[str, str]], most: float, launch: Callable[..., int] = launch
    ) -> None:
        self.path, self.slots, self.launch, self.most = folder, slots, launch, most
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = _open_lock(folder / "lock")  # held as long as the search, or one of its trials, lives
        self._take_lock()
        self.ledger = folder / "ledger.jsonl"
        self.entries = self._read()
        self.processes: set[subprocess.Popen] = set()
        self.stopping = False
        self._guard = threading.Lock()
        self.used = {"trials": 0, "reused": 0, "compute": 0.0, "seconds": 0.0}
        self.met: set[str] = set()

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting: another search, or a trial that one left behind, still works in {self.path}", flush=True)
            fcntl.flock(self.lock, fcntl.LOCK_EX)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            lines = read_text(self.ledger).splitlines() if self.ledger.exists() else []
            entries = map(json.loads, lines)
            return {entry["key"]: entry for entry in entries if msgspec.convert(entry, Entry) is not None}
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ValueError(f"{self.ledger} is not a ledger of trials ({error}); name another --output") from None

    def folder(self, trial: Trial) -> Path:
        """Where a trial's run is kept."""
        return self.path / "trials" / trial.key

    def checkpoint(self, trial: Trial) -> str:
        """The checkpoint at a trial's end."""
        return str(self.folder(trial) / "checkpoint-last.pth")

    def accuracy(self, trial: Trial) -> float:
        """Top-1 at the end of a trial, per cent (of the moving average where one is kept); 0 if it diverged."""
        return self.entries[trial.key]["accuracy"]

    def training_seconds(self, trial: Trial) -> float | None:
        """Seconds that a trial trained; None if it diverged, or ended before these were noted."""
        return self.entries[trial.key].get("training_seconds")

    def done(self, trial: Trial) -> bool:
        """Whether a trial need not be run: it is in the ledger, with its checkpoint if others continue from that."""
        return trial.key in self.entries and (trial.config.stop_after is None or Path(self.checkpoint(trial)).exists())

    def run(self, chains: Sequence[Sequence[Trial]]) -> None:
        """Runs what is not done yet; the trials of a chain one after the other, chains side by side.

        Raises:
            SearchStopped: on SIGTERM, SIGUSR1 or Ctrl-C.
            ValueError: a trial failed; the message is its last line.
        """
        for trial in (trial for chain in chains for trial in chain):
            if trial.key not in self.met and self.done(trial):
                self.used["reused"] += 1
            self.met.add(trial.key)
        free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for slot in self.slots:
            free.put(slot)

        def work(chain: Sequence[Trial]) -> None:
            slot = free.get()
            try:
                for trial in chain:
                    if not self.done(trial):
                        self._carry_out(trial, slot)
            finally:
                free.put(slot)

        before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        for name in before:
            signal.signal(name, lambda *_: self._stop())
        try:
            with ThreadPoolExecutor(len(self.slots)) as pool:
                tasks = [pool.submit(work, chain) for chain in chains]
                ended, _ = wait(tasks, return_when=FIRST_EXCEPTION)
                if any(task.exception() for task in ended):
                    self._stop()
            for task in sorted(tasks, key=lambda task: isinstance(task.exception(), SearchStopped)):
                task.result()  # a failure is told before the stops that it led to
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _carry_out(self, trial: Trial, environment: dict[str, str]) -> None:
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        if self.stopping:
            raise SearchStopped
        began = time.perf_counter()
        code = self.launch(trial, folder, environment, self.lock.fileno(), self._started)
        if code == STOPPED or (self.stopping and code != 0):
            raise SearchStopped
        diverged = code == 1 and any(folder.glob("nonfinite-*"))
        if code != 0 and not diverged:
            console = folder / "console.txt"
            last = console.read_text(encoding="utf-8").strip().splitlines()[-1:] if console.exists() else []
            raise ValueError(f"the trial {trial.label} failed ({''.join(last) or f'exit code {code}'}); see {console}")
        accuracy = 0.0 if diverged else final_accuracy(folder, trial)
        self._note(trial, accuracy, time.perf_counter() - began, None if diverged else training_seconds(folder))
        if not trial.keep_weights:
            for path in folder.glob("checkpoint-*.pth"):
                path.unlink()

    def _note(self, trial: Trial, accuracy: float | None, seconds: float, training: float | None) -> None:
        """Writes a finished trial into the ledger, which is whole at any time."""
        with self._guard:
            self.entries[trial.key] = {
                "key": trial.key,
                "label": trial.label,
                "accuracy": accuracy,
                "compute": round(trial.compute, 4),
                "seconds": round(seconds, 1),
                "training_seconds": training,
                "settings": plain(trial.config),
            }
            write_text(self.ledger, "".join(json.dumps(entry) + "\n" for entry in self.entries.values()))
            used = self.used
            used["trials"], used["compute"] = used["trials"] + 1, used["compute"] + trial.compute
            used["seconds"] += seconds
            print(f"  {trial.label}: {outcome(accuracy)} ({duration_text(seconds)}); {self._progress()}", flush=True)

    def _progress(self) -> str:
        """What is done of how much at most, and how long that would take: from the trials of this very search."""
        done = sum(entry["compute"] for key, entry in self.entries.items() if key in self.met)
        left = max(self.most - done, 0.0) * self.used["seconds"] / self.used["compute"] / len(self.slots)
        return f"{done:.4g} of at most {self.most:.4g} full-size epochs, at most {duration_text(left)} left"

    def _started(self, process: subprocess.Popen) -> None:
        self.processes.add(process)
        if self.stopping:
            process.terminate()

    def _stop(self) -> None:
        self.stopping = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # main.py saves and exits


def outcome(accuracy: float | None) -> str:
    """41.25 -> 41.25 %; a trial that others continue from has none of its own."""
    return "done" if accuracy is None else f"{accuracy:.2f} %"


def final_accuracy(folder: Path, trial: Trial) -> float | None:
    """From the last record of a run's log; None for one that ends before its plan does."""
    if trial.config.stop_after is not None:
        return None
    last = read_log(folder / "log.txt")[-1]
    return last.get("test_acc1_ema", last["test_acc1"])


def training_seconds(folder: Path) -> float:
    """Seconds that a run trained, by its log: loading and the optimizer's steps count, starting the program,
    evaluations and the last checkpoint do not."""
    return round(sum(record.get("seconds", 0.0) for record in read_log(folder / "log.txt")), 2)
