"""A first recipe for one's own images (``--suggest true``): what was seen of them, what follows, and why."""

from __future__ import annotations

import io
import itertools
import math
import os
import statistics
import sys
import textwrap
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from commands.estimate import run_minutes
from config import Config, UsageError, as_usage
from config.recipes import load_recipe
from config.urls import is_url
from datasets import Source, build_source
from inputs.shards import in_threads, remote_parts
from inputs.splits import find_split
from inputs.views import class_counts
from training.build import make_model, make_plan, number_of_classes
from utils import Unreachable, write_text

RECIPES = Path(__file__).parent.parent / "recipes" / "in1k"
SAMPLE = 1000  # images whose headers are read; of fewer than ALL, every one
ALL = 20_000
HELD_OUT = 50  # of each class, at most a tenth of it: ImageNet validates on 50
# What the papers' recipe for a model says beyond batch, learning rate and length.
FROM_RECIPE = ("curriculum", "drop_path", "clip_grad")
NOT_IN_RECIPE = {"suggest", "recipe", "output_dir", "data_path", "data_set"}


@dataclass(frozen=True)
class Seen:
    """What the rules go by: images per class, the short sides (pixels) of a sample, and names that would not open.

    ``labelled``: how many images, where they have several labels each; default: as many as the classes together.
    """

    counts: list[int]
    short_sides: list[int]
    unreadable: list[str] = field(default_factory=list)
    labelled: int | None = None

    @property
    def images(self) -> int:
        return sum(self.counts) if self.labelled is None else self.labelled

    @property
    def median_side(self) -> int:
        return round(statistics.median(self.short_sides))


def suggest(config: Config, said: Collection[str]) -> str:
    """The text of a recipe, every setting under a comment that says why; it was seen to make a plan.

    Args:
        config: the settings; ``said``: those that were given on the command line, which are kept.

    Raises:
        UsageError: data that cannot be found, or are too few; settings that were given and cannot work.
    """
    layout = find_splits(config, said)
    config = replace(config, **{key: value for key, value, _ in layout})
    source = build_source(config, train=True)
    build_source(config, train=False)
    seen = look(source)
    kept = [(key, getattr(config, key), "as you said") for key in asdict(config) if key in {*said} - NOT_IN_RECIPE]
    rows = [row for row in layout if row[0] not in said] + kept
    for rule in (base_size, model, of_the_model, batch, learning_rate, length, baseline, machine):
        for row in rule(config, seen):
            if row[0] not in said:
                rows.append(row)
                config = replace(config, **{row[0]: row[1]})
    plan = make_plan(config, len(source), number_of_classes(config, source))
    return _text(config, seen, rows, run_minutes(config, plan, source))


def write_suggestion(config: Config, said: Collection[str]) -> int:
    """Prints the recipe, and writes it as recipe.yaml to --output_dir."""
    text = suggest(config, said)
    print(text, end="")
    if config.output_dir:
        path = Path(config.output_dir) / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print(f"written to {path}; look at the run: python main.py --recipe {path} --plan table", file=sys.stderr)
    return 0


Row = tuple[str, Any, str]  # setting, value, why


def find_splits(config: Config, said: Collection[str]) -> list[Row]:
    """Which folders hold training and validation images; where none validate, some are held out."""
    if config.data_path is None and not config.data_set.startswith("hfds/"):
        raise UsageError("--suggest needs --data_path: the folder that holds your images")
    if config.labels or config.data_set == "tar":
        return _try_layouts(config, said)
    if config.data_set != "folder" or is_url(config.data_path) or "train_split" in said:
        return []
    root = Path(config.data_path)
    with as_usage():
        found = find_split(root, "train", "train")
        val = found and find_split(root, "val", "val")
    train = "." if found is None else found.relative_to(root).as_posix()
    rows: list[Row] = [("train_split", train, "the folder of class folders to train on")]
    if {"val_split", "val_per_class", "val_share"} & {*said}:
        return rows
    if val:
        name = val.relative_to(root).as_posix()
        return [*rows, ("val_split", name, "the folder of class folders to validate on")]
    why = "there is no validation set: about so many of each class, at most a tenth of it, are held out by their names"
    return [*rows, ("val_per_class", HELD_OUT, why)]


