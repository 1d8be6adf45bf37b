"""Two processes over gloo in what several GPUs meet: stop, kill, switch, compilation, an overflow on one of them."""

import functools
import signal

import pytest
import torch
from conftest import Run, flags, same
from processes import call_before, kill_after_step, signal_self, world

import engine

pytestmark = pytest.mark.extended
SETTINGS = {"save_interval": "1 steps", "model_ema": True}
UNCHANGED = {"mixup": 0, "cutmix": 0, "reprob": 0, "magnitude": "none"}
MAE = {"task": "mae", "model": "test_vit", "decoder": [2, 32, 4], **UNCHANGED}


def compiles_without_code():
    """torch.compile captures graphs, and runs them as they are."""
    original = torch.compile
    torch.compile = lambda model, **options: original(model, **{**options, "backend": "eager"})


def overflows_at(step):
    """From now on the loss of this optimizer step is infinite in this process."""
    original = engine.forward_loss

    def forward_loss(t, images, targets, number, *rest):
        loss = original(t, images, targets, number, *rest)
        return loss * float("inf") if number == step else loss

    engine.forward_loss = forward_loss


def launch(folder, output, log, faults=None, **settings):
    """Exit codes and output of two processes of one run."""
    argv = flags(output_dir=output, data_path=folder, **{**SETTINGS, **settings})
    programs = world(argv, log, 2, faults=faults)
    return [program.wait() for program in programs], "".join(program.output for program in programs)


KINDS = {
    "transformer": {"model": "test_vit"},
    "mae": MAE,
    "device augmentation": {"augment_on": "device"},
    "fp16": {"amp": "fp16"},
    "compiled": {"compile": True, "model": "test_vit"},
}


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("kind", KINDS)
def test_ended_and_launched_again_is_as_if_it_had_not_been(folder, tmp_path, kind, end):
    """Over all switches of the input size; the same bytes."""
    both = dict.fromkeys((0, 1), compiles_without_code) if kind == "compiled" else {}
    codes, text = launch(folder, tmp_path / "whole", tmp_path / "log0", both, **KINDS[kind])
    assert codes == [0, 0], text
    ends = {
        "stop": functools.partial(call_before, "engine:forward_loss", signal_self, signal.SIGTERM, count=11),
        "kill": functools.partial(kill_after_step, 10),
    }[end]
    faults = dict(both)
    faults[1] = functools.partial(in_turn, both[1], ends) if both else ends
    codes, text = launch(folder, tmp_path / "parts", tmp_path / "log1", faults, **KINDS[kind])
    assert codes == ([75, 75] if end == "stop" else [1, -9]), text
    codes, text = launch(folder, tmp_path / "parts", tmp_path / "log2", both, **KINDS[kind])
    assert codes == [0, 0] and "resuming from" in text, text
    assert same(Run(tmp_path / "whole").result(), Run(tmp_path / "parts").result())


def in_turn(*faults):
    for fault in faults:
        fault()


def test_an_overflow_on_one_process_makes_both_skip_the_step(folder, tmp_path):
    """fp16's scaler finds it in the reduced gradient: the same scale, and no other weights than the other one's."""
    faults = {1: functools.partial(overflows_at, 3)}
    codes, text = launch(folder, tmp_path / "run", tmp_path / "log", faults, amp="fp16", on_nonfinite="skip", epochs=1)
    assert codes == [0, 0], text
    state = Run(tmp_path / "run").state()
    assert state["scaler"]["scale"] == 65536.0 / 2
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())
    codes, text = launch(folder, tmp_path / "fine", tmp_path / "log2", amp="fp16", on_nonfinite="skip", epochs=1)
    assert codes == [0, 0], text
    assert Run(tmp_path / "fine").state()["scaler"]["scale"] == 65536.0  # the control
