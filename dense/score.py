"""Scores of detections (COCO's, by hotcoco) and of label maps (IoU by a confusion matrix), exact over processes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dense.annotations import mask_library, plain_rle
from dense.transforms import IGNORED
from utils import all_sum

# COCO's twelve numbers, in the order of its summary.
COCO_NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
COCO_NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


class DetectionScorer:
    """Collects a process's detections, and scores those of all processes.

    Args:
        source: `dense.coco.CocoScenes`, opened for scoring.
        masks: whether detections have masks, and they are scored too.
    """

    def __init__(self, source, masks: bool) -> None:
        self.source, self.masks = source, masks
        self.seen: list[int] = []
        self.results: list[dict[str, Any]] = []

    def add(self, detections: list[dict], targets: list[dict], sizes: torch.Tensor) -> None:
        """Takes the detections of a batch; ``targets`` and ``sizes`` are those that `dense.scenes.eval_loader` gave."""
        for detection, target, size in zip(detections, targets, sizes.tolist()):
            self.seen.append(target["image_id"])
            found = to_original(detection, tuple(size), target["original_size"], self.masks)
            self.results += coco_results(found, target["image_id"], self.source.category_ids)

    def scores(self) -> dict[str, Any]:
        """``box_AP``, ``box_AP50``, ... and with masks ``mask_AP``, ...: per cent, None where there are no such
        objects; ``per_class``: {class: {``box_AP``, ``mask_AP``}}; ``images``: how many were scored.

        Raises:
            RuntimeError: an image of the data set was skipped or scored twice.
        """
        check_each_once(self.seen, self.source.ids)
        results = [result for part in gather(self.results) for result in part]
        kinds = ("bbox", "segm") if self.masks else ("bbox",)
        scores: dict[str, Any] = {"images": len(self.source)}
        per_class: dict[str, dict[str, float | None]] = {name: {} for name in self.source.classes}
        for kind in kinds:
            prefix = "box" if kind == "bbox" else "mask"
            numbers, classes = coco_scores(self.source.ground_truth(), results, kind)
            scores.update({f"{prefix}_{key}": value for key, value in numbers.items()})
            for label, number in self.source.category_ids.items():
                per_class[self.source.classes[label]][f"{prefix}_AP"] = classes.get(number)
        return {**scores, "per_class": per_class}


class SegmentationScorer:
    """Counts pixels by label and prediction.

    Args:
        source: `dense.masks.LabelMaps`.
        device: where the matrix lies.
    """

    def __init__(self, source, device: torch.device | str = "cpu") -> None:
        self.source, self.seen = source, []
        classes = len(source.classes)
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, predictions: list[torch.Tensor], targets: list[dict]) -> None:
        """Takes label maps (H, W) at the size of the targets' ``label``."""
        for prediction, target in zip(predictions, targets):
            self.seen.append(target["image_id"])
            self.matrix += confusion(
                prediction.to(self.matrix.device), target["label"].to(self.matrix.device), len(self.matrix)
            )

    def scores(self) -> dict[str, Any]:
        """``mIoU``, ``mAcc`` (means over the classes that occur) and ``aAcc`` (of all pixels), per cent; ``per_class``:
        {class: {``IoU``, ``Acc``}}, None for a class that neither occurs nor is predicted; ``images``.

        Raises:
            RuntimeError: an image of the data set was skipped or scored twice.
            ValueError: no pixel has a class.
        """
        check_each_once(self.seen, [self.source.image_id(i) for i in range(len(self.source))])
        matrix = all_sum(self.matrix.clone()).cpu().double()
        if not matrix.any():
            raise ValueError(
                f"no pixel of the {len(self.source)} label maps has a class, so there is nothing to score: all are "
                f"ignored (the first map: {self.source.label_paths[0]})"
            )
        hit, labelled, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        iou, accuracy = 100 * hit / (labelled + predicted - hit), 100 * hit / labelled
        values = [[None if value != value else value for value in column.tolist()] for column in (iou, accuracy)]
        return {
            "mIoU": iou.nanmean().item(),
            "mAcc": accuracy.nanmean().item(),
            "aAcc": (100 * hit.sum() / matrix.sum()).item(),
            "images": len(self.source),
            "per_class": {
                name: {"IoU": first, "Acc": second} for name, first, second in zip(self.source.classes, *values)
            },
        }


