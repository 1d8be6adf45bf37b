"""One run writes to an output folder at a time: a lock on it for the run's life."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from utils import Topology, from_main, most_nodes

LOCK = "run.lock"
PATIENCE = 3.0  # seconds: a process that was killed is not gone at once
LEASE = 120.0  # seconds: a file server keeps the lock of a machine that is gone for a while (NFS: 90)


class OneWriter:
    """Holds the lock of an output folder while it is a context, or from :meth:`hold` on where there is no folder yet.

    It is a POSIX record lock: the system gives it up with the process, however that ends, loader processes do not
    inherit it, and NFS carries it to other machines. Where a file system has no locks, that is said. The main process
    holds it for all; each calls every method. An elastic run that starts again after it has lost a machine waits until
    the file server gives up the lock of its own process there.

    Args:
        output: the output folder.
        topology: of the run.
    """

    def __init__(self, output: Path, topology: Topology) -> None:
        self.output, self.topology = output, topology
        self.file: int | None = None

    def __enter__(self) -> OneWriter:
        if from_main(self.output.is_dir()):
            self.hold()
        return self

    def __exit__(self, *_error) -> None:
        if self.file is not None:
            os.close(self.file)

    def hold(self) -> None:
        """Takes the lock of the folder, which is made if need be.

        Raises:
            OSError: on every process: another run holds it, or the folder cannot be written.
        """
        problem = None
        if self.topology.is_main and self.file is None:
            try:
                self._take()
            except OSError as error:
                problem = str(error)
        if problem := from_main(problem):
            raise OSError(problem)

    def _take(self) -> None:
        path = self.output / LOCK
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OSError(f"--output_dir {self.output} cannot be written: {error.strerror}") from None
        start, launch = time.monotonic(), os.environ.get("TORCHELASTIC_RUN_ID") if most_nodes() else None
        said = False
        while True:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    print(
                        f"warning: the file system of {self.output} has no locks ({error.strerror}): nothing keeps a "
                        "second run from writing there",
                        flush=True,
                    )
                    return
            about = self._about_holder()
            own = launch is not None and about.get("launch") == launch
            if time.monotonic() > start + (LEASE if own else PATIENCE):
                os.close(self.file)
                self.file = None
                raise OSError(
                    f"--output_dir {self.output}: another run writes there, {_in_words(about)}; stop it or wait for "
                    "its end, or name another --output_dir" + f"; if that machine is gone, remove {path}" * own
                )
            if own and not said and time.monotonic() > start + PATIENCE:
                print(f"waiting up to {LEASE:g} s for the lock of this run's {_in_words(about)}", flush=True)
                said = True
            time.sleep(0.1)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        about["launch"] = launch
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(about).encode(), 0)
        for left in self.output.glob("*.tmp"):  # by writers that were killed
            left.unlink(missing_ok=True)

    def _about_holder(self) -> dict[str, Any]:
        try:
            about = json.loads(os.pread(self.file, 1000, 0))
            return about if isinstance(about, dict) else {}
        except (OSError, ValueError):
            return {}


def _in_words(about: dict[str, Any]) -> str:
    try:
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except KeyError:
        return "which does not say its name yet"
