"""Images per second of the input pipelines against the release's order of operations (`bench.py input`)."""

import argparse
import io
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from curriculum.augment import RandAugment
from inputs.finish import IMAGENET_MEAN, IMAGENET_STD, Finish
from inputs.transforms import TrainTransform, collate, crop_box

MAGNITUDE = 9.0
CHUNK = 16


def run(args: argparse.Namespace) -> dict:
    """The pipelines in turn on one core, on the user's own images; CPU time, so that other processes matter little."""
    torch.set_num_threads(1)
    paths = sample(args.data_path, args.images, args.seed)
    result: dict = {
        "exact": {},
        "fast": {},
        "spread": {"exact": {}, "fast": {}},
        "difference": {"exact": {}, "fast": {}},
    }
    print(f"{len(paths)} images, {sum(os.path.getsize(p) for p in paths) / len(paths) / 1024:.0f} KB each, one core")
    print("B    pipeline   images/s  ratio (spread)        pixel difference of 255")
    for size in args.sizes:
        transforms = {
            name: TrainTransform(args.base_size, "lanczos", RandAugment(), pipeline=name) for name in ("exact", "fast")
        }
        variants = {"reference": partial(reference, size=size, transform=transforms["exact"])}
        for name, transform in transforms.items():
            variants[name] = pipeline(transform, size)
        seconds = in_turn(variants, paths, args.repetitions)
        best = {name: times.min(axis=0).sum() for name, times in seconds.items()}
        print(f"{size:<4} reference {len(paths) / best['reference']:9.0f}  1")
        for name, transform in transforms.items():
            ratios = seconds["reference"].sum(axis=1) / seconds[name].sum(axis=1)
            spread = [round(float(np.quantile(ratios, q)), 2) for q in (0.1, 0.9)]
            off = difference(paths[: 4 * CHUNK], size, transform)
            result[name][str(size)] = round(float(best["reference"] / best[name]), 2)
            result["spread"][name][str(size)] = spread
            result["difference"][name][str(size)] = round(off, 3)
            print(
                f"     {name:<9} {len(paths) / best[name]:9.0f}  {result[name][str(size)]:.2f} "
                f"({spread[0]:.2f} to {spread[1]:.2f})   {off:.3f}"
            )
    return result


def sample(root: str, count: int, seed: int) -> list[str]:
    """``count`` image files below ``root``, at random among the first ten thousand that are met."""
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        found += [os.path.join(folder, name) for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
        if len(found) > 10000:
            break
    if not found:
        raise SystemExit(f"error: --data_path {root} has no images")
    return random.Random(seed).sample(found, min(count, len(found)))


def decoded_by_pil(path: str) -> Image.Image:
    return Image.open(io.BytesIO(Path(path).read_bytes())).convert("RGB")


def augmented_by_pil(path: str, seed: int, size: int, transform: TrainTransform) -> Image.Image:
    """The release's operations in its order, on PIL images, with the random choices that ``transform`` makes."""
    rng = random.Random(seed)
    image = decoded_by_pil(path)
    box = crop_box(image.height, image.width, transform.scale, transform.ratio, rng)
    image = F.resized_crop(image, *box, [transform.base_size] * 2, F.InterpolationMode.BICUBIC)
    if rng.random() < transform.flip:
        image = F.hflip(image)
    image = transform.randaugment.apply(image, transform.draw_operations(MAGNITUDE, rng))
    return image if size == transform.base_size else image.resize((size, size), Image.Resampling.LANCZOS)


def reference(paths: list[str], first: int, size: int, transform: TrainTransform) -> torch.Tensor:
    erase = RandomErasing(0.25, mode="pixel", device="cpu")
    images = []
    for k, path in enumerate(paths):
        image = F.to_tensor(augmented_by_pil(path, first + k, size, transform))
        images.append(erase(F.normalize(image, IMAGENET_MEAN, IMAGENET_STD)))
    return torch.stack(images)


def pipeline(transform: TrainTransform, size: int) -> Callable[[list[str], int], torch.Tensor]:
    finish = Finish(1000, base_size=transform.base_size, mixup=0, cutmix=0)

    def run_chunk(paths: list[str], first: int) -> torch.Tensor:
        samples = [(transform(Path(p).read_bytes(), size, MAGNITUDE, first + k), 0) for k, p in enumerate(paths)]
        images, labels = collate(samples)
        return finish.train(images, labels, size, [first], len(images))[0]

    return run_chunk


def in_turn(variants: dict[str, Callable], paths: list[str], repetitions: int) -> dict[str, np.ndarray]:
    """CPU seconds (repetitions, chunks) of each variant, run chunk by chunk one after the other."""
    chunks = [(paths[k : k + CHUNK], k) for k in range(0, len(paths), CHUNK)]
    seconds = {name: np.zeros((repetitions + 1, len(chunks))) for name in variants}
    for repetition in range(repetitions + 1):  # the first one warms up
        for place, chunk in enumerate(chunks):
            for name, variant in variants.items():
                start = time.process_time()
                variant(*chunk)
                seconds[name][repetition, place] = time.process_time() - start
    return {name: times[1:] for name, times in seconds.items()}


def difference(paths: list[str], size: int, transform: TrainTransform) -> float:
    """Mean absolute difference to PIL's pixels, in levels of 255."""
    values = []
    for k, path in enumerate(paths):
        ours = transform(Path(path).read_bytes(), size, MAGNITUDE, k).permute(1, 2, 0).numpy().astype(int)
        values.append(np.abs(ours - np.asarray(augmented_by_pil(path, k, size, transform))).mean())
    return float(np.mean(values))
