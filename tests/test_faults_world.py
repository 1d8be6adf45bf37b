"""What happens around a run: a second writer, launchers, terminals that go away, locales, loader processes that die."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, Run, flags, same, script
from processes import Program, call_before, free_port, several, signal_self, world

from config import UsageError
from config.launcher import first_host, read_launcher
from training import one_writer
from training.one_writer import LOCK, OneWriter
from utils import Topology, explain, prepare_streams, printing_never_fails, write_text

SETTINGS = {"save_interval": "2 steps", "model_ema": True, "micro_batch": 2}
ALONE = Topology(0, 1, torch.device("cpu"))
STEP = "training.session:Session.after_step"


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory, main_program):
    output = tmp_path_factory.mktemp("undisturbed")
    assert main_program(flags(output_dir=output, data_path=folder, **SETTINGS)) == 0
    return Run(output).result()


# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_second_run_says_who_holds_the_folder(folder, tmp_path, undisturbed):
    """The first is stopped by SIGSTOP, so it holds it for as long as the test likes; then it ends as if alone."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    first = Program(argv, tmp_path / "first", fault=partial(call_before, STEP, signal_self, signal.SIGSTOP, count=5))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint-4.pth").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = Program(argv, tmp_path / "second")
    assert second.wait() == 1
    (line,) = [line for line in second.output.splitlines() if line.startswith("error: ")]
    assert f"process {first.process.pid} on {os.uname().nodename}, since 20" in line and "--output_dir" in line
    first.signal(signal.SIGCONT)
    assert first.wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


