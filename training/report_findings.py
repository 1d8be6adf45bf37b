"""The report's findings: what to know of the run, classes, what is confused with what, and the images most wrong."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from training.advice import first_was_best

SHOWN = 20  # rows of a table; the others are folded away
FEW = 20  # training images of a class below which it is pointed out


def remarks(note: dict[str, Any] | None, records: list[dict[str, Any]], key: str, size: int) -> str:
    """HTML of what to know before a run's numbers are trusted.

    Args:
        note: that it ended early, if it did. records: of its log. key: in it, what its evaluations at ``size`` are told
            by.
    """
    lines = [f"ended early after step {note['step']}: {note['why']}"] if note else []
    if key != "test_loss" and (found := first_was_best(records, key, size)):
        lines.append(found)
    return "".join(f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in lines)


def findings_section(found: dict[str, Any]) -> str:
    """HTML of what `training.findings` wrote to validation.json."""
    classes, several = found["classes"], "confusions" not in found
    known = [line for line in classes if line["images"]]
    key, head = ("ap", "average precision, %") if several else ("acc1", "accuracy, %")
    known = sorted((line for line in known if line.get(key) is not None), key=lambda line: line[key])
    parts = [
        f"<p>{found['images']:,} validation images at {found['eval_size']} pixels, after step {found['step']:,}.</p>",
        _few(classes),
        '<div class="side">',
        f"<section><h3>Classes, the worst first</h3>{_classes(known, key, head)}</section>",
    ]
    if not several:
        rows = [[pair["label"], pair["predicted"], pair["images"]] for pair in found["confusions"]]
        pairs = table(["label", "predicted", "images"], rows, names=2) if rows else "<p>None.</p>"
        parts.append(f"<section><h3>Most often confused</h3>{pairs}</section>")
    title = "Images with the highest loss" if several else "Most wrong"
    parts.append(f'</div><h3>{title}</h3><div class="worst">{"".join(map(_image, found["worst"]))}</div>')
    return "".join(parts)


def _classes(lines: list[dict[str, Any]], key: str, head: str) -> str:
    heads = ["class", head, "validation images", "training images"]
    rows = [[line["name"], f"{line[key]:.1f}", line["images"], line["training_images"]] for line in lines]
    text = table(heads, rows[:SHOWN], names=1)
    if rows[SHOWN:]:
        more = table(heads, rows[SHOWN:], names=1)
        text += f"<details><summary>{len(rows) - SHOWN:,} more</summary>{more}</details>"
    return text


def _few(classes: list[dict[str, Any]]) -> str:
    """What to know about small classes before their numbers are trusted."""
    few = [line for line in classes if line["training_images"] < FEW]
    few = sorted(few, key=lambda line: line["training_images"])
    unscored = [line["name"] for line in classes if not line["images"]]
    text = ""
    if few:
        some = ", ".join(f"{line['name']} ({line['training_images']})" for line in few[:SHOWN])
        text += f"<p>Classes with fewer than {FEW} training images: {escape(some)}{_more(few)}.</p>"
    if unscored:
        some = ", ".join(unscored[:SHOWN])
        text += f"<p>Without a validation image, so not scored: {escape(some)}{_more(unscored)}.</p>"
    return text


def _more(items: list[Any]) -> str:
    return f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""


def _image(line: dict[str, Any]) -> str:
    labels, predicted = (escape(", ".join(line[key]) or "none") for key in ("labels", "predicted"))
    name = escape(line["image"], quote=True)
    return (
        f'<figure title="{name}"><img class="thumbnail" alt="{name}" src="{line["thumbnail"]}">'
        f"<figcaption>label: <b>{labels}</b><br>predicted: {predicted}</figcaption></figure>"
    )


def class_scores(records: list[dict[str, Any]]) -> str:
    """A detector's or segmenter's last scores of every class; empty for other tasks."""
    classes = next((record["per_class"] for record in reversed(records) if "per_class" in record), None)
    if not classes:
        return ""
    columns = list(next(iter(classes.values())))
    rows = [
        [name, *("–" if values.get(key) is None else f"{values[key]:.2f}" for key in columns)]
        for name, values in classes.items()
    ]
    return "<h2>Classes</h2>" + table(["class", *(f"{key.replace('_', ' ')}, %" for key in columns)], rows, names=1)


def table(heads: list[str], rows: Iterable[list[Any]], names: int = 0) -> str:
    """``names``: how many of the first columns are text, set to the left."""

    def row(cells: list[Any], tag: str) -> str:
        kinds = [' class="name"' if index < names else "" for index in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for cell, kind in zip(cells, kinds)) + "</tr>"
        )

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
