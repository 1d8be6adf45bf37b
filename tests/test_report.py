"""report.html: what it tells of a run that is done, stopped or new, and (extended) how a browser takes it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from conftest import script
from PIL import Image

from training.report import write_report

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The page's text, its links to anything, and a check that tags match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.links, self.tags = [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_report_of_a_finished_run(train):
    run = train(model_ema=True)
    plan = json.loads((run.output / "plan.json").read_text())
    page = Page(run.output / "report.html")
    records = run.log()
    best = max(max(r["test_acc1"], r["test_acc1_ema"]) for r in records if r.get("eval_size") == 64)
    assert f"done 2 epochs, {plan['total']['steps']} optimizer steps {best:.2f} % best top-1 at 64 pixels" in page.text
    wrong = json.loads((run.output / "validation.json").read_text(encoding="utf-8"))["worst"]
    assert page.tags.count("img") == 4 + len(wrong) and page.tags.count("table") == 5
    assert page.tags.count("script") == 0
    assert all(link.startswith("data:") for link in page.links)  # one page, no network
    for words in ("tiny_models:convnet · efficienttrain++", "batch_size 8 4096", "validation, average", "torch"):
        assert words in page.text, words
    assert "min_lr" not in page.text.split("All settings")[0]  # it is the default


def test_samples_are_what_the_network_sees(train, monkeypatch):
    """The PNG of a stage against the images of its first forward pass, undone by hand; one row for each stage."""
    import engine

    seen = {}
    real = engine.Finish.train

    def note(self, images, targets, size, *rest, **more):
        result = real(self, images, targets, size, *rest, **more)
        seen.setdefault(size, result[0])
        return result

    monkeypatch.setattr(engine.Finish, "train", note)
    run = train(epochs=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for number, size in enumerate((32, 48, 64), 1):
        png = np.asarray(Image.open(run.output / "samples" / f"stage-{number}.png"))
        assert png.shape == (size, len(seen[size]) * size, 3)
        want = (255 * (seen[size] * std + mean)).round().clamp(0, 255)
        assert np.abs(png.astype(int) - torch.cat(list(want), 2).permute(1, 2, 0).numpy()).max() <= 1


def test_watching_changes_nothing(train, monkeypatch):
    from training import session

    weights = train("watched", epochs=1).state()["model"]
    monkeypatch.setattr(session.Session, "_save_samples", lambda self, images: None)
    for key, value in train("unwatched", epochs=1).state()["model"].items():
        assert torch.equal(value, weights[key]), key


def test_report_of_a_new_and_of_a_stopped_run(train):
    run = train(epochs=1)
    lines = (run.output / "log.txt").read_text().splitlines()
    (run.output / "log.txt").write_text(lines[0] + "\n")
    progress = json.loads(lines[0])["progress"]
    assert f"{100 * progress:.1f} % done" in Page(write_report(run.output)).text
    (run.output / "stopped.json").write_text("{}")
    assert Page(write_report(run.output)).text.count("stopped 1 epochs") == 1
    for name in ("log.txt", "stopped.json", "plan.svg", "environment.json"):
        (run.output / name).unlink()
    shutil.rmtree(run.output / "samples")
    page = Page(write_report(run.output))
    assert "0.0 % done" in page.text and "Nothing yet." in page.text


def test_names_are_escaped(train):
    run = train(epochs=1)
    settings = yaml.safe_load((run.output / "config.yaml").read_text())
    (run.output / "config.yaml").write_text(yaml.safe_dump({**settings, "model": "<b>a&b"}))
    assert "<b>a&b · efficienttrain++" in Page(write_report(run.output)).text


def test_command(train, tmp_path, capsys):
    run = train(epochs=1)
    (run.output / "report.html").unlink()
    capsys.readouterr()
    assert script("report").main([str(run.output)]) == 0
    assert capsys.readouterr().out.strip() == str(run.output / "report.html") and (run.output / "report.html").exists()
    assert script("report").main([str(tmp_path)]) == 1 and "is no run's output folder" in capsys.readouterr().err
    assert script("report").main([]) == 2


@pytest.mark.extended
def test_a_browser_shows_it_without_complaint(train, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium: apt-get install chromium")
    page = train(model_ema=True).output / "report.html"
    broken = tmp_path / "broken.html"  # the check must be able to fail
    broken.write_text(page.read_text().replace("</main>", "<script>undefined_function()</script></main>"))
    shot = tmp_path / "shot.png"

    def complaints(path):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,2600", f"--screenshot={shot}"]
        result = subprocess.run([browser, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
        assert shot.exists(), result.stderr
        return re.findall(r".*CONSOLE.*", result.stderr)

    assert complaints(broken)
    shot.unlink()
    assert not complaints(page)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (2600, 1400) and (pixels < 100).mean() > 0.002 and pixels.std() > 5


def test_classes_confusions_and_the_most_wrong_images(train, folder):
    """validation.json and the page against a model that is asked again, image by image."""
    from datasets import eval_loader
    from inputs.finish import Finish
    from inputs.readers import open_source
    from inputs.transforms import EvalTransform
    from models import create_model

    run = train(epochs=1)
    source = open_source("folder", folder, "val", part="val")
    model = create_model("tests.tiny_models:convnet", 3, 64).eval()
    model.load_state_dict(run.state()["model"])
    with torch.no_grad():
        loader = eval_loader(source, EvalTransform(64, 64, "lanczos"), 4, 0, 1, 0, False)
        logits = torch.cat([model(Finish(3).evaluate(images, 64)) for images, _, _ in loader])
    labels = torch.tensor(source.labels()).long()
    answers, losses = logits.argmax(1), torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = json.loads((run.output / "validation.json").read_text(encoding="utf-8"))
    assert found["images"] == 15 and found["step"] == run.log()[-1]["step"]
    for k, line in enumerate(found["classes"]):
        mine = answers[labels == k]
        expected = {"name": f"class_{k}", "images": 5, "acc1": 100 * (mine == k).double().mean().item()}
        assert line == {**expected, "training_images": 16}
    wrong = [(f"class_{a}", f"class_{b}") for a, b in zip(labels.tolist(), answers.tolist()) if a != b]
    pairs = {(pair["label"], pair["predicted"]): pair["images"] for pair in found["confusions"]}
    assert wrong and pairs == {pair: wrong.count(pair) for pair in wrong}
    missed = [i for i in losses.argsort(descending=True).tolist() if answers[i] != labels[i]][:12]
    assert [line["image"] for line in found["worst"]] == [source.name(i) for i in missed]
    page = Page(run.output / "report.html")
    assert page.tags.count("img") == 4 + len(missed) and "fewer than 20 training images: class_0 (16)" in page.text
    found["worst"][0]["thumbnail"] = "https://example.org/x.png"  # nothing in the file leads out of the page
    for content in ({"classes": 3}, found):
        (run.output / "validation.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"validation\.json is not what a run writes"):
            write_report(run.output)


def test_transparent_images_keep_their_transparency(tmp_path):
    import base64
    import io

    from training.findings import thumbnail

    half = Image.new("RGBA", (400, 200), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 200, 200))
    for image, mode in ((half, "RGBA"), (half.convert("RGB"), "RGB")):
        file = io.BytesIO()
        image.save(file, "png")
        small = Image.open(io.BytesIO(base64.b64decode(thumbnail(file.getvalue()).split(",")[1])))
        assert small.mode == mode and small.size == (160, 80)
        assert mode == "RGB" or (small.getpixel((10, 10))[3], small.getpixel((150, 10))[3]) == (0, 255)


def test_charts_clip_a_first_loss_and_mark_stages():
    from training.charts import Series, chart, clipped_top

    falling = [12.0, 2.0, 1.8, 1.7, 1.6, 1.55, 1.5]
    assert clipped_top(falling) == 2.0 and clipped_top([2.3, 2.0, 1.8, 1.7, 1.6]) == 2.3 and clipped_top([5.0]) == 5.0
    assert clipped_top([7.0, 6, 5, 4, 3, 2.5, 2.2, 2]) == 7.0  # a loss that falls gradually is shown whole
    points = list(enumerate(falling))
    svg = chart("Loss", [Series("loss", points)], "x", "y", marks=(2.0, 4.0, 99.0), clip=True)
    assert "Loss; 1 value up to 12 cut off" in svg and svg.count("stroke-dasharray") == 2
    plain = chart("Loss", [Series("loss", points)], "x", "y")
    assert "cut off" not in plain and "stroke-dasharray" not in plain
