"""The run report: report.html beside a run's checkpoints, one page without scripts or links to anything outside it.

Training writes it after every evaluation; ``python scripts/report.py OUTPUT_DIR`` writes it again.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
import sys
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from config import Config, plain
from config.checks import DENSE_TASKS
from config.files import read_bytes, read_text
from curriculum import Plan
from models.run_files import check_records, read_environment, read_findings, read_log, read_plan, read_settings
from training.charts import Series, chart, stack
from training.early_stop import read_note
from training.findings import FINDINGS
from training.report_findings import class_scores, findings_section, remarks, table
from utils import duration_text, write_text

WIDTH, HEIGHT = 640, 220
PICTURE = 1 << 25  # bytes of a picture that the page takes in
SAMPLES = 8  # images shown of each stage
# What a task's evaluations are told by: key in the log, name, name with unit, digits.
SCORES = {
    "supervised": ("test_acc1", "top-1", "top-1, %", 2),
    "multilabel": ("test_map", "mAP", "mAP, %", 2),
    "mae": ("test_loss", "reconstruction loss", "test loss", 4),
    "detection": ("test_box_AP", "box AP", "box AP, %", 2),
    "segmentation": ("test_mIoU", "mIoU", "mIoU, %", 2),
}
OTHERS = {"test_acc5": "top-5", "test_mask_AP": "mask AP", "test_mAcc": "mean accuracy"}  # drawn beside it
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f6f6f4; margin: 0 }
main { max-width: 1720px; margin: auto; padding: 24px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 32px 0 8px } h3 { font-size: 15px; margin: 16px 0 8px }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 12px }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(min(420px, 100%), 34%), 1fr)); gap: 12px }
.side { display: flex; flex-wrap: wrap; gap: 0 32px } section { max-width: 100%; overflow-x: auto }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr)); gap: 0 32px }
.scroll { overflow-x: auto }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px }
.worst figcaption { overflow-wrap: anywhere }
.card { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 10px 16px }
.card b { display: block; font-size: 20px } .card span { color: #666; font-size: 13px }
.grid > svg, .plan { background: #fff; border: 1px solid #ddd; border-radius: 8px; max-width: 100%; height: auto }
.grid > svg { width: 100% }
table { border-collapse: collapse; background: #fff; border: 1px solid #ddd; font-size: 14px }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums }
th { color: #666; font-weight: 600 } td.name, th.name { text-align: left }
figure { margin: 0 0 12px } figcaption { font-size: 13px; color: #555 }
figure img { width: 100%; image-rendering: pixelated }
figure img.thumbnail { width: auto; max-width: 160px; image-rendering: auto;
  background: repeating-conic-gradient(#bbb 0% 25%, #fff 0% 50%) 0 0 / 16px 16px }
details { margin-top: 12px }
pre { background: #fff; border: 1px solid #ddd; padding: 12px; overflow-x: auto; font-size: 13px }
"""


# ---- what is gathered during a run ------------------------------------------------------------------------
def plan_picture(plan: Plan) -> str:
    """Input size, RandAugment magnitude and learning rate against compute (epochs at the base size), as one SVG."""
    size, magnitude = [], []
    for epoch in plan:
        first, last = (plan.equivalent_epochs(step) for step in (epoch.first_step, epoch.first_step + epoch.steps))
        size += [(first, epoch.input_size), (last, epoch.input_size)]
        if epoch.magnitude is not None:
            magnitude += [(first, epoch.magnitude), (last, epoch.magnitude)]
    steps = {round(plan.total_steps * index / 400) for index in range(400)}
    for stage in plan.stages:  # both sides of every switch
        steps |= {stage.first_step, stage.first_step + stage.steps - 1}
    rate = [(plan.equivalent_epochs(step), plan.lr_at(step)) for step in sorted(steps) if step < plan.total_steps]
    x, marks = f"compute, epochs at {plan.base_size}", [plan.equivalent_epochs(s.first_step) for s in plan.stages[1:]]
    charts = [
        chart("Input size B", [Series("B", size)], x, "pixels", WIDTH, HEIGHT, marks=marks),
        chart("RandAugment magnitude", [Series("m", magnitude)], x, "magnitude", WIDTH, HEIGHT, True, marks),
        chart("Learning rate", [Series("learning rate", rate)], x, "learning rate", WIDTH, HEIGHT, True, marks),
    ]
    return stack(charts, WIDTH, HEIGHT)


