"""Fine-tuning through main.py: from another size and number of classes, and the head alone (linear probing)."""

import pytest
import torch

from tests.conftest import flags, write_images


@pytest.fixture
def other(tmp_path):
    """A data set of 2 classes instead of 3."""
    write_images(tmp_path / "other" / "train", [12, 12])
    write_images(tmp_path / "other" / "val", [4, 4], seed=1)
    return tmp_path / "other"


def test_another_size_and_number_of_classes(train, other, capsys):
    """A ViT trained at 64 goes on at 96: resampled positions, a new head, the rest as it was."""
    first = train("first", model="test_vit", epochs=1, curriculum="none")
    capsys.readouterr()
    second = train(
        "second",
        model="test_vit",
        input_size=96,
        curriculum="none",
        epochs=1,
        lr=1e-12,
        min_lr=0,
        data_path=other,
        finetune=first.output / "checkpoint-last.pth",
        head_init_scale=0.001,
    )
    printed = capsys.readouterr().out
    report = next(line for line in printed.splitlines() if line.startswith("weights:"))
    assert "resized" in report and "pos_embed" in report and "head.weight" in report and "left random" in report
    assert second.log()[-1]["input_size"] == 96
    before, after = first.state()["model"], second.state()["model"]
    assert after["pos_embed"].shape[1] > before["pos_embed"].shape[1]
    assert after["head.weight"].shape[0] == 2 and after["head.weight"].abs().max() < 0.01
    name = "blocks.0.attn.qkv.weight"
    assert torch.allclose(before[name], after[name], atol=1e-9)


def test_linear_probing_trains_the_head_alone(train, folder):
    first = train("first", model="resnet10t", epochs=0.5, curriculum="none", input_size=32)
    source = first.output / "checkpoint-last.pth"
    probe = train(
        "probe", model="resnet10t", epochs=1, curriculum="none", input_size=32, finetune=source, linear_probe=True
    )
    before, after = first.state()["model"], probe.state()["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_a_body_that_does_not_fit_is_an_error(main_program, train, folder, tmp_path, capsys):
    first = train("first", model="test_vit", epochs=0.5, curriculum="none")
    argv = flags(
        model="resnet10t",
        data_path=folder,
        output_dir=tmp_path / "out",
        finetune=first.output / "checkpoint-last.pth",
    )
    assert main_program(argv) != 0
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()