@pytest.mark.parametrize("there", [False, True])
def test_of_two_commands_at_once_one_writes(folder, tmp_path, there):
    """Begun together, into a folder that is not there yet, or is: one refuses, the other one trains as if alone."""
    if there:
        (tmp_path / "run").mkdir()
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "epochs": 2000})
    programs = [Program(argv, tmp_path / f"log{k}") for k in range(2)]
    deadline = time.monotonic() + 120
    while all(program.process.is_alive() for program in programs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (second,) = [program for program in programs if not program.process.is_alive()]
    (first,) = [program for program in programs if program is not second]
    assert second.wait() == 1 and "another run writes there" in second.output, second.output
    first.wait_for("pass 2/")
    first.signal(signal.SIGTERM)
    assert first.wait() == 75, first.output
    log = Run(tmp_path / "run").log()
    assert [record["epoch"] for record in log] == list(range(len(log)))


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    """Whatever it left in the file; and loader processes that outlive it hold nothing."""
    code = (
        "import os, signal, sys, time, torch; from pathlib import Path; from utils import Topology\n"
        "from training.one_writer import OneWriter\n"
        f"OneWriter(Path({str(tmp_path)!r}), Topology(0, 1, torch.device('cpu'))).hold()\n"
        "if os.fork() == 0: time.sleep(60)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match=f"another run writes there, process {holder.pid} on "):
            OneWriter(tmp_path, ALONE).hold()
        holder.kill()
        with OneWriter(tmp_path, ALONE):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(one_writer.fcntl, "lockf", fail)
    with OneWriter(tmp_path, ALONE):
        pass
    assert "has no locks (No locks available): nothing keeps a second run" in capsys.readouterr().out


def test_what_killed_writers_left_goes_away(tmp_path):
    (tmp_path / "config.yaml.1234.tmp").write_text("half")
    (tmp_path / "config.yaml").write_text("whole")
    with OneWriter(tmp_path, ALONE):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", LOCK]


def test_temporary_names_are_the_process_own(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr("utils.os.replace", lambda a, b: (seen.append(str(a)), replace(a, b)))
    write_text(tmp_path / "a.txt", "x")
    assert str(os.getpid()) in seen[0]


# -- launchers ---------------------------------------------------------------------------------------------------------

SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
PMI = {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    "common, own",
    [
        (SRUN, ("SLURM_PROCID", "SLURM_LOCALID")),
        (OMPI, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
        (PMI, ("PMI_RANK", "MPI_LOCALRANKID")),
    ],
)
def test_other_launchers_simply_work(folder, tmp_path, common, own):
    """Two processes that know nothing but what the launcher says train one run together."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, epochs=1, **SETTINGS)
    common = {**common, "MASTER_PORT": str(free_port())}  # not another test's
    programs = [
        Program(argv, tmp_path / f"log{rank}", {**common, **dict.fromkeys(own, str(rank))}) for rank in range(2)
    ]
    assert [program.wait() for program in programs] == [0, 0], programs[0].output
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["devices"].startswith("2 x")
    assert programs[1].output == ""


def test_what_is_read_from_launchers():
    environment = {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[07-09,12],login"}
    read_launcher(environment)
    found = {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    assert found == {
        **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        **{"MASTER_ADDR": "gpu07", "MASTER_PORT": "24711"},
    }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # in a batch script, beside srun
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", **SRUN},  # torchrun in a step
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_what_is_left_alone(environment):
    before = dict(environment)
    read_launcher(environment)
    assert environment == before


@pytest.mark.parametrize(
    "environment, message",
    [
        ({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, r"mpirun \(Open MPI\) started 2 .*MASTER_ADDR, MASTER_PORT"),
        ({**PMI, "PMI_RANK": "0"}, r"mpiexec \(PMI\) started 2 processes, .*set LOCAL_RANK"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
        ({"RANK": "1"}, "RANK 1 and WORLD_SIZE None, which make no run: unset both"),
        ({"WORLD_SIZE": "4"}, "RANK None and WORLD_SIZE 4"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 and WORLD_SIZE 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK x and WORLD_SIZE 2"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(environment, message):
    environment = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", **environment}
    with pytest.raises(UsageError, match=message):
        read_launcher(environment)


@pytest.mark.parametrize(
    "nodes, first", [("a", "a"), ("gpu[07-09,12],x", "gpu07"), ("n-[3,5]", "n-3"), ("r[1-2]c4", "r1c4"), ("", None)]
)
def test_first_of_slurms_nodes(nodes, first):
    assert first_host(nodes) == first


def test_workers_end_with_their_launcher(folder, tmp_path):
    """A torchrun that is killed can tell its workers nothing: they save and stop by themselves."""
    from test_faults_stop import torchrun

    log = tmp_path / "log"
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "epochs": 2000})
    process = torchrun(argv, log)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint-last.pth").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        process.kill()
        while not (tmp_path / "run" / "stopped.json").exists():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert "torchrun has died: stopping" in log.read_text()
        with OneWriter(tmp_path / "run", ALONE):  # waits for the worker's end, and is not refused
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


# -- scripts/train.sh ends with our line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, code, said",
    [
        ({"micro_batch": 3}, 2, "--micro_batch 3"),
        ({"mixupp": 1}, 2, "unknown setting 'mixupp'; did you mean mixup"),
        ({"data_path": "nowhere"}, None, "nowhere"),
    ],
)
def test_several_processes_end_with_one_line(folder, tmp_path, settings, code, said):
    """And with main.py's exit code, whatever torchrun has to say before."""
    settings = {"data_path": folder, "output_dir": tmp_path / "run", **settings}
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [str(ROOT / "main.py"), *flags(**settings)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: [rank ") and said in last
    assert done.returncode == (code or 1) or code is None
    assert not (tmp_path / "run").exists()


def test_what_a_killed_worker_leaves_to_say():
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    launch = script("launch")
    assert launch.said(ProcessFailure(0, 1, -9, "/nowhere")) is None


# -- signals -----------------------------------------------------------------------------------------------------------

INT, TERM, HUP, XCPU = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU


@pytest.mark.parametrize("numbers", [(INT,), (HUP,), (XCPU,), (TERM, INT), (INT, TERM), (HUP, INT, XCPU, TERM)])
def test_every_signal_saves_and_stops_in_any_order(folder, tmp_path, undisturbed, numbers):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    first = Program(argv, tmp_path / "first", fault=partial(call_before, STEP, signal_self, *numbers, count=5))
    assert first.wait() == 75, first.output
    assert f"{numbers[0].name}: saving and stopping" in first.output
    assert Run(tmp_path / "run").state()["step"] == 5  # not 4, where the interval had saved
    assert Program(argv, tmp_path / "second").wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_a_second_sigint_ends_the_run_at_once(folder, tmp_path, undisturbed):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    first = Program(argv, tmp_path / "first", fault=partial(call_before, STEP, signal_self, INT, TERM, INT, count=5))
    assert first.wait() == 130, first.output
    assert first.output.splitlines()[-1] == "error: interrupted"
    assert Run(tmp_path / "run").state()["step"] == 4
    assert Program(argv, tmp_path / "second").wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_ctrl_c_reaches_torchruns_workers_twice_and_saves(folder, tmp_path):
    """From the terminal, and from torchrun: that is no second one."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    fault = partial(call_before, STEP, signal_self, INT, INT, count=5)
    program = Program(argv, tmp_path / "log", {"TORCHELASTIC_RUN_ID": "x"}, fault=fault)
    assert program.wait() == 75, program.output


def test_nohup_is_respected(folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, epochs=1, **SETTINGS)
    ignore = partial(signal.signal, HUP, signal.SIG_IGN)
    fault = partial(several, ignore, partial(call_before, STEP, signal_self, HUP, count=3))
    assert Program(argv, tmp_path / "log", fault=fault).wait() == 0


# -- the watchdog's clock ----------------------------------------------------------------------------------------------


def stop_for(seconds):
    """SIGSTOP, and after that many seconds SIGCONT by another process."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_soon_for(seconds):
    """The same by another process half a second later: where this one then waits for one that is stopped already."""
    command = f"sleep 0.5; kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", command], start_new_session=True)


def test_a_process_that_was_stopped_did_not_hang(folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, epochs=1, **SETTINGS, timeout=0.1)  # 6 s
    program = Program(argv, tmp_path / "log", fault=partial(call_before, STEP, stop_for, 8, count=4))
    assert program.wait(60) == 0, program.output


@pytest.mark.extended
def test_processes_that_were_stopped_together_did_not_hang(folder, tmp_path):
    """As a cluster suspends a job: what one waited for from the other comes late, after --timeout."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, epochs=1, **SETTINGS, timeout=0.1)
    faults = [partial(call_before, STEP, stop_for, 9, count=4), partial(call_before, STEP, stop_soon_for, 8, count=4)]
    programs = world(argv, tmp_path / "log", 2, faults=dict(enumerate(faults)))
    assert [program.wait(60) for program in programs] == [0, 0], programs[0].output + programs[1].output


def test_the_watchdogs_clock(monkeypatch):
    """Ticks of a clock of its own: a jump, as a stop makes it, counts for two ticks at most; waiting counts."""
    from training import watchdog

    class Clock:
        now, jumps = 0.0, ()

        def monotonic(self):
            return self.now

    class Ended(Exception):
        pass

    def ended(_code):
        raise Ended

    def run(jumps, beats=()):
        clock, dog = Clock(), watchdog.Watchdog(10.0, 0, 1)
        ticks = iter(jumps)

        def wait(tick):
            jump = next(ticks, None)
            clock.now += tick if jump is None else jump
            dog._beats += jump in beats
            return clock.now > 1000

        monkeypatch.setattr(watchdog, "time", clock)
        monkeypatch.setattr(watchdog.os, "_exit", ended)
        monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
        dog._done.wait = wait
        try:
            dog._watch()
        except Ended:
            return clock.now
        return None

    assert run([]) == pytest.approx(10)
    assert run([500.0]) == pytest.approx(500 + 8)
    assert run([5.0, 500.0, 7.0]) == pytest.approx(512 + 4)
    assert run([1.5] * 4 + [1.25], beats=(1.25,)) == pytest.approx(6 + 1.25 + 10)


# -- printing ----------------------------------------------------------------------------------------------------------


def redirect(path):
    handle = os.open(path, os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def break_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


@pytest.mark.parametrize("fault", [partial(redirect, "/dev/full"), break_pipe])
def test_a_run_outlives_its_output(folder, tmp_path, undisturbed, fault):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    program = Program(argv, tmp_path / "log", fault=partial(call_before, STEP, fault, count=3))
    assert program.wait() == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_a_run_without_any_output(folder, tmp_path, undisturbed):
    """Files that are opened later must not take the place of the closed streams."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    command = ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "main.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=180).returncode == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_a_signal_outlives_it_too(folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    fault = partial(several, partial(call_before, STEP, break_pipe, count=3))
    stop = partial(call_before, STEP, signal_self, HUP, count=5)
    assert Program(argv, tmp_path / "log", fault=partial(several, fault, stop)).wait() == 75


def test_what_is_no_run_still_fails_where_it_cannot_print(folder):
    """Its output is its result. Negative control of the tests before."""
    command = [sys.executable, "main.py", *flags(num_images=48, num_classes=3, plan="json")]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode != 0


def test_a_stream_that_fails_for_a_while_is_tried_again(capfd):
    import io

    class Moody(io.StringIO):
        fails = True

        def write(self, text):
            if self.fails:
                raise OSError(28, "No space left on device")
            return super().write(text)

    before, sys.stdout = sys.stdout, Moody()
    try:
        moody = sys.stdout
        with printing_never_fails():
            print("lost")
            moody.fails = False
            print("kept")
        assert moody.getvalue() == "kept\n" or moody.getvalue() == "\nkept\n"
        with pytest.raises(OSError):
            moody.fails = True
            print("outside a run it is an error")
    finally:
        sys.stdout = before


@pytest.mark.parametrize("locale", ["C", "POSIX", "de_DE.ISO-8859-1"])
def test_any_path_in_any_locale(folder, tmp_path, locale):
    """Bytes that are no text, on a terminal that knows ASCII alone; and every file is UTF-8."""
    output = os.fsencode(tmp_path) + b"/m\xfcll \xe2\x82\xac"
    environment = {
        **os.environ,
        "LC_ALL": locale,
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONCOERCECLOCALE"] = "0"
    argv = [os.fsencode(text) for text in flags(data_path=folder, epochs=1, **SETTINGS)]
    command = [sys.executable.encode(), b"main.py", *argv, b"--output_dir", output]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    for name in (b"config.yaml", b"plan.json", b"log.txt", b"environment.json"):
        with open(output + b"/" + name, encoding="utf-8") as file:
            file.read()
    assert os.path.exists(output + b"/report.html")
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=180).returncode == 0


def test_text_that_an_encoding_lacks(monkeypatch):
    import io

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        print("\u20ac \udcfc")
    prepare_streams()
    print("\u20ac \udcfc", flush=True)
    assert sys.stdout.buffer.getvalue() == b"\\u20ac \\udcfc\n"


def unencoded(text):
    """Lines that open a text file in the locale's encoding."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        function = node.func
        owner = getattr(getattr(function, "value", None), "id", "")
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in ("read_text", "write_text") and isinstance(function, ast.Attribute):
            if len(node.args) < 1 + (name == "write_text"):  # else the encoding is the last of them
                yield node.lineno
        elif name == "open" and owner not in ("os", "Image", "tarfile", "gzip", "fsspec", "zipfile"):
            arguments = node.args[isinstance(function, ast.Name) :] + [
                w.value for w in node.keywords if w.arg == "mode"
            ]
            mode = next((a.value for a in arguments if isinstance(a, ast.Constant)), "r" if not arguments else "b")
            if "b" not in str(mode):
                yield node.lineno


def test_every_text_file_is_utf8():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = [name for name in listed if not name.startswith("tests/") and (ROOT / name).exists()]
    assert len(names) > 50
    assert [f"{n}:{line}" for n in names for line in unencoded((ROOT / n).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "text", ["open(path)", "open(path, 'w')", "path.open('a')", "p.read_text()", "p.write_text(x)"]
)
def test_one_that_is_not_is_found(text):
    assert list(unencoded(text)) == [1]
    assert list(unencoded(text[:-1] + ", encoding='utf-8')" if "()" not in text else "open(path, 'rb')")) == []


# -- loader processes --------------------------------------------------------------------------------------------------


def fail_in_loader(kind):
    import multiprocessing

    if not multiprocessing.current_process().daemon:
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("unable to write to file </torch_4711_123_0>: No space left on device (28)")


def reset_in_main():
    """The end of a loader process as the main process meets it first."""
    from multiprocessing import connection  # where resource_sharer looks when a batch is fetched

    def client(*_arguments, **_more):
        raise ConnectionResetError(104, "Connection reset by peer")

    connection.Client = client


@pytest.mark.parametrize(
    "fault, said",
    [
        (partial(call_before, "inputs.bad_files:load", fail_in_loader, "kill", count=20), "a DataLoader worker died"),
        (reset_in_main, "a DataLoader worker died"),
        (partial(call_before, "inputs.bad_files:load", fail_in_loader, "full", count=20), "/dev/shm"),
    ],
)
def test_one_line_about_the_loader(folder, tmp_path, fault, said):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "num_workers": 1})
    program = Program(argv, tmp_path / "log", fault=fault)
    assert program.wait(60) == 1
    errors = [line for line in program.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "--num_workers" in errors[0], program.output
    assert "Traceback (most recent call last)" not in program.output.replace(errors[0], "")


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
        "Caught RuntimeError in DataLoader worker process 0. unable to write to file </torch_1_2_3>: No space left on "
        "device (28)",
    ],
)
def test_too_little_shared_memory(text):
    line = explain(RuntimeError(text))
    assert "--num_workers" in line and "--shm-size" in line and "\n" not in line


def test_other_errors_are_not_the_loaders():
    for error in (OSError(28, "No space left on device"), FileNotFoundError(2, "gone"), ConnectionResetError(104, "x")):
        assert explain(error) is None
    assert "lost another process" in explain(RuntimeError("[gloo] Connection closed by peer"))
    assert explain(RuntimeError("size mismatch")) is None


def test_two_processes_and_a_signal_by_the_terminal(folder, tmp_path):
    """Ctrl-C reaches all processes of a run, loader processes too."""
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **{**SETTINGS, "num_workers": 1})
    fault = partial(call_before, STEP, interrupt_group, count=5)
    programs = world(argv, tmp_path / "log", 2, faults={0: fault, 1: fault})
    assert [program.wait() for program in programs] == [75, 75], programs[0].output
    assert all("Traceback" not in program.output for program in programs)


def interrupt_group():
    os.killpg(os.getpgid(0), signal.SIGINT)
