"""Build the dense demo's scenes: `python scripts/demo_scenes.py OUT` writes images with boxes, masks and label maps.

Objects are cut out of the photographs that scikit-image ships (scripts/demo_data.py says which and under what terms):
coins, a cup, a cat's eyes, a face, a motorcycle's wheels. Each is turned, scaled, put in another light and pasted on a
rectangle of a texture; where one covers another, the other's mask is what still shows. So every mask is known.

OUT/images/{training,validation}/*.jpg; OUT/annotations/instances_{training,validation}.json in COCO's format (polygons,
and RLE where an object is partly covered); OUT/annotations/{training,validation}/*.png and OUT/objectInfo150.txt as
ADE20K has them, class 1 the background. Backgrounds of training and validation are cut from different bands, but the
objects are the same: what is learnt is finding and outlining them, not recognising new ones.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from demo_data import bands, load
from PIL import Image, ImageDraw, ImageEnhance

# class: (photograph, ellipses in it: centre x, y and half axes, in pixels of demo_data.load's image)
OBJECTS = {
    "coin": (
        "coins.png",
        [(154, 51, 23, 23), (213, 51, 23, 23), (335, 44, 30, 30), (205, 125, 20, 20), (271, 120, 25, 25)]
        + [(102, 196, 21, 21), (213, 194, 24, 24), (347, 187, 31, 31), (46, 261, 27, 27), (172, 262, 28, 28)],
    ),
    "cup": ("coffee.png", [(291, 108, 117, 92)]),
    "eye": ("chelsea.png", [(172, 116, 35, 31), (317, 137, 25, 29)]),
    "face": ("astronaut.png", [(227, 102, 72, 86)]),
    "wheel": ("motorcycle_left.png", [(201, 320, 76, 81), (604, 364, 84, 86)]),
}
CLASSES = tuple(OBJECTS)
BACKGROUNDS = ("brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg")
SIDES = (128, 160)  # of a scene, pixels
OBJECT_SIDES = (30, 72)  # longer side of an object, pixels
COUNT = (2, 5)  # objects of a scene
TURN = 40  # degrees either way
LIGHT = (0.7, 1.3)  # factors of brightness and contrast
VISIBLE = 0.6  # share of an object that others leave uncovered, at least
CORNERS = 40  # of an object's polygon
FINE = 4  # sub-pixels a side in which outlines are drawn


def build(out: Path, seed: int, train: int, val: int) -> dict[str, int]:
    """Write the set, whole or not at all; returns the number of objects per split.

    Raises FileExistsError if `out` holds something else. A finished set of the same settings is left as it is.
    """
    settings = {"seed": seed, "train": train, "val": val, "version": 1}
    about = out / "about.json"
    if about.is_file() and (known := json.loads(about.read_text(encoding="utf-8")))["settings"] == settings:
        return known["objects"]
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} already holds something else: name another folder, or remove this one")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        counts = {split: write(partial, split, seed, n) for split, n in (("training", train), ("validation", val))}
        rows = [f"{number}\t0\t0\t0\t{name}" for number, name in enumerate(("background", *CLASSES), 1)]
        (partial / "objectInfo150.txt").write_text(
            "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n", encoding="utf-8"
        )
        (partial / about.name).write_text(
            json.dumps({"settings": settings, "objects": counts}) + "\n", encoding="utf-8"
        )
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def write(root: Path, split: str, seed: int, count: int) -> int:
    """Writes a split of `count` scenes; returns the number of objects."""
    images, labels = root / "images" / split, root / "annotations" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    for number in range(1, count + 1):
        picture, objects = scene(random.Random(f"{seed} {split} {number}"), split == "training")
        name = f"{number:04d}"
        picture.save(images / f"{name}.jpg", quality=92)
        width, height = picture.size
        content["images"].append({"id": number, "file_name": f"{name}.jpg", "height": height, "width": width})
        classes = np.ones((height, width), np.uint8)
        for label, polygon, mask, covered in objects:
            classes[mask] = label + 2
            number_of = len(content["annotations"]) + 1
            content["annotations"].append(annotation(number_of, number, label, polygon, mask, covered))
        Image.fromarray(classes).save(labels / f"{name}.png")
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return len(content["annotations"])


def annotation(number: int, image: int, label: int, polygon: list, mask: np.ndarray, covered: bool) -> dict:
    """COCO's record of an object: its polygon, or the mask in runs where the polygon does not say what shows."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    segmentation = {"size": list(mask.shape), "counts": runs(mask)} if covered else [polygon]
    return {
        "id": number,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask, column by column, background first."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *edges, mask.size]).tolist()


def scene(rng: random.Random, train: bool) -> tuple[Image.Image, list[tuple[int, list, np.ndarray, bool]]]:
    """An image and its objects: (class, polygon x y x y ..., mask bool (H, W) of what shows, whether it is covered)."""
    size = rng.randint(*SIDES), rng.randint(*SIDES)
    picture = background(size, rng, train)
    placed: list[tuple[int, list, np.ndarray]] = []
    shown: list[np.ndarray] = []
    for _ in range(rng.randint(*COUNT)):
        for _ in range(20):
            label = rng.randrange(len(CLASSES))
            cut, polygon, mask = place(label, size, rng)
            left_over = [other & ~mask for other in shown]
            if all(now.sum() >= VISIBLE * whole.sum() for now, (_, _, whole) in zip(left_over, placed)):
                picture.paste(cut, (0, 0), Image.fromarray((255 * coverage(polygon, size)).astype(np.uint8)))
                placed.append((label, polygon, mask))
                shown = [*left_over, mask]
                break
    objects = zip(placed, shown)
    return picture, [(label, polygon, now, now.sum() < mask.sum()) for (label, polygon, mask), now in objects]


def background(size: tuple[int, int], rng: random.Random, train: bool) -> Image.Image:
    """A rectangle of a texture, in random light, from the bands of the split."""
    photo = load(rng.choice(BACKGROUNDS))
    left, top, right, bottom = rng.choice(bands((0, 0, *photo.size))[0 if train else 1 :: 2])
    width, height = size
    factor = min(1, (right - left) / width, (bottom - top) / height) * rng.uniform(0.7, 1)
    width, height = int(width * factor), int(height * factor)
    x, y = rng.randint(left, right - width), rng.randint(top, bottom - height)
    return light(photo.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.BICUBIC), rng)


