"""scripts/analyze.py and what it measures, against direct formulas and numpy's FFT, and on real runs."""

import csv
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import Run, script
from torch import nn

from curriculum import downsample
from studies import cka, filtered, proposition1, spectra
from studies.runs import RunFolder

analyze = script("analyze")


def read(path):
    return list(csv.DictReader(path.open()))


def drawn(folder, name):
    """Whether both pictures are there and are what they are called."""
    return (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        folder / f"{name}.svg"
    ).read_text()


MODEL = "tests.tiny_models:convnet"  # which no file may name
OWN = ("--model", MODEL)


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory, main_program):
    """Two runs of the tiny model, all checkpoints kept."""
    from conftest import flags

    root = tmp_path_factory.mktemp("analysis")
    common = {"data_path": folder, "keep_checkpoints": 100, "save_interval": "10%", "warmup_epochs": "10%"}
    assert main_program(flags(output_dir=root / "ordinary", curriculum="none", model_ema=True, **common)) == 0
    assert main_program(flags(output_dir=root / "etpp", model_args="{width: 12}", operator="fourier", **common)) == 0
    return root


# ---- filtered images -----------------------------------------------------------------------------------------------
def disc_by_numpy(images, radius, inside):
    """Filter by numpy's complex FFT, shifted, and a mask of distances written out."""
    size = images.shape[-1]
    spectrum = np.fft.fftshift(np.fft.fft2(images.double().numpy()), axes=(-2, -1))
    y, x = np.mgrid[:size, :size] - size // 2
    mask = (x**2 + y**2 <= radius**2) == inside
    return np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1))).real


def test_filtered_accuracy_is_that_of_images_filtered_by_numpy(runs):
    run, device = RunFolder(runs / "ordinary", model=MODEL), torch.device("cpu")
    rows = filtered.measure(run, [2, 9.5], device, batch_size=4)
    assert len(rows) == 5 * len(run.checkpoints()) and len(run.checkpoints()) >= 4
    last = run.checkpoints()[-1]
    model, state = run.model(last, device)
    images, labels = (torch.cat(parts) for parts in zip(*run.validation(None, 100, device)))
    assert images.shape == (15, 3, 64, 64)
    for row in (row for row in rows if row["step"] == state["step"]):
        shown = images
        if row["radius"] is not None:
            shown = torch.from_numpy(disc_by_numpy(images, row["radius"], row["filter"] == "low-pass")).float()
        expected = 100 * (model(shown).argmax(1) == labels).float().mean().item()
        assert row["accuracy"] == pytest.approx(expected, abs=1e-4) and row["images"] == 15
    whole = [row for row in rows if row["filter"] == "none" and row["step"] == state["step"]]
    assert whole[0]["accuracy"] == pytest.approx(Run(run.path).log()[-1]["test_acc1"])
    assert rows[0]["epochs"] < rows[-1]["epochs"] == pytest.approx(2.0)


def test_checkpoints_of_other_input_sizes_are_scored_at_the_base_size(runs):
    run = RunFolder(runs / "etpp", model=MODEL)
    model, state = run.model(run.checkpoints()[0], torch.device("cpu"))
    assert state["input_size"] == 32 and model.input_size == 64
    average, _ = RunFolder(runs / "ordinary", model=MODEL).model(
        runs / "ordinary" / "checkpoint-last.pth", torch.device("cpu"), True
    )
    assert not torch.equal(average.stem.weight, model.stem.weight[:8])
    with pytest.raises(ValueError, match="no moving average"):
        run.model(run.checkpoints()[0], torch.device("cpu"), average=True)


def test_some_of_the_images(runs):
    run = RunFolder(runs / "ordinary", model=MODEL)
    images, labels = (torch.cat(parts) for parts in zip(*run.validation(4, 3, torch.device("cpu"))))
    every = torch.cat([pixels for pixels, _ in run.validation(None, 15, torch.device("cpu"))])
    assert torch.equal(images, every[[0, 5, 9, 14]]) and labels.tolist() == [0, 1, 1, 2]


def test_matched_filters_end_alike():
    ends = {("none", None): 80, ("low-pass", 1): 10, ("low-pass", 5): 60, ("high-pass", 2): 61, ("high-pass", 9): 10}
    rows = [
        {"step": step, "epochs": float(step), "filter": kind, "radius": radius, "accuracy": accuracy * step / 9}
        for (kind, radius), accuracy in ends.items()
        for step in (3, 9)
    ]
    table = filtered.matched(rows)
    assert list(table[0]) == ["epochs", "low-pass 5", "high-pass 2", "whole"]  # 10 and 10 tell too little
    assert table[1]["low-pass 5"] == 60 and table[0]["high-pass 2"] == pytest.approx(61 / 3)