def confusion(prediction: torch.Tensor, label: torch.Tensor, classes: int) -> torch.Tensor:
    """int64 (C, C): pixels by label (rows) and prediction (columns), without those of label 255."""
    counted = label != IGNORED
    pairs = label[counted].long() * classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def to_original(
    detection: dict[str, torch.Tensor], size: tuple[int, int], original: tuple[int, int], masks: bool
) -> dict[str, Any]:
    """Detections of a resized image (height, width) in the pixels of the original one.

    Returns:
        numpy: ``boxes`` float64 (K, 4) xyxy inside the image, ``scores`` (K,), ``labels`` (K,), and with ``masks`` a
        list of K compressed RLEs (a soft mask of at least 0.5 is foreground).
    """
    height, width = original
    scale = torch.tensor([width / size[1], height / size[0]] * 2, dtype=torch.float64)
    boxes = detection["boxes"].detach().cpu().double() * scale
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2, dtype=torch.float64))
    found = {
        "boxes": boxes.numpy(),
        "scores": detection["scores"].detach().float().cpu().numpy(),
        "labels": detection["labels"].detach().cpu().numpy(),
    }
    if masks:
        found["masks"] = paste(detection["masks"].detach().float().cpu(), boxes.float(), original)
    return found


def paste(soft: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Soft masks (K, 28, 28) or (K, 1, 28, 28), spread over their boxes (K, 4) -> RLEs of an image of ``size``.

    A pixel is foreground if the bilinear value at its centre is at least 0.5; beyond the outermost cells' centres the
    mask fades to 0 (Detectron2's and mmdet's rule; torchvision's rounds boxes to pixels, which costs small objects).
    """
    mask = mask_library()
    found = []
    for values, (left, top, right, bottom) in zip(soft.reshape(len(boxes), 1, 1, *soft.shape[-2:]), boxes.tolist()):
        canvas = np.zeros(size, np.uint8, order="F")
        rows, columns = _pixels(top, bottom, size[0]), _pixels(left, right, size[1])
        if len(rows) and len(columns) and right > left and bottom > top:
            y = (rows + 0.5 - top) / (bottom - top) * 2 - 1
            x = (columns + 0.5 - left) / (right - left) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].float()
            inside = F.grid_sample(values, grid, align_corners=False)[0, 0] >= 0.5
            canvas[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = inside.numpy()
        found.append(plain_rle(mask.encode(canvas)))
    return found


def _pixels(first: float, last: float, length: int) -> torch.Tensor:
    """The pixels of a row or column, of ``length`` in all, that a box touches, and one more on each side."""
    start = min(max(int(first) - 1, 0), length)
    return torch.arange(start, max(min(math.ceil(last) + 1, length), start))


def coco_results(found: dict[str, Any], image_id: int, category_ids: dict[int, int]) -> list[dict[str, Any]]:
    """COCO's results of one image: a dict per detection, its category by the file's id; best first.

    Detections of classes that the file of annotations has not are left out: there is nothing to score them by.
    """
    results = []
    for k in np.argsort(-found["scores"], kind="stable"):
        if int(found["labels"][k]) not in category_ids:
            continue
        left, top, right, bottom = found["boxes"][k].tolist()
        result = {
            "image_id": image_id,
            "category_id": category_ids[int(found["labels"][k])],
            "bbox": [left, top, right - left, bottom - top],
            "score": float(found["scores"][k]),
        }
        if "masks" in found:
            result["segmentation"] = found["masks"][k]
        results.append(result)
    return results


def coco_scores(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str
) -> tuple[dict[str, float | None], dict[int, float | None]]:
    """COCO's twelve numbers and the AP of each category by its id, per cent; None where there are no such objects.

    Args:
        kind: ``bbox`` or ``segm``.
    """
    mask_library()  # which says what to install
    from hotcoco import COCO, COCOeval

    if kind == "segm":  # sizes are then those of the masks
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    known = COCO(truth)
    evaluation = COCOeval(known, known.load_res(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # computes the numbers
    numbers = {key: _per_cent(value) for key, value in zip(COCO_NUMBERS, evaluation.stats)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, category; all areas, 100 detections
    classes = {}
    for place, number in enumerate(evaluation.params.cat_ids):
        values = precision[:, :, place]
        classes[number] = _per_cent(values[values > -1].mean() if (values > -1).any() else -1)
    return numbers, classes


def _per_cent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)


def gather(value: Any) -> list[Any]:
    """What each process holds, in the order of their ranks, on all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with torch.inference_mode(False):  # torch 2.4 gathers into tensors of its own, which this would forbid to change
        dist.all_gather_object(values, value)
    return values


def check_each_once(seen: list[int], expected: list[int]) -> None:
    """Raises RuntimeError, on every process, unless all of them together saw each expected image exactly once."""
    counts = Counter(number for part in gather(seen) for number in part)
    twice = [number for number, count in counts.items() if count > 1]
    left_out = [number for number in expected if number not in counts]
    if twice or left_out or len(counts) != len(expected):
        raise RuntimeError(
            f"evaluation scored {sum(counts.values())} images, but the data set has {len(expected)}"
            + (f"; image {twice[0]} more than once" if twice else "")
            + (f"; image {left_out[0]} not at all" if left_out else "")
        )