def place(label: int, size: tuple[int, int], rng: random.Random) -> tuple[Image.Image, list, np.ndarray]:
    """An object somewhere in a scene of this (width, height): (image of the scene's size, polygon, mask)."""
    photo, ellipses = OBJECTS[CLASSES[label]]
    x, y, across, down = rng.choice(ellipses)
    scale = rng.uniform(*OBJECT_SIDES) / (2 * max(across, down))
    angle = math.radians(rng.uniform(-TURN, TURN))
    cos, sin = math.cos(angle), math.sin(angle)
    reach = scale * math.hypot(across * cos, down * sin), scale * math.hypot(across * sin, down * cos)
    centre = [rng.uniform(half, length - half) for half, length in zip(reach, size)]
    polygon = []
    for corner in range(CORNERS):
        turn = 2 * math.pi * corner / CORNERS
        dx, dy = across * math.cos(turn), down * math.sin(turn)
        polygon += [centre[0] + scale * (dx * cos - dy * sin), centre[1] + scale * (dx * sin + dy * cos)]
    # Image.transform asks where in the photograph each of the scene's pixels comes from.
    a, b, d, e = cos / scale, sin / scale, -sin / scale, cos / scale
    inverse = (a, b, x - a * centre[0] - b * centre[1], d, e, y - d * centre[0] - e * centre[1])
    cut = light(load(photo), rng).transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    polygon = [round(value, 2) for value in polygon]
    return cut, polygon, coverage(polygon, size) >= 0.5


def coverage(polygon: list, size: tuple[int, int]) -> np.ndarray:
    """Share (H, W) of each pixel that lies in the polygon."""
    width, height = size
    fine = Image.new("L", (width * FINE, height * FINE))
    corners = [value * FINE for value in polygon]
    ImageDraw.Draw(fine).polygon(list(zip(corners[::2], corners[1::2])), fill=1)
    return np.asarray(fine).reshape(height, FINE, width, FINE).mean((1, 3))


def light(image: Image.Image, rng: random.Random) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = enhance(image).enhance(rng.uniform(*LIGHT))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=240, help="training scenes (default %(default)s)")
    parser.add_argument("--val", type=int, default=60, help="validation scenes (default %(default)s)")
    args = parser.parse_args()
    if args.train < 1 or args.val < 1:
        parser.error("--train and --val must be at least 1")
    try:
        counts = build(args.out, args.seed, args.train, args.val)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{args.out}: {args.train} training scenes with {counts['training']} objects, {args.val} validation scenes")


if __name__ == "__main__":
    main()