# ---- CKA -----------------------------------------------------------------------------------------------------------
def hsic1_by_sums(k, l):  # noqa: E741
    """Song et al.'s U-statistic: the mean over all quadruples of distinct images, by four loops."""
    n, total = len(k), 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_hsic_is_the_mean_over_quadruples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(7, 3))
    y[:, 0] += x[:, 0]
    k, l = x @ x.T, y @ y.T  # noqa: E741
    ours = cka.hsic1(torch.from_numpy(k), torch.from_numpy(l)).item()
    assert ours == pytest.approx(hsic1_by_sums(k, l), rel=1e-10)
    assert abs(ours - np.trace(k @ l)) > 1  # negative control: the biased estimator's first term
    with pytest.raises(ValueError, match="more than 3"):
        cka.hsic1(torch.eye(3), torch.eye(3))


def test_minibatch_cka_is_the_ratio_of_means():
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(6, 4, 2, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    measure = cka.MinibatchCka()
    sums = np.zeros((2, 1)), np.zeros(2), 0.0
    for a, b, c in batches:
        measure.add([a, b], [c])
        grams = [(x.flatten(1) @ x.flatten(1).T).numpy() for x in (a, b, c)]
        sums[0][:, 0] += [hsic1_by_sums(grams[0], grams[2]), hsic1_by_sums(grams[1], grams[2])]
        sums[1][:] += [hsic1_by_sums(gram, gram) for gram in grams[:2]]
        sums = (*sums[:2], sums[2] + hsic1_by_sums(grams[2], grams[2]))
    expected = sums[0] / np.sqrt(sums[1][:, None] * sums[2])
    np.testing.assert_allclose(measure.similarity().numpy(), expected, rtol=1e-9)


def test_cka_is_one_for_rotated_and_scaled_features_and_about_zero_for_others():
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    measure = cka.MinibatchCka()
    other = torch.randn(200, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    measure.add([x], [3 * x @ rotation + 1, other])
    same, unrelated = measure.similarity()[0].tolist()
    assert same == pytest.approx(1, abs=1e-12) and abs(unrelated) < 0.05


def test_layers_are_the_innermost_blocks_in_running_order():
    import timm

    for name, expected in (
        ("test_resnet", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("test_vit", [f"blocks.{n}" for n in range(6)]),
    ):
        model = timm.create_model(name).eval()
        names, _, similarity = cka.measure(model, model, [torch.randn(5, 3, *model.pretrained_cfg["input_size"][1:])])
        assert names[: len(expected)] == expected and similarity.diagonal().allclose(torch.ones(1, dtype=torch.double))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    assert cka.measure(plain, plain, [torch.randn(5, 3, 2, 2)])[0] == ["1", "3"]
    assert cka.measure(plain, plain, [torch.randn(5, 3, 2, 2)], "[12]")[0] == ["1", "2"]
    with pytest.raises(ValueError, match="--layers x: no module"):
        cka.Layers(plain, "x")
    with pytest.raises(ValueError, match="more than 3"):
        cka.measure(plain, plain, [torch.randn(2, 3, 2, 2)])


# ---- spectra -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 15])
def test_radial_power_by_loops(size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    power = np.abs(np.fft.fft2(images.double().numpy()) / size**2) ** 2
    ours = spectra.radial_power(images)
    assert ours.shape == (size // 2,)
    k = np.fft.fftfreq(size, 1 / size)
    for wanted in range(1, size // 2 + 1):
        ring = [
            power[:, :, i, j].mean()
            for i in range(size)
            for j in range(size)
            if wanted - 0.5 <= math.hypot(k[i], k[j]) < wanted + 0.5
        ]
        assert ours[wanted - 1].item() == pytest.approx(np.mean(ring), rel=1e-9)


def test_power_of_a_wave_does_not_depend_on_the_size():
    values = []
    for size in (32, 48):
        wave = torch.cos(2 * math.pi * 5 * torch.arange(size) / size).expand(1, 1, size, size)
        values.append(spectra.radial_power(wave)[4].item() * _ring(5, size))
    assert values[0] == pytest.approx(values[1], rel=1e-6) == pytest.approx(0.5, rel=1e-6)  # a^2 / 2 in all


def _ring(frequency, size):
    k = np.fft.fftfreq(size, 1 / size)
    distance = np.hypot(k[:, None], k[None])
    return int(((distance >= frequency - 0.5) & (distance < frequency + 0.5)).sum())


def test_shown_images_are_those_of_the_run(runs):
    """The first images of a stage are in the run's own samples/, which the trainer wrote."""
    from PIL import Image

    run = RunFolder(runs / "etpp", model=MODEL)
    for number, size in ((1, 32), (2, 48), (3, 64)):
        epoch = next(epoch for epoch in run.plan if epoch.stage == number - 1)
        assert spectra.shown(run, epoch, 6).shape == (6, 3, size, size)
        assert Image.open(run.path / "samples" / f"stage-{number}.png").height >= size
    rows, pictures = spectra.measure(run, 6)
    assert [one.shape for one in pictures] == [(4, 3, size, size) for size in (32, 48, 64)]
    assert all(one.dtype == torch.uint8 and one.float().std() > 10 for one in pictures)
    assert [max(row["frequency"] for row in rows if row["stage"] == n) for n in (1, 2, 3)] == [16, 24, 32]


@pytest.mark.parametrize("operator", ["fourier", "lanczos"])
def test_images_augmented_on_the_device_are_shown_too(runs, tmp_path, operator):
    """A run with --augment_on device shows what the same run shows with --augment_on host, to its operations' error."""
    shown = {}
    for place in ("host", "device"):
        settings = yaml.safe_load((runs / "etpp" / "config.yaml").read_text())
        settings.update(augment_on=place, operator=operator, magnitude="constant")
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.yaml").write_text(yaml.safe_dump(settings))
        run = RunFolder(tmp_path / place, model=settings["model"])
        epoch = next(epoch for epoch in run.plan if epoch.stage == 1)
        shown[place] = spectra.shown(run, epoch, 8)
        assert shown[place].shape == (8, 3, 48, 48)
    assert (shown["host"] - shown["device"]).abs().mean() < 0.05
    assert (shown["host"] - shown["device"].roll(1, 0)).abs().mean() > 0.3


# ---- Proposition 1 -------------------------------------------------------------------------------------------------
def test_the_fourier_crop_leaks_nothing_off_the_nyquist_line_and_all_others_do():
    table, curves = proposition1.measure(64, [24, 33], 4)
    rows = {(row["operator"], row["size"]): row for row in table}
    for size in (24, 33):
        assert rows["fourier", size]["leak"] < 1e-13 and rows["fourier", size]["low_error"] < 1e-13
        for operator in ("lanczos", "bicubic", "bilinear", "nearest"):
            assert rows[operator, size]["leak"] > 0.05 and rows[operator, size]["low_error"] > 0.03
    assert rows["fourier", 24]["leak_nyquist"] > 0.1  # one of each pair is kept
    assert math.isnan(rows["fourier", 33]["leak_nyquist"])  # odd sizes have none
    gain = {(row["operator"], row["size"], row["frequency"]): row["gain"] for row in curves}
    assert all(gain["fourier", 24, k] == pytest.approx(1, abs=1e-12) for k in range(12))
    assert all(gain["fourier", 24, k] < 1e-12 for k in range(13, 33))
    assert gain["nearest", 24, 20] > 0.9 and 0.001 < gain["lanczos", 24, 14] < 0.6


def test_leak_by_numpy():
    """The leak of bilinear resizing for one image, from numpy's FFT and masks written out."""
    noise = proposition1.natural_images(1, 32)
    k = np.abs(np.fft.fftfreq(32, 1 / 32))
    high = np.fft.ifft2(np.fft.fft2(noise.numpy()) * (np.maximum(k[:, None], k[None]) > 8)).real
    out = downsample(torch.from_numpy(high), 16, "bilinear").numpy()
    expected = np.sqrt((out**2).mean() / (high**2).mean())
    assert proposition1.leaks(32, 16, "bilinear", noise)["leak"] == pytest.approx(expected, rel=1e-10)
    spectrum = np.abs(np.fft.fft2(proposition1.natural_images(500, 32).numpy())) ** 2
    assert spectrum[..., 0, 4].mean() / spectrum[..., 0, 8].mean() == pytest.approx(4, rel=0.2)  # amplitude 1 / f


# ---- the commands --------------------------------------------------------------------------------------------------
def test_commands_write_figures_and_numbers(runs, tmp_path, capsys):
    a, b, out = str(runs / "ordinary"), str(runs / "etpp"), tmp_path / "an out"
    assert analyze.main(["filtered", a, b, *OWN, "--output", str(out), "--radii", "3,12", "--batch_size", "8"]) == 0
    assert drawn(out, "filtered_ordinary") and drawn(out, "filtered_etpp")
    rows = read(out / "filtered.csv")
    assert {row["run"] for row in rows} == {"ordinary", "etpp"} and len(read(out / "filtered_matched_etpp.csv")) >= 3
    assert analyze.main(["cka", a, b, *OWN, "--output", str(out), "--batch_size", "5", "--images", "10"]) == 0
    assert drawn(out, "cka") and [row["cka"] for row in read(out / "cka.csv")]
    assert analyze.main(["spectra", b, *OWN, "--output", str(out), "--images", "6"]) == 0
    assert drawn(out, "spectra") and len(read(out / "spectra.csv")) == 16 + 24 + 32
    proposition = ["proposition1", "--output", str(out), "--base_size", "32", "--sizes", "16", "--images", "4"]
    assert analyze.main(proposition) == 0
    assert drawn(out, "proposition1") and len(read(out / "proposition1.csv")) == 5
    assert "left" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["filtered", "nowhere"], "holds no run"),
        (["cka", "RUN", "RUN", "--checkpoint", "checkpoint-7.pth"], "checkpoint-7.pth"),
        (["cka", "RUN", "RUN", "--layers", "nothing"], "--layers nothing"),
        (["spectra", "RUN", "--images", "1"], "--images is 1"),
        (["filtered", "RUN", "--data_path", "/nowhere"], "/nowhere"),
        (["filtered", "RUN", "--radii", "-3"], "radius"),
    ],
)
def test_bad_input(runs, tmp_path, arguments, words, capsys):
    words_given = [str(runs / "ordinary") if word == "RUN" else word for word in arguments]
    assert analyze.main([*words_given, *OWN, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