def _try_layouts(config: Config, said: Collection[str]) -> list[Row]:
    """The same for images with a table of labels, or in archives: the first of a few ways in which they can be read."""
    tasks = [] if "task" in said else [("task", "multilabel", "images have several labels each, or none")]
    held = (
        "val_share",
        "10%",
        "there is no validation set: so many of the images are held out by a hash of their paths",
    )
    whole = ("train_split", ".", "the images lie in no folder of a split")
    layouts = [[], [held], [whole, held]]
    if {"val_split", "val_per_class", "val_share"} & {*said}:
        layouts = [[], [whole]]
    problem = None
    for task in ([], tasks):
        for layout in layouts:
            rows = [*task, *(row for row in layout if row[0] not in said)]
            tried = replace(config, **{key: value for key, value, _ in rows})
            try:
                build_source(tried, train=True)
                build_source(tried, train=False)
                return rows
            except UsageError as error:
                problem = problem or error
    raise problem


def look(source: Source) -> Seen:
    """Class counts of all images, and the sizes that headers state: all below 20,000, else (and at a URL) a sample."""
    remote = bool(remote_parts(source))
    count = len(source) if len(source) < ALL and not remote else min(SAMPLE, len(source))
    places = np.linspace(0, len(source) - 1, count, dtype=np.int64).tolist()
    found = list(in_threads(lambda k: _short_side(source, places[k]), count, 16 if remote else 1))
    sides = [side for side in found if side is not None]
    unreadable = [source.name(index) for index, side in zip(places, found) if side is None]
    if not sides:
        raise UsageError(f"--data_path: none of {len(unreadable)} images can be opened, among them {unreadable[0]}")
    return Seen(class_counts(source), sides, unreadable, len(source))


def _short_side(source: Source, index: int) -> int | None:
    """None for an image that cannot be opened."""
    name = source.name(index)
    try:
        data = name if os.path.isfile(name) else source.read(index)
        data = io.BytesIO(data) if isinstance(data, bytes) else data
        with data if isinstance(data, Image.Image) else Image.open(data) as image:
            return min(image.size)
    except Unreachable:
        raise
    except Exception:  # PIL's plugins let many types through on broken files
        return None


# The rules. Each takes the settings so far and what was seen.


