"""The input path inside a real run: replay, augmentation on the device, the fast pipeline, bad files, other sources."""

import shutil

import pytest
import torch

from curriculum import CurriculumSampler, build_plan
from tests.conftest import flags, same

REPLAY = {"replay": "[4,2]", "batch_size": 8, "micro_batch": 8, "mixup": 0, "cutmix": 0}


def plan_with_replay(epochs=4):
    return build_plan("efficienttrain++", epochs=epochs, num_images=64, batch_size=16, base_size=64, replay=(4, 2))


def test_the_loader_reads_the_replay_factor_less():
    plan = plan_with_replay()
    loaded = {stage.input_size: 0 for stage in plan.stages}
    for batch in CurriculumSampler(plan, micro_batch=8):
        loaded[batch[0][1]] += len(batch)
    presented = {stage.input_size: stage.steps * stage.batch_size for stage in plan.stages}
    assert loaded == {32: presented[32] // 4, 48: presented[48] // 2, 64: presented[64]}


def test_a_pass_with_replay_still_reads_every_image_once():
    plan = plan_with_replay(epochs=8)
    epoch = next(iter(plan))
    assert epoch.replay == 4 and epoch.steps == 16  # of 4 fresh images each
    batches = list(CurriculumSampler(plan, micro_batch=16))[: epoch.steps]
    assert sorted(sample[0] for batch in batches for sample in batch) == list(range(64))


def test_groups_that_replay_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="`micro_batch` 2 cannot be 1/4 fresh"):
        CurriculumSampler(plan_with_replay(), micro_batch=2)


def test_replay_goes_on_as_if_it_had_not_stopped(train, main_program, folder, tmp_path):
    """Stopped in the middle of the replayed stage: the ring is loaded again, the end is the same bit by bit."""
    whole = train("whole", save_interval="7 steps", keep_checkpoints=9, **REPLAY)
    part = train("part", epochs=2, **REPLAY)
    shutil.rmtree(part.output)
    part.output.mkdir()
    shutil.copy(whole.output / "checkpoint-7.pth", part.output / "checkpoint-last.pth")
    shutil.copy(whole.output / "log.txt", part.output / "log.txt")
    resumed = train("part", save_interval="7 steps", keep_checkpoints=9, **REPLAY)
    assert same(whole.result()["state"]["model"], resumed.result()["state"]["model"])
    other = train("other", seed=1, save_interval="7 steps", **REPLAY)
    assert not same(whole.result()["state"]["model"], other.result()["state"]["model"])


def test_replay_tells_its_memory_in_advance(main_program, train, folder, tmp_path, capsys):
    train("run", epochs=1, replay_memory=0.001, **REPLAY)
    printed = capsys.readouterr().out
    assert "replay at B 32: one image in 4 is loaded" in printed
    assert f"up to 0.001 GB ({10**6 // (3 * 32 * 32 + 8):,} images)" in printed
    settings = flags(**{**REPLAY, "replay_memory": 1e6}, data_path=folder, output_dir=tmp_path / "too much")
    assert main_program(settings) == 2
    assert "--replay_memory" in capsys.readouterr().err and not (tmp_path / "too much").exists()


def test_results_do_not_depend_on_the_number_of_workers(train):
    runs = [train(str(workers), epochs=1, num_workers=workers) for workers in (0, 1, 3)]
    assert all(same(run.result()["state"], runs[0].result()["state"]) for run in runs)
    assert all(run.result()["log"] == runs[0].result()["log"] for run in runs)


@pytest.mark.parametrize("settings", [{"augment_on": "device"}, {"pipeline": "fast"}, {"operator": "fourier"}])
def test_variants_of_the_path_train(train, settings):
    log = train(epochs=1, **settings).log()
    assert log[-1]["progress"] == 1 and 0 < log[-1]["train_loss"] < 10


def test_on_the_device_the_same_images_are_shown(train):
    """Host and device draw the same crops, flips and operations, so that the losses are close, not equal."""
    host, device = (train(name, epochs=1, augment_on=name).log() for name in ("host", "device"))
    for a, b in zip(host, device):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.02)
    assert [a["train_loss"] for a in host] != [b["train_loss"] for b in device]


def test_a_broken_image_is_named_and_replaced_within_the_budget(main_program, train, folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "train" / "class_0" / "03.jpg").write_bytes(b"not an image")
    run = train("within", data_path=data, epochs=1)
    assert "class_0/03.jpg" in (run.output / "bad_files.txt").read_text()
    assert "1 unreadable training images replaced (bad_files.txt)" in capsys.readouterr().out
    assert main_program(flags(data_path=data, output_dir=tmp_path / "beyond", epochs=1, max_bad=0)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "class_0/03.jpg" in error and "--max_bad" in error


def test_held_out_images_and_a_class_map(train, tmp_path, folder):
    (tmp_path / "map.txt").write_text("class_0\tfirst\nclass_2\trest\n")
    shutil.copytree(folder / "train", tmp_path / "data" / "train")
    run = train(data_path=tmp_path / "data", val_per_class=1, class_map=tmp_path / "map.txt", epochs=1, batch_size=4)
    assert run.state()["classes"] == ["first", "rest"]
    assert run.log()[-1]["eval_images"] == 2


def test_tar_archives_train_as_their_folders_do(train, tmp_path, folder):
    import tarfile

    for split in ("train", "val"):
        (tmp_path / "tars" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "tars" / split / "all.tar", "w") as archive:
            archive.add(folder / split, arcname=".")
    a = train("folder", epochs=1)
    b = train("tar", epochs=1, data_set="tar", data_path=tmp_path / "tars")
    assert torch.equal(a.state()["model"]["stem.weight"], b.state()["model"]["stem.weight"])
