"""Losses and gradients that are not finite: named, bounded, and never saved as good."""

import json
import math
import signal
from functools import partial

import pytest
import torch
from conftest import Run, flags, same
from processes import Program, kill_after_step, several, world
from torchvision.datasets import ImageFolder

import engine
from curriculum import CurriculumSampler, build_plan
from models import checkpoints
from training import numerics
from training.numerics import LossMeter, NonFinite

SETTINGS = {"save_interval": "1 steps", "log_interval": "4 steps", "keep_checkpoints": 3}
BAD = 9  # the first step of the second stage: found at step 12, the next log interval


def poison(*steps, kind="loss", rank=None):
    """From now on the loss, or only its gradient, is not finite in these optimizer steps (in process ``rank``)."""
    original = engine.forward_loss

    def forward_loss(t, images, targets, step, groups, seeds):
        loss = original(t, images, targets, step, groups, seeds)
        if step not in steps or rank not in (None, t.sampler.rank):
            return loss
        if kind == "loss":
            return loss * float("nan")
        return loss + (t.model.head.weight * 0).sum().sqrt()  # the square root's slope at 0 is infinite

    engine.forward_loss = forward_loss


@pytest.fixture
def poisoned(monkeypatch):
    """``poisoned(3, 4)``: as `poison`, until the end of the test."""
    monkeypatch.setattr(engine, "forward_loss", engine.forward_loss)
    return poison


def error_of(capsys):
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line, out


@pytest.mark.parametrize("kind, clip_grad", [("loss", None), ("loss", 1.0), ("gradient", None), ("gradient", 1.0)])
def test_stops_within_a_log_interval_and_says_where(
    main_program, folder, tmp_path, poisoned, capsys, kind, clip_grad, monkeypatch
):
    monkeypatch.setitem(SETTINGS, "save_interval", "100 steps")
    poisoned(BAD, kind=kind)
    output = tmp_path / "run"
    argv = flags(output_dir=output, data_path=folder, clip_grad=clip_grad, **SETTINGS)
    assert main_program(argv) == 1
    line, out = error_of(capsys)
    assert f"not finite at step {BAD} (stage 2, pass 3, input size 48" in line
    assert f"{output / f'nonfinite-{BAD}'}" in line and "--lr" in line and "--on_nonfinite skip" in line
    assert "step 8/" in out and "step 12/" not in out  # the log line of step 12 never came
    # The step's images, from torchvision's own list and the sampler's own batch.
    content = json.loads((output / f"nonfinite-{BAD}" / "images.json").read_text())
    plan = build_plan("efficienttrain++", epochs=2, num_images=48, batch_size=8, base_size=64)
    samples = next(iter(CurriculumSampler(plan, micro_batch=8, start_step=BAD)))
    files = ImageFolder(folder / "train").samples
    assert [image["name"] for image in content["images"]] == [files[index][0] for index, *_ in samples]
    assert [image["seed"] for image in content["images"]] == [seed for *_, seed in samples]
    assert (content["step"], content["input_size"], content["magnitude"]) == (BAD, 48, samples[0][2])
    assert all(name in line for name in [image["name"] for image in content["images"]][:3])


@pytest.mark.parametrize("save_interval", ["1 steps", "0.00001 minutes"])
def test_nothing_is_saved_as_good_while_it_is_not(main_program, folder, tmp_path, poisoned, capsys, save_interval):
    """Even where saving comes before the next log step."""
    poisoned(BAD)
    output = tmp_path / "run"
    argv = flags(output_dir=output, data_path=folder, **{**SETTINGS, "save_interval": save_interval})
    assert main_program(argv) == 1
    assert f"at step {BAD} " in error_of(capsys)[0]
    for path in output.glob("checkpoint-*.pth"):
        state = checkpoints.load(path)
        assert state["step"] <= BAD
        assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert checkpoints.newest(output)[1]["step"] == BAD


def test_the_snapshot_meets_the_step_again(main_program, folder, tmp_path, poisoned, capsys):
    """From the checkpoint beside it, under the same fault, another run stops at the same step; mended, it goes on."""
    poisoned(BAD)
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    assert main_program(argv) == 1
    first = error_of(capsys)[0]
    snapshot = tmp_path / "run" / f"nonfinite-{BAD}" / "checkpoint.pth"
    again = flags(output_dir=tmp_path / "again", data_path=folder, resume=snapshot, **SETTINGS)
    assert main_program(again) == 1
    second = error_of(capsys)[0]
    assert second.split(";")[:2] == first.split(";")[:2]