def base_size(config: Config, seen: Seen) -> list[Row]:
    # 224 is the papers' and what published weights are for. Enlarged images cost compute and show nothing new, so half
    # of them at least should not need it. Below 64 the curriculum's first stage would fall under 32 pixels, where a
    # network of total stride 32 sees a single position.
    size = min(224, max(64, seen.median_side // 32 * 32))
    if seen.median_side < 64:
        why = f"your images are smaller (median short side {seen.median_side}); the first stage needs 32 pixels"
    elif size == 224:
        why = f"the papers' size; your images are large enough (median short side {seen.median_side})"
    else:
        why = f"the multiple of 32 below {seen.median_side}, the median short side: more would only enlarge images"
    return [("input_size", size, why)]


def model(config: Config, seen: Seen) -> list[Row]:
    # A rule of thumb, not measured here: the papers train Transformers and ConvNeXt on a million images and more; with
    # fewer, small convolutional networks overfit later and need less tuning.
    if seen.images >= 500_000:
        name, why = "convnext_tiny", "enough images for it (the papers: 82.2 % on ImageNet-1K)"
    elif seen.images >= 20_000:
        name, why = "resnet50", "a robust choice between 20,000 and 500,000 images"
    else:
        name, why = "resnet18", "a small network, for fewer than 20,000 images"
    return [("model", name, f"{why}; any of timm's will do")]


def of_the_model(config: Config, seen: Seen) -> list[Row]:
    path = RECIPES / f"{config.model}_etpp200.yaml"
    if path.is_file():
        settings = load_recipe(str(path))
        where = f"as the papers train this model (recipes/in1k/{path.name})"
        return [(key, settings[key], where) for key in FROM_RECIPE if key in settings]
    return [
        ("curriculum", "efficienttrain++", "the accuracy of 1.5 times the compute on ordinary training (the papers)")
    ]


def batch(config: Config, seen: Seen) -> list[Row]:
    # The demo's best of those tried was 64 for its 2,200 images, the papers' is 4096 for 1.28 million; 40 steps a pass
    # gives both, for the limit is what the papers use.
    size = 2 ** round(math.log2(max(seen.images / 40, 1)))
    size = min(4096, max(32, size), 2 ** int(math.log2(max(seen.images // 2, 1))))
    if size < 2:
        raise UsageError(f"--data_path holds {seen.images} images to train on; a curriculum needs at least four")
    return [("batch_size", size, "about 40 optimizer steps a pass, from 32 to the papers' 4096")]


def learning_rate(config: Config, seen: Seen) -> list[Row]:
    # For AdamW. The papers have 4e-3 at 4096 for every model. With BatchNorm the demo's best was 2e-3 at 64, so between
    # the two the power 1/6 of the batch; without it the square root, as for --early_large_batch.
    if config.opt != "adamw":
        return []
    with torch.device("meta"):
        parts = make_model(config, len(seen.counts), config.input_size).modules()
    power = 1 / 6 if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts) else 1 / 2
    lr = float(f"{4e-3 * (config.batch_size / 4096) ** power:.1e}")
    return [("lr", lr, "of AdamW for this batch, between the papers' and our demo's; the first thing to try others of")]


def length(config: Config, seen: Seen) -> list[Row]:
    # 200 full-size epochs' worth is the papers' for ImageNet-1K, 80 for ImageNet-22K, 1000 DeiT's for sets of a few
    # thousand images. 6,000 steps are a rule of thumb: with fewer a network stays half trained.
    steps = max(1, seen.images // config.batch_size)
    epochs = 80 if seen.images >= 5_000_000 else min(1000, max(200, -(-6000 // steps)))
    worth = f"full-size passes' worth of compute, {epochs * steps:,} full-size steps"
    return [("epochs", epochs, f"{worth}; for a first look a tenth will do")]


def baseline(config: Config, seen: Seen) -> list[Row]:
    return [("baseline_epochs", None, "speed-ups are told against ordinary training of the run's own length")]


def machine(config: Config, seen: Seen) -> list[Row]:
    rows: list[Row] = [
        ("num_workers", min(8, os.cpu_count() or 1), "loader processes: the cores of this machine, at most 8")
    ]
    if torch.cuda.is_available():
        rows.append(("micro_batch", "auto", "as many images at once as the GPU's memory takes"))
        if torch.cuda.is_bf16_supported():
            rows.append(("amp", "bf16", "this GPU computes in it, about twice as fast"))
    return rows


def _text(config: Config, seen: Seen, rows: list[Row], minutes: float) -> str:
    low, high = min(seen.counts), max(seen.counts)
    facts = [
        f"Suggested for {config.data_path or config.data_set}: {seen.images:,} images to train on, {len(seen.counts)} "
        f"classes of {_span(seen.counts, 'images')}; short sides of {_span(seen.short_sides, 'pixels')}, half of them "
        f"at least {seen.median_side}."
    ]
    if high > 10 * max(low, 1):
        score = "" if config.task == "multilabel" else "top-1 accuracy is mostly that of the large ones. "
        facts.append(
            f"The classes are unbalanced ({high / max(low, 1):.0f} to 1): {score}Nothing here weighs them; look at the "
            "small ones' predictions before you trust it."
        )
    if seen.unreadable:
        looked_at = len(seen.unreadable) + len(seen.short_sides)
        facts.append(
            f"{len(seen.unreadable)} of {looked_at} files that were looked at cannot be opened, among them "
            f"{seen.unreadable[0]}. Training replaces up to --max_bad of the images (at least 10) and stops beyond."
        )
    needed = f"{minutes:,.0f} minutes" if minutes >= 10 else f"{minutes:.1f} minutes"
    facts.append(
        f"On one device of this machine the run takes about {needed} ({config.epochs:g} full-size passes' worth of "
        "compute, by a few steps and images timed just now); evaluations come on top."
    )
    if seen.images < 100_000:
        facts.append(
            "So few images do better from pre-trained weights: --finetune hf_hub:timm/NAME (of this model), a tenth of "
            "the learning rate and of the epochs."
        )
    facts.append(
        "To try for less: extends: [this recipe, recipes/_fast.yaml] with a third of the epochs. It changes the "
        "optimizer, its learning rate and the curriculum (docs/frontier.md; measured on small models and data only)."
    )
    lines = [f"# {line}" for fact in facts for line in textwrap.wrap(fact, 116)]
    for key, value in (("data_set", config.data_set), ("data_path", config.data_path)):
        lines += [] if value is None else [_setting(key, value)]
    for why, group in itertools.groupby(rows, key=lambda row: row[2]):
        lines += ["", *(f"# {line}" for line in textwrap.wrap(why, 116))]
        lines += [_setting(key, value) for key, value, _ in group]
    return "\n".join(lines) + "\n"


def _setting(key: str, value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return f"{key}: {yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]}"


def _span(values: list[int], unit: str) -> str:
    low, high = min(values), max(values)
    return f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}"
