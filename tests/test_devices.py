"""Which device a process takes and how precisely it computes, on faked machines; what errors of the network say."""

import os
import platform
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import engine
import main
import utils
from config import UsageError, load_recipe
from config.command_line import parse_config
from inputs.finish import Finish
from tests.conftest import ROOT, flags


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus, local_rank)`` fakes a machine that shows this process so many GPUs."""
    taken = []

    def call(gpus, local_rank):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        return taken

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    yield call
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision("highest")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)


def start(tf32=True):
    return utils.init_topology("auto", False, tf32, timedelta(minutes=1))


@pytest.mark.parametrize("gpus, local_rank, index", [(4, 3, 3), (1, 3, 0), (1, 0, 0), (8, 0, 0)])
def test_each_process_takes_its_gpu_also_where_it_sees_no_other(machine, gpus, local_rank, index):
    taken = machine(gpus, local_rank)
    assert start().device == torch.device("cuda", index) and taken == [index]


def test_more_processes_than_gpus_are_refused(machine):
    machine(2, 2)
    with pytest.raises(UsageError, match="local rank 2 has no CUDA device: there are 2"):
        start()


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_a_setting_of_products_and_convolutions(machine, tf32):
    machine(1, 0)
    start(tf32)
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.fixture
def tries():
    """cuDNN's trying of algorithms, on as a run on CUDA sets it."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield lambda: torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("doctor", [False, True])
@pytest.mark.parametrize(("task", "expected"), [("detection", False), ("segmentation", True), ("supervised", True)])
def test_algorithms_are_not_tried_for_every_size_of_a_detector_s_images(
    main_program, tries, monkeypatch, tmp_path, task, expected, doctor
):
    seen = []
    monkeypatch.setattr(main, "diagnose" if doctor else "train", lambda *_: seen.append(tries()) or 0)
    settings = {"supervised": {}, "detection": {"data_set": "coco"}, "segmentation": {"data_set": "masks"}}[task]
    dense = {"mixup": 0, "cutmix": 0, "reprob": 0, "smoothing": 0, "magnitude": "none"} if settings else {}
    command = flags(task=task, data_path=tmp_path, output_dir=tmp_path / "out", doctor=doctor, **settings, **dense)
    assert main_program(command) == 0
    assert seen == [expected] and tries()


@pytest.mark.parametrize("any_size", [False, True])
def test_algorithms_are_not_tried_for_every_size_of_an_evaluation(tries, any_size):
    seen = []
    scores = SimpleNamespace(add=lambda *_: seen.append(tries()), scores=dict)
    task = SimpleNamespace(begin=lambda *_: scores)
    loader = DataLoader([(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, i) for i in range(2)])
    model = torch.nn.Identity()
    model.any_size = any_size
    engine.evaluate(model, loader, Finish(2, base_size=8), 8, torch.device("cpu"), task)
    assert seen == [not any_size] * 2 and tries()


def test_tf32_is_on_by_default_and_a_flag():
    assert parse_config([]).tf32 is True and parse_config(["--tf32", "false"]).tf32 is False


def test_blocks_of_memory_grow_unless_the_user_says_how(machine, monkeypatch):
    machine(1, 0)
    start()
    name = "PYTORCH_ALLOC_CONF" if torch.__version__ >= (2, 9) else "PYTORCH_CUDA_ALLOC_CONF"
    assert os.environ[name] == "expandable_segments:True"
    monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    start()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:128"


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "Gloo connectFullMesh failed with [../tcp/pair.cc:144] no error",
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        ),
        (
            "[enforce fail at gloo/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth7",
            "GLOO_SOCKET_IFNAME",
        ),
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:29", "lost another process"),
        ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a0", "one process for each GPU"),
    ],
)
def test_errors_between_processes_say_what_to_do(text, said):
    assert said in utils.explain(RuntimeError(text))


@pytest.mark.parametrize(
    "recipe", ["in1k/convnext_tiny_etpp200.yaml", "in1k/resnet50_et300.yaml", "mae/vit_base_et1600.yaml"]
)
def test_any_recipe_can_extend_the_gpu_fragment(tmp_path, recipe):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: [{ROOT}/recipes/{recipe}, {ROOT}/recipes/_gpu.yaml]\n")
    mine, theirs = load_recipe(str(path)), load_recipe(str(ROOT / "recipes" / recipe))
    fragment = {"amp": "bf16", "channels_last": True, "compile": True, "tf32": True}
    assert mine == {**theirs, **fragment}
    parse_config(["--recipe", str(path)])


MEMORY = """
import resource, sys, torch, utils
from datetime import timedelta

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        held = [torch.ones(size << 18) for size in (24, 48, 72)]  # 144 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

if sys.argv[1] == "kept":
    utils.init_topology("cpu", False, True, timedelta(minutes=1))
faults(3)
again, held = faults(10), resident()
utils.release_memory(torch.device("cpu"))
print(again, held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_memory_of_a_step_serves_the_next_on_cpus():
    """Else the kernel hands it out anew at each step. After a stage it is given back."""

    def measure(how):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, how], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return [float(number) for number in done.stdout.split()]

    (kept, released), (anew, _) = measure("kept"), measure("as it is")
    assert kept < 0.5 * anew and released > 100  # MiB