def test_mended_it_goes_on_from_the_last_good_step(main_program, folder, tmp_path, monkeypatch, train):
    undisturbed = train("undisturbed", **SETTINGS).result()
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "forward_loss", engine.forward_loss)
        poison(BAD)
        assert main_program(argv) == 1
    assert main_program(argv) == 0
    assert same(Run(tmp_path / "run").result(), undisturbed)


def test_both_of_two_processes_stop_when_one_has_it(folder, tmp_path):
    argv = flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)
    programs = world(argv, tmp_path / "log", 2, faults={1: partial(poison, BAD, rank=1)})
    for rank, program in enumerate(programs):
        assert program.wait() == 1
        (line,) = [line for line in program.output.splitlines() if line.startswith("error: ")]
        assert f"[rank {rank} on " in line and f"not finite at step {BAD} " in line and "nonfinite-9" in line
        assert "Traceback" not in program.output


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skip_leaves_the_step_out(train, poisoned, monkeypatch, amp, kind):
    """Weights, moments and BatchNorm's statistics are those of before it; the average loss is of the other images."""
    from training import session

    states, original = [], session.Session.after_step

    def record(self, lr, images):
        model = {key: value.clone() for key, value in self.training.model.state_dict().items()}
        moments = [state["exp_avg"].clone() for state in self.training.optimizer.state.values()]
        states.append((model, moments))
        return original(self, lr, images)

    monkeypatch.setattr(session.Session, "after_step", record)
    poisoned(BAD, BAD + 2, kind=kind)
    run = train(on_nonfinite="skip", amp=amp, **SETTINGS)
    for step in (BAD, BAD + 2):
        assert same(states[step], states[step - 1])
    for step in (BAD - 1, BAD + 1, BAD + 3):  # negative control
        assert not same(states[step], states[step - 1])
    assert all(torch.isfinite(value).all() for value in run.state()["model"].values())
    assert all(math.isfinite(record["train_loss"]) for record in run.log())
    assert run.state()["meters"]["skipped"][2] >= 2  # fp16 may have skipped some of its own


def test_skip_changes_nothing_where_all_is_finite(train):
    usual = train("usual", **SETTINGS).result()
    skipping = train("skipping", on_nonfinite="skip", **SETTINGS).result()
    assert same(usual["state"]["model"], skipping["state"]["model"]) and same(usual["log"], skipping["log"])


def test_skip_is_bounded(main_program, folder, tmp_path, poisoned, capsys):
    poisoned(*range(5, 1000))
    argv = flags(output_dir=tmp_path / "run", data_path=folder, on_nonfinite="skip", **{**SETTINGS, "epochs": 8})
    assert main_program(argv) == 1
    line, _ = error_of(capsys)
    assert "optimizer steps in a row were skipped" in line
    number = int(line.split(" optimizer steps")[0].split()[-1])
    assert numerics.MAX_STREAK <= number < numerics.MAX_STREAK + 4  # within a log interval of four


def test_a_skip_now_and_then_is_bounded_too(main_program, folder, tmp_path, poisoned, capsys):
    """Every second step of a run of 88 equals more than 30."""
    poisoned(*range(5, 1000, 2))
    argv = flags(output_dir=tmp_path / "run", data_path=folder, on_nonfinite="skip", **{**SETTINGS, "epochs": 8})
    assert main_program(argv) == 1
    assert "optimizer steps were skipped" in error_of(capsys)[0]


def test_fp16_may_skip_a_step_but_not_without_end(main_program, folder, tmp_path, poisoned, capsys):
    """A few infinite gradients are the scaler's normal work; 30 in a row are not."""
    settings = {**SETTINGS, "amp": "fp16", "epochs": 8}
    poisoned(6, 7, 12, kind="gradient")
    assert main_program(flags(output_dir=tmp_path / "few", data_path=folder, **settings)) == 0
    assert Run(tmp_path / "few").state()["scaler"]["scale"] == 65536 / 2**3
    poisoned(*range(20, 1000), kind="gradient")
    capsys.readouterr()
    assert main_program(flags(output_dir=tmp_path / "many", data_path=folder, **settings)) == 1
    assert "optimizer steps in a row were skipped" in error_of(capsys)[0]