def environment(device: torch.device, processes: int) -> dict[str, str]:
    """What the run runs on: versions, devices, the state of the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {}
    for package in ("torch", "torchvision", "timm", "numpy", "PIL", "cv2", "simplejpeg"):
        versions[package] = str(getattr(sys.modules.get(package), "__version__", "not used"))
    return {
        "devices": f"{processes} x {name}",
        "CPU cores": str(os.cpu_count()),
        "system": platform.platform(),
        "Python": platform.python_version(),
        **versions,
        "code": _commit(),
        "command": " ".join(sys.argv),
    }


def _commit() -> str:
    """The commit of this code, and whether files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def save_samples(path: Path, images: torch.Tensor) -> None:
    """Writes the first images (uint8 (N, 3, S, S)) as a row of a PNG."""
    row = torch.cat(list(images[:SAMPLES].cpu()), dim=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(row.permute(1, 2, 0).contiguous().numpy()).save(path)


# ---- the page ----------------------------------------------------------------------------------------------------
def write_report(output: Path) -> Path:
    """Writes ``report.html`` from what lies in the output folder, and returns its path.

    Raises:
        OSError: ``output`` is no output folder: it has no config.yaml or plan.json, or they cannot be read.
        ValueError: they hold something else than a run writes.
    """
    settings, plan = read_settings(output), read_plan(output)
    records = read_log(output / "log.txt") if (output / "log.txt").exists() else []
    check_records(records, output / "log.txt")
    title = f"{settings['model']} · {plan['curriculum']}"
    changes, note = plan.get("changes", []), read_note(output)
    key = SCORES[settings.get("task", "supervised")][0]
    sections = [
        f"<h1>{escape(title)}</h1>",
        remarks(note, records, key, settings["eval_size"] or plan["base_size"]),
        _cards(note is not None, output, settings, plan, records),
        "<h2>Training</h2>" + f'<div class="grid">{"".join(_curves(settings, plan, records))}</div>',
        f'<h2>Stages</h2><div class="scroll">{_stages(settings, plan, records)}</div>',
        *_validation(output),
        class_scores(records),
        f'<div class="halves"><section><h2>The plan</h2>{_drawing(output / "plan.svg")}</section>'
        f"<section><h2>What the network saw</h2>{_samples(output, settings, plan)}</section></div>",
        *(["<h2>Changed on the way</h2>" + table(["when, what"], [[c] for c in changes], names=1)] if changes else []),
        "<h2>Settings that differ from the defaults</h2>" + _settings(settings),
        "<details><summary>All settings (config.yaml)</summary>"
        f"<pre>{escape(_read(output / 'config.yaml'))}</pre></details>",
        "<h2>Environment</h2>" + _environment(output),
    ]
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>"
    )
    path = output / "report.html"
    write_text(path, page)
    return path


def _cards(
    ended: bool, output: Path, settings: dict[str, Any], plan: dict[str, Any], records: list[dict[str, Any]]
) -> str:
    done = records[-1]["progress"] if records else 0.0
    stopped = "ended early" if ended else "stopped" if (output / "stopped.json").exists() else None
    state = "done" if done >= 1 else stopped or f"{100 * done:.1f} % done"
    base = settings["eval_size"] or plan["base_size"]
    at_base = [record for record in records if record.get("eval_size") == base]
    key, name, *_ = SCORES[settings.get("task", "supervised")]
    scores = [record[k] for record in at_base for k in (key, f"{key}_ema") if record.get(k) is not None]
    score = (f"{max(scores):.2f} %" if scores else "–", f"best {name} at {base} pixels")
    if settings.get("task") == "mae":
        score = (f"{at_base[-1]['test_loss']:.4f}" if at_base else "–", f"reconstruction loss at {base} pixels")
    total = plan["total"]
    speedup = total["speedup_flops"] or total["speedup_pixels"]
    cards = [
        (state, f"{plan['epochs']:g} epochs, {total['steps']:,} optimizer steps"),
        score,
        (f"{speedup:.2f}x", f"less compute than {settings['baseline_epochs'] or plan['epochs']:g} ordinary epochs"),
        (duration_text(sum(record["seconds"] for record in records)), "spent on training"),
    ]
    if total["params"]:
        cards.append((f"{total['params'] / 1e6:.1f} M", f"parameters; {total['flops'] / 1e9:.2f} G multiply-adds"))
    return '<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>"


