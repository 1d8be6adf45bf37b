"""One run writes to an output folder at a time: a lock on it for the run's life."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from utils import Topology, from_main

LOCK = "run.lock"
PATIENCE = 3.0  # seconds: a process that was killed is not gone at once


class OneWriter:
    """Holds the lock of an output folder while it is a context, or from :meth:`hold` on where there is no folder yet.

    It is a POSIX record lock: the system gives it up with the process, however that ends, loader processes do not
    inherit it, and NFS carries it to other machines. Where a file system has no locks, that is said. The main process
    holds it for all; each calls every method.

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
        until = time.monotonic() + PATIENCE
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
            if time.monotonic() > until:
                holder = self._holder()
                os.close(self.file)
                self.file = None
                raise OSError(
                    f"--output_dir {self.output}: another run writes there, {holder}; stop it or wait for its end, or "
                    "name another --output_dir"
                )
            time.sleep(0.1)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(about).encode(), 0)
        for left in self.output.glob("*.tmp"):  # by writers that were killed
            left.unlink(missing_ok=True)

    def _holder(self) -> str:
        try:
            about = json.loads(os.pread(self.file, 1000, 0))
            return f"process {about['pid']} on {about['host']}, since {about['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "which does not say its name yet"