def test_scaler_and_counts_go_on_exactly(folder, tmp_path):
    """fp16 with skipped steps before and after a kill ends as without it: scale, counts, average and weights."""
    settings = {**SETTINGS, "amp": "fp16", "model_ema": True}
    faulty = partial(poison, 2, 3, 12, kind="gradient")
    argv = {name: flags(output_dir=tmp_path / name, data_path=folder, **settings) for name in ("whole", "parts")}
    assert Program(argv["whole"], tmp_path / "log0", fault=faulty).wait() == 0
    killed = partial(several, faulty, partial(kill_after_step, 8))
    assert Program(argv["parts"], tmp_path / "log1", fault=killed).wait() == -signal.SIGKILL
    assert Program(argv["parts"], tmp_path / "log2", fault=faulty).wait() == 0
    whole = Run(tmp_path / "whole")
    assert same(Run(tmp_path / "parts").result(), whole.result())
    assert whole.state()["scaler"]["scale"] == 65536 / 2**3 and whole.state()["meters"]["skipped"][2] == 3


def test_a_snapshot_that_cannot_be_written_does_not_hide_the_error(
    main_program, folder, tmp_path, poisoned, capsys, monkeypatch
):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    poisoned(BAD)
    monkeypatch.setattr(numerics, "write_text", fail)
    assert main_program(flags(output_dir=tmp_path / "run", data_path=folder, **SETTINGS)) == 1
    line, _ = error_of(capsys)
    assert f"not finite at step {BAD} " in line and "no snapshot could be written" in line


# -- the meter ---------------------------------------------------------------------------------------------------------


def meter(losses, **kwargs):
    made = LossMeter(torch.device("cpu"), **kwargs)
    for step, loss in enumerate(losses):
        made.add(torch.tensor(float(loss)), 4, step)
    return made


def test_meter_averages_and_starts_again():
    made = meter([1, 2, 6])
    assert made.mean() == 3.0
    made.reset()
    made.add(torch.tensor(5.0), 2, 3)
    made.add(torch.tensor(1.0), 6, 3)
    assert made.mean() == 2.0
    assert LossMeter(torch.device("cpu")).mean() == 0.0


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_meter_names_the_first_bad_step(bad):
    with pytest.raises(NonFinite) as caught:
        meter([1, bad, 2, "nan"]).mean()
    assert caught.value.step == 1
    assert meter([1, bad, 3], tolerates_loss=True).mean() == 2.0


def test_meter_counts_streaks():
    made = meter([1], skips=True)
    for step in range(1, 100):
        made.add_gradient(torch.tensor(float("inf") if step % 20 else 1.0), step)
    assert made.trouble.tolist()[1:] == [19, 19, 95, 99]
    assert made.mean() == 1.0
    for step in range(100, 111):
        made.add_gradient(torch.tensor(float("nan")), step)
    with pytest.raises(NonFinite, match="30 optimizer steps in a row") as caught:
        made.mean()
    assert caught.value.step == 110
    state = made.state()
    again = LossMeter(torch.device("cpu"), skips=True)
    again.load(state, is_main=True)
    assert again.trouble.tolist() == made.trouble.tolist() and torch.equal(again.sums, made.sums)


def test_meter_averages_the_gradient():
    made = meter([1], skips=True)
    assert made.gradient_norm() == (None, None)
    for step, norm in enumerate([1.0, 2.0, float("inf"), 6.0]):
        made.add_gradient(torch.tensor(norm), step)
    assert made.gradient_norm() == (3.0, 3.0)
    made.add_gradient(torch.tensor(5.0), 4)
    again = LossMeter(torch.device("cpu"), skips=True)
    again.load(made.state(), is_main=False)
    assert made.gradient_norm() == (5.0, 3.5)
    for one in (made, again):
        one.add_gradient(torch.tensor(1.0), 5)
        assert one.gradient_norm() == (1.0, 3.0)
        one.reset()
        one.add_gradient(torch.tensor(4.0), 6)
        assert one.gradient_norm() == (4.0, 4.0)


def test_meter_forgets_nothing_with_a_reset():
    made = meter([1, "nan"])
    made.reset()
    with pytest.raises(NonFinite):
        made.mean()


def test_sums_do_not_wait_for_the_device(monkeypatch):
    """Adding reads nothing back: on an accelerator every .item() would stop the step."""

    def refuse(*_args):
        raise AssertionError("a value was read from the device")

    made = meter([1], skips=True)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    made.add(torch.tensor(2.0), 4, 1)
    made.add_gradient(torch.tensor(2.0), 1)
    with pytest.raises(AssertionError, match="read from the device"):
        made.mean()  # negative control
