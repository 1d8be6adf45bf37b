"""python -m models.check: what is there and what is missing, on models that lack one thing each."""

import pytest
import torch
from torch import nn

from models.check import check, main

SIZES = (32, 48, 64)


def verdicts(name, sizes=SIZES):
    return {finding.topic: finding for finding in check(name, 3, sizes)}


def bad(name, sizes=SIZES):
    return {topic for topic, finding in verdicts(name, sizes).items() if not finding.good}


def test_a_timm_model_has_everything(capsys):
    assert main(["test_vit", "--sizes", "32", "48", "64"]) == 0
    out = capsys.readouterr().out
    assert out.count("\nok ") == 10 and "MISSING" not in out and "\nwithout" not in out
    assert "resamples pos_embed" in out and "by its own set_input_size" in out


def test_models_of_ones_own():
    found = verdicts("tests.tiny_models:convnet")
    assert "does not depend" in found["input sizes"].text and "changes no parameter" in found["resizing"].text
    assert bad("tests.tiny_models:convnet") == {"drop path", "layer decay", "features"}
    assert all(not found[topic].needed for topic in ("drop path", "layer decay", "features"))
    assert "for each" in verdicts("tests.sized_models:volo")["input sizes"].text  # built anew


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x.mean((2, 3))), x


class Unused(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return super().forward(x.mean((2, 3)))


class Eager(nn.Linear):
    def forward(self, x):
        if x.mean().item() > 1e9:
            raise AssertionError
        return super().forward(x.mean((2, 3)))


def pair(num_classes):
    return Pair(3, num_classes)


def deaf():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))


def unused(num_classes):
    return Unused(3, num_classes)


def eager(num_classes):
    return Eager(3, num_classes)


def nameless(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def patches(num_classes):
    """A fixed number of positions, and no way to change it."""
    return nn.Sequential(nn.Conv2d(3, 2, 16, 16), nn.Flatten(1), nn.Linear(2 * 16, num_classes))


@pytest.mark.parametrize(
    "function, topic, words",
    [
        ("pair", "classes", "a tuple, not (2, 3)"),
        ("deaf", "made by name", "num_classes"),
        ("patches", "input sizes", "set_input_size(img_size=(H, W))"),
        ("unused", "training", "1 parameters of the model get no gradient (spare)"),
        ("nowhere", "made by name", "has no function 'nowhere'"),
    ],
)
def test_what_training_needs(function, topic, words, capsys):
    name = f"tests.test_check:{function}"
    found = check(name, 3, SIZES)
    assert (found[-1].topic, found[-1].good, found[-1].needed) == (topic, False, True)
    assert words in found[-1].text
    assert main([name, "--num_classes", "3", "--sizes", "32", "64"]) == 1
    assert f"cannot be trained under the curriculum: {topic}" in capsys.readouterr().err


def test_what_is_worth_having():
    assert "meta device" in bad("tests.test_check:eager")
    assert "classifier" in bad("tests.test_check:nameless")
    assert {"meta device", "classifier"} & bad("tests.tiny_models:convnet") == set()