def _card(value: str, label: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _curves(settings: dict[str, Any], plan: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    compute = [record["equivalent_epochs"] for record in records]
    hours = [seconds / 3600 for seconds in accumulate(record["seconds"] for record in records)]
    x = f"compute, epochs at {plan['base_size']}"

    switches = [stage["progress"][0] for stage in plan["stages"][1:] if "progress" in stage]
    marks = _at_progress(switches, records, compute), _at_progress(switches, records, hours)

    def lines(names: dict[str, str], places: list[float] = compute) -> list[Series]:
        drawn = []
        for key, name in names.items():
            points = [(place, record[key]) for place, record in zip(places, records) if record.get(key) is not None]
            if points:
                drawn.append(Series(name, points))
        return drawn or [Series("none yet", [])]

    loss = lines({"train_loss": "training", "test_loss": "validation", "test_loss_ema": "validation, average"})
    task = settings.get("task", "supervised")
    key, name, *_ = SCORES[task]
    dense = task in DENSE_TASKS
    accuracy = {key: name, f"{key}_ema": f"{name}, average", **OTHERS}

    def draw(title: str, drawn: list[Series], unit: str, by_time: bool = False, **how: bool) -> str:
        x_label = "hours of training" if by_time else x
        return chart(title, drawn, x_label, unit, WIDTH, HEIGHT, marks=marks[by_time], **how)

    throughput = draw("Throughput", lines({"images_per_s": "images/s"}), "images/s", zero=True)
    if task == "mae":
        return [draw("Reconstruction, at each stage's size", loss, "mean squared error", clip=True), throughput]
    return [
        draw("Loss", loss, "sum of all losses", clip=True)
        if dense
        else draw("Loss (of training, on mixed images)", loss, "cross entropy", clip=True),
        draw(name if dense else f"{name}, at each stage's size", lines(accuracy), "per cent"),
        throughput,
        draw(f"{name} against time", lines(accuracy, hours), "per cent", by_time=True),
    ]


def _at_progress(switches: list[float], records: list[dict[str, Any]], places: list[float]) -> list[float]:
    """Where the stages begin that have begun, on the axis that has the records at ``places``."""
    found = []
    for start in switches:
        ends = [place for record, place in zip(records, places) if record["progress"] <= start + 1e-9]
        found += ends[-1:] if len(ends) < len(records) else []  # a pass ends where a stage does
    return found


def _validation(output: Path) -> list[str]:
    """What the last evaluation found about classes and images, if it did."""
    found = read_findings(output / FINDINGS)
    return [] if found is None else ["<h2>Validation images</h2>" + findings_section(found)]


def _stages(settings: dict[str, Any], plan: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """One row for each stage: what was planned, and what was measured so far."""
    rows, first = [], 0
    key, _, head, digits = SCORES[settings.get("task", "supervised")]
    for number, stage in enumerate(plan["stages"], 1):
        mine = [record for record in records if first < record["step"] <= first + stage["steps"]]
        first += stage["steps"]
        seconds, images = (sum(record[key] for record in mine) for key in ("seconds", "images"))
        scores = [record[key] for record in mine if record.get(key) is not None]
        rows.append(
            [
                number,
                stage["input_size"],
                f"{stage['passes']:.1f}",
                f"{100 * stage['compute']:.1f} %",
                stage["batch_size"],
                "–" if stage["forward_passes"] is None else f"{stage['forward_passes']} of {stage['forward_batch']}",
                f"{100 * images / stage['images']:.0f} %",
                f"{images / seconds:,.0f}" if seconds else "–",
                duration_text(seconds) if seconds else "–",
                f"{mine[-1]['train_loss']:.4f}" if mine else "–",
                f"{scores[-1]:.{digits}f}" if scores else "–",
            ]
        )
    heads = [
        "stage",
        "B",
        "passes",
        "compute",
        "batch",
        "forward passes",
        "done",
        "images/s",
        "time",
        "loss",
        head,
    ]
    return table(heads, rows)


def _samples(output: Path, settings: dict[str, Any], plan: dict[str, Any]) -> str:
    figures = []
    for number, stage in enumerate(plan["stages"], 1):
        first = stage["magnitude"][0]
        magnitude = "none" if first is None else format(first, ".1f")
        about = f"stage {number}: B {stage['input_size']}, magnitude {magnitude}"
        more = "(first images of the stage, cropped, augmented, erased and mixed)"
        figures.append(_figure(output / "samples" / f"stage-{number}.png", about, more))
        answers = "validation images, what the model saw of them, and what it predicted (HOG: below that of the images)"
        if settings.get("task") in DENSE_TASKS:
            more, answers = "(first images of the stage)", "validation images, with what was predicted"
        figures.append(_figure(output / "samples" / f"stage-{number}-answers.png", f"stage {number}", answers))
    return "".join(figures) or "<p>Nothing yet.</p>"


def _figure(path: Path, about: str, more: str) -> str:
    """A picture and what it shows; empty if it is not there."""
    if not path.exists():
        return ""
    data = base64.b64encode(read_bytes(path, PICTURE)).decode()
    return (
        f'<figure><img alt="{escape(about)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(about)} {escape(more)}</figcaption></figure>"
    )


def _drawing(path: Path) -> str:
    """An SVG as a picture of its own: a browser runs none of the scripts in one, and fetches nothing for it."""
    if not path.exists():
        return ""
    data = base64.b64encode(read_bytes(path, PICTURE)).decode()
    return f'<img class="plan" alt="the plan" src="data:image/svg+xml;base64,{data}">'


def _settings(settings: dict[str, Any]) -> str:
    defaults = plain(Config())
    changed = [
        [key, json.dumps(value), json.dumps(defaults.get(key))]
        for key, value in settings.items()
        if value != defaults.get(key)
    ]
    return table(["setting", "value", "default"], changed, names=3)


def _environment(output: Path) -> str:
    return table(["", ""], [[key, value] for key, value in read_environment(output).items()], names=2)


def _read(path: Path) -> str:
    return read_text(path) if path.exists() else ""
