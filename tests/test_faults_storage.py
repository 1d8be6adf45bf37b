"""Storage that fails at any call, and kills in the middle of any write: a good checkpoint is always there."""

import builtins
import errno
import os
import signal
import subprocess
from functools import partial

import pytest
from conftest import Run, flags, same
from processes import Program, call_before, several, signal_self
from test_checkpoints import payload

from models import checkpoints
from models.checkpoints import BadCheckpoint

CALLS = ("open", "write", "flush", "fsync", "replace", "link", "unlink", "os.open")


class Storage:
    """Stands in for the calls by which `checkpoints` writes, and makes the ``number``-th one fail.

    ``fail`` is called in its place; with ``half``, after half of a write's bytes.
    """

    def __init__(self, number, fail, half=False):
        self.left, self.fail, self.half, self.calls = number, fail, half, []

    def tick(self, name, call, *args, **kwargs):
        self.calls.append(name)
        self.left -= 1
        if self.left == 0:
            if self.half and name == "write":
                call(bytes(args[0])[: len(args[0]) // 2])
            self.fail()
        return call(*args, **kwargs)

    def install(self, patch):
        for name in ("fsync", "replace", "link"):
            patch.setattr(os, name, partial(self.tick, name, getattr(os, name)))
        patch.setattr(os, "open", self.descriptor(os.open))
        patch.setattr(checkpoints, "open", self.open, raising=False)
        patch.setattr(checkpoints.Path, "unlink", self.unlink(checkpoints.Path.unlink))

    def open(self, path, mode="r"):
        file = builtins.open(path, mode)  # noqa: SIM115 (the caller's to close)
        if "w" not in mode:
            return file
        try:
            return File(self.tick("open", lambda: file), self)
        except BaseException:
            file.close()
            raise

    def descriptor(self, original):
        """Images, too, are read by os.open, which is no writing; folders are opened to be synced."""
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_DIRECTORY

        def call(path, flags, *more, **options):
            if not flags & writes:
                return original(path, flags, *more, **options)
            return self.tick("os.open", original, path, flags, *more, **options)

        return call

    def unlink(self, original):
        return lambda path, missing_ok=False: self.tick("unlink", original, path, missing_ok)


class File:
    """A file whose writes and flushes count."""

    def __init__(self, file, storage):
        self.file, self.storage = file, storage

    def write(self, data):
        return self.storage.tick("write", self.file.write, data)

    def flush(self):
        return self.storage.tick("flush", self.file.flush)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def write_as_a_run_does(folder, step, keep=2):
    """The calls of one save: the file, its second name, and the removal of what is too old."""
    from training.resume import Saver

    saver = Saver(folder, "1 steps", keep, None, None)
    saver._write(payload(step), step, best=step % 2 == 1)


@pytest.fixture
def before(tmp_path):
    """A folder after saves of steps 1 to 3."""
    for step in (1, 2, 3):
        write_as_a_run_does(tmp_path, step)
    return tmp_path


def every_call(before):
    """Names of the calls of the next save, counted."""
    with pytest.MonkeyPatch.context() as patch:
        storage = Storage(0, None)
        storage.install(patch)
        write_as_a_run_does(before, 4)
    return storage.calls


def test_the_calls_are_those_that_are_meant(before):
    calls = every_call(before)
    assert set(calls) == set(CALLS)
    assert calls.count("write") >= 40 and calls.count("fsync") == 2  # the file and its folder


def check(folder, steps):
    """The newest good checkpoint is of one of these steps; no file that the run would take is damaged."""
    state = checkpoints.newest(folder)[1]
    assert state["step"] in steps
    assert same(state["model"], payload(state["step"])["model"])
    for path in folder.glob("checkpoint-*.pth"):
        checkpoints.load(path)  # not one is damaged: half a file never has its final name
    return state["step"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("half", [False, True])
def test_failing_at_every_call(before, tmp_path_factory, error, half, capsys):
    def fail():
        raise OSError(error, os.strerror(error))

    count, reached = len(every_call(clone(before, tmp_path_factory))), []
    for number in range(1, count + 1):
        folder = clone(before, tmp_path_factory)
        with pytest.MonkeyPatch.context() as patch:
            Storage(number, fail, half).install(patch)
            try:
                write_as_a_run_does(folder, 4)
            except OSError as failure:
                assert failure.errno == error
        reached.append(check(folder, {3, 4}))
        write_as_a_run_does(folder, 5)  # the storage is mended: what is left over is not in the way
        assert check(folder, {5}) == 5 and not list(folder.glob("*.tmp"))
    assert reached[0] == 3 and reached[-1] == 4 and reached == sorted(reached)


@pytest.mark.parametrize("half", [False, True])
def test_killed_at_every_call(before, tmp_path_factory, half):
    """A real SIGKILL, in a child, at each call (every third write)."""
    calls, reached = every_call(clone(before, tmp_path_factory)), []
    for number, name in enumerate(calls, 1):
        if name == "write" and number % 3:
            continue
        folder = clone(before, tmp_path_factory)
        child = os.fork()
        if child == 0:
            storage = Storage(number, lambda: os.kill(os.getpid(), signal.SIGKILL), half)
            storage.install(pytest.MonkeyPatch())
            try:
                write_as_a_run_does(folder, 4)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        reached.append(check(folder, {3, 4}))
        write_as_a_run_does(folder, 5)
        assert check(folder, {5}) == 5 and not list(folder.glob("*.tmp"))
    assert reached[0] == 3 and reached[-1] == 4 and reached == sorted(reached)


def clone(folder, factory):
    """A copy in which files of two names stay files of two names."""
    target = factory.mktemp("clone")
    subprocess.run(["cp", "-a", f"{folder}/.", target], check=True)
    return target


def test_a_writer_that_is_not_atomic_would_be_noticed(tmp_path):
    """Negative control: written in place, a failure leaves no good file."""
    path = tmp_path / "checkpoint-last.pth"
    checkpoints.save(path, payload(1))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadCheckpoint):
        check(tmp_path, {1})


# -- runs --------------------------------------------------------------------------------------------------------------

SETTINGS = {"model": "tests.tiny_models:convnet", "save_interval": "3 steps", "model_ema": True}


@pytest.fixture
def failing_saves(monkeypatch):
    """``failing_saves(2, 3)`` makes the second and third save fail as on a full disk; returns the steps that failed."""
    original, failed, count = checkpoints.save, [], [0]

    def install(*numbers, error=errno.ENOSPC):
        def save(path, content):
            count[0] += 1
            if count[0] in numbers:
                failed.append(content["step"])
                raise OSError(error, os.strerror(error))
            original(path, content)

        monkeypatch.setattr(checkpoints, "save", save)
        return failed

    yield install
    monkeypatch.undo()


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory, main_program):
    output = tmp_path_factory.mktemp("undisturbed")
    assert main_program(flags(output_dir=output, data_path=folder, **SETTINGS)) == 0
    return Run(output).result()


def test_a_save_that_fails_is_a_warning_and_the_run_ends_as_ever(train, failing_saves, undisturbed, capsys):
    failed = failing_saves(2, 4)
    run = train(**SETTINGS)
    assert len(failed) == 2 and same(run.result(), undisturbed)
    said = capsys.readouterr().out
    for number, step in enumerate(failed):
        warning = next(line for line in said.splitlines() if f"checkpoint of step {step} could not be written" in line)
        assert warning.startswith("warning: ") and "No space left on device" in warning
        assert f"the newest good one is of step {[3, 9][number]}" in warning and "failure 1 of 3" in warning


def test_three_in_a_row_stop_the_run_with_nothing_lost(
    main_program, folder, tmp_path, failing_saves, undisturbed, capsys
):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    failed = failing_saves(2, 3, 4)
    assert main_program(argv) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"step {failed[-1]}" in errors[0] and "newest good one is of step 3" in errors[0]
    assert "No space left on device" in errors[0] and "launch the same command again" in errors[0]
    assert Run(tmp_path / "run").state()["step"] == 3
    assert main_program(argv) == 0  # the disk is mended
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_the_last_save_failing_is_no_success(main_program, folder, tmp_path, failing_saves, undisturbed, capsys):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "save_interval": "100 steps"})
    failing_saves(1, error=errno.EIO)  # at the last step, or at the best accuracy
    assert main_program(argv) == 1
    assert "Input/output error" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*.pth"))
    assert main_program(argv) == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def full_disk_while_stopping():
    """The save that a signal asks for fails."""
    from training import session

    original = session.Session.save

    def save(self, epoch, better=False, required=False):
        if required:
            checkpoints.save = fail
        return original(self, epoch, better, required)

    def fail(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    session.Session.save = save


def test_a_stop_that_cannot_save_says_so(folder, tmp_path, undisturbed):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    stop = partial(call_before, "training.session:Session.after_step", signal_self, signal.SIGTERM, count=5)
    program = Program(argv, tmp_path / "first", fault=partial(several, full_disk_while_stopping, stop))
    assert program.wait() == 1
    assert "No space left on device; the newest good one is of step 3" in program.output
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert Program(argv, tmp_path / "second").wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_damaged_last_checkpoint_costs_one_interval(main_program, folder, tmp_path, undisturbed, capsys):
    """With copies of an older time stamp and a truncated newest one: chosen by content."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS, keep_checkpoints=3)
    assert main_program(argv) == 0
    output = tmp_path / "run"
    (output / "checkpoint-best.pth").unlink()
    numbered = sorted(output.glob("checkpoint-[0-9]*.pth"), key=lambda path: int(path.stem.split("-")[1]))
    assert len(numbered) == 3
    os.truncate(numbered[-1], 20000)  # and so checkpoint-last.pth, the same file
    os.utime(numbered[0], (2e9, 2e9))
    step = checkpoints.load(numbered[1])["step"]
    capsys.readouterr()
    assert main_program(argv) == 0
    said = capsys.readouterr().out
    assert f"resuming from {numbered[1]}, step {step}" in said
    assert f"skipped a checkpoint: {numbered[-1]}" in said and "checkpoint-last.pth carries no checksum" in said
    assert same(Run(output).result(), undisturbed)


@pytest.mark.extended
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_real_full_disk(main_program, folder, tmp_path, undisturbed):
    """A tmpfs that holds little more than one checkpoint; enlarged after the run has given up."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", mount], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        argv = flags(output_dir=mount / "run", data_path=folder, **{**SETTINGS, "save_interval": "1 steps"})
        first = Program(argv, tmp_path / "first", fault=partial(fill_disk_after_step, str(mount), 6))
        assert first.wait() == 1
        assert "No space left on device" in first.output and "Traceback" not in first.output
        assert checkpoints.newest(mount / "run")[1]["step"] >= 5
        (mount / "filler").unlink()
        assert Program(argv, tmp_path / "second").wait() == 0
        assert same(Run(mount / "run").result(), undisturbed)
    finally:
        subprocess.run(["umount", "-l", mount])


def fill_disk_after_step(mount, step):
    """Leaves no room on the disk once ``step`` is done."""
    from training import session

    original = session.Session.after_step

    def after_step(self, lr, images):
        stopped = original(self, lr, images)
        if self.training.step == step:
            with open(f"{mount}/filler", "wb") as file:
                try:
                    while True:
                        file.write(b"\0" * 4096)
                        file.flush()
                except OSError:
                    pass
        return stopped

    session.Session.after_step = after_step
