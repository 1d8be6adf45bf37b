"""What an evaluation finds about single classes and images, for the report: validation.json in the output folder."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from inputs.decode import open_image
from inputs.transforms import to_pixels
from inputs.views import Source

FINDINGS = "validation.json"
WORST = 12  # images that the model is most wrong about
CONFUSIONS = 20  # pairs of classes
THUMBNAIL = 160  # pixels of the long side


def of_classes(source: Source, predictions: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """Per-class accuracy with counts, the pairs most often confused, and the images of the highest loss.

    Args:
        source: the images that were scored. predictions: class numbers (N,). losses: (N,), where NaN counts as worst.
    """
    labels, names = source.labels(), list(source.classes)
    names += [f"unnamed {k}" for k in range(len(names), int(predictions.max(initial=0)) + 1)]  # --num_classes has more
    counts, right = (np.bincount(some, minlength=len(names)) for some in (labels, labels[predictions == labels]))
    wrong = np.flatnonzero(predictions != labels)
    pairs, times = np.unique(np.stack([labels[wrong], predictions[wrong]], 1), axis=0, return_counts=True)
    most = np.argsort(-times, kind="stable")[:CONFUSIONS]
    return {
        "images": len(source),
        "classes": [
            {"name": str(name), "images": int(n), "acc1": 100 * int(hits) / int(n) if n else None}
            for name, n, hits in zip(source.classes, counts, right)
        ],
        "confusions": [
            {"label": str(names[pairs[k, 0]]), "predicted": str(names[pairs[k, 1]]), "images": int(times[k])}
            for k in most
        ],
        "worst": [
            {**_image(source, i), "labels": [str(names[labels[i]])], "predicted": [str(names[predictions[i]])]}
            for i in _highest(losses, wrong)
        ],
    }


def of_labels(
    source: Source, probabilities: np.ndarray, losses: np.ndarray, precisions: list[float | None]
) -> dict[str, Any]:
    """Per-class average precision with counts, and the images of the highest loss.

    Args:
        source: the images that were scored, with several labels each.
        probabilities: (N, classes). losses: (N,). precisions: each class's average precision, per cent.
    """
    names, table = source.classes, source.labels()
    return {
        "images": len(source),
        "classes": [
            {"name": str(name), "images": int(n), "ap": ap} for name, n, ap in zip(names, table.sum(0), precisions)
        ],
        "worst": [
            {
                **_image(source, i),
                "labels": [str(names[k]) for k in np.flatnonzero(table[i])],
                "predicted": [f"{names[k]} {100 * probabilities[i, k]:.0f} %" for k in _likely(probabilities[i])],
            }
            for i in _highest(losses, np.arange(len(source)))
        ],
    }


def _highest(losses: np.ndarray, among: np.ndarray) -> list[int]:
    order = np.argsort(-np.nan_to_num(losses[among], nan=np.inf), kind="stable")
    return among[order[:WORST]].tolist()


def _likely(probabilities: np.ndarray) -> list[int]:
    """Classes of at least 50 %, the most likely one at any rate, five at most."""
    order = np.argsort(-probabilities, kind="stable")[:5].tolist()
    return [k for place, k in enumerate(order) if place == 0 or probabilities[k] >= 0.5]


def _image(source: Source, i: int) -> dict[str, Any]:
    return {"image": source.name(i), "thumbnail": thumbnail(source.read(i))}


def thumbnail(data: bytes | Image.Image) -> str:
    """A small picture as a data: address. What is transparent in the file stays transparent."""
    image = open_image(data) if isinstance(data, bytes) else data
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image, kind = image.convert("RGBA"), "png"
    else:
        image, kind = Image.fromarray(to_pixels(data)), "jpeg"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
