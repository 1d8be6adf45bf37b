"""Build the demo's small real image set: `python scripts/demo_data.py OUT` writes OUT/{train,val}/<class>/*.jpg.

The photographs are those that scikit-image ships inside its wheel (skimage/data): portraits, a cat, a cup, textures, a
motorcycle, a rocket, the retina, tissue, the sky. Nothing is downloaded. Their docstrings in skimage.data call them
public domain or CC0, but for moon, motorcycle and page, which state nothing beyond the package's BSD licence.

A class is a photograph, or a half of one whose halves differ (`PHOTOS`). Each is cut in five bands along its longer
side: the first, third and fifth give the training images, the others the validation images, so no pixel is in both.
An image is a random rectangle of one band, turned by a few degrees, in slightly different light, its short side
`SHORT_SIDE` pixels, saved as JPEG. Telling the photographs apart takes colour and shape; telling grey textures or the
halves of one photograph apart takes detail. The same seed gives the same images.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageEnhance, ImageStat

# photograph: columns and rows of its grid of classes; what looks the same all over is one class
PHOTOS = {
    "astronaut.png": (2, 1),
    "brick.png": (1, 1),
    "camera.png": (2, 1),
    "chelsea.png": (1, 1),
    "coffee.png": (2, 1),
    "coins.png": (1, 1),
    "grass.png": (1, 1),
    "gravel.png": (1, 1),
    "hubble_deep_field.jpg": (1, 1),
    "ihc.png": (1, 1),
    "moon.png": (1, 1),
    "motorcycle_left.png": (2, 1),
    "page.png": (1, 1),
    "retina.jpg": (2, 1),
    "rocket.jpg": (1, 2),
    "text.png": (1, 1),
}
BANDS = 5  # training, validation, training, validation, training
LONGEST_SIDE = 800  # larger photographs are reduced to it, so that crops of all show about as much
SHORT_SIDE = 88  # of the images written
CROP_SIDE = (48, 112)  # shorter side of the rectangle cut out, in pixels of the photograph
TURN = 10  # degrees either way
FLAT = 3  # standard deviation of grey levels below which a rectangle shows nothing
LIGHT = (0.7, 1.4)  # factors of brightness, contrast and saturation

Box = tuple[int, int, int, int]  # left, top, right, bottom


def build(out: Path, seed: int, train: int, val: int) -> dict[str, int]:
    """Write the set, `train` and `val` images per class, whole or not at all; returns the number of images per split.

    Raises FileExistsError if `out` holds something else. A finished set of the same settings is left as it is.
    """
    settings = {"seed": seed, "train": train, "val": val, "version": 1}
    about = out / "about.json"
    classes = {name: (photo, box) for photo in PHOTOS for name, box in cells(photo)}
    counts = {"classes": len(classes), "train": train * len(classes), "val": val * len(classes)}
    if about.is_file() and json.loads(about.read_text(encoding="utf-8")) == settings:
        return counts
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} already holds something else: name another folder, or remove this one")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        for name, (photo, cell) in classes.items():
            image = load(photo)
            train_bands, val_bands = bands(cell)[::2], bands(cell)[1::2]
            for split, number, places in (("train", train, train_bands), ("val", val, val_bands)):
                folder = partial / split / name
                folder.mkdir(parents=True)
                rng = random.Random(f"{seed} {split} {name}")  # of its own, so that one class never shifts another
                for index in range(number):
                    sample(image, places, rng).save(folder / f"{index:04d}.jpg", quality=92)
        (partial / about.name).write_text(json.dumps(settings) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


@lru_cache
def load(photo: str) -> Image.Image:
    """A photograph from the installed scikit-image, RGB, its longer side at most LONGEST_SIDE."""
    package = find_spec("skimage")
    if package is None:
        raise FileNotFoundError("scikit-image, which ships the photographs, is missing: pip install scikit-image")
    path = Path(package.submodule_search_locations[0]) / "data" / photo
    if not path.is_file():
        raise FileNotFoundError(f"the installed scikit-image does not ship {photo} ({path}): install another version")
    image = Image.open(path).convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    return image


def cells(photo: str) -> list[tuple[str, Box]]:
    """The classes of a photograph: name and place."""
    columns, rows = PHOTOS[photo]
    width, height = load(photo).size
    xs = [width * column // columns for column in range(columns + 1)]
    ys = [height * row // rows for row in range(rows + 1)]
    boxes = {
        f"_{row}{column}": (xs[column], ys[row], xs[column + 1], ys[row + 1])
        for row in range(rows)
        for column in range(columns)
    }
    return [(Path(photo).stem + (place if len(boxes) > 1 else ""), box) for place, box in boxes.items()]


def bands(cell: Box) -> list[Box]:
    """A cell cut in `BANDS` along its longer side, in order."""
    left, top, right, bottom = cell
    if right - left >= bottom - top:
        cuts = [left + (right - left) * i // BANDS for i in range(BANDS + 1)]
        return [(a, top, b, bottom) for a, b in pairwise(cuts)]
    cuts = [top + (bottom - top) * i // BANDS for i in range(BANDS + 1)]
    return [(left, a, right, b) for a, b in pairwise(cuts)]


def sample(image: Image.Image, places: list[Box], rng: random.Random) -> Image.Image:
    """One image: a rectangle inside one of the places, in random light; nearly flat ones (a clear sky) are redrawn."""
    for _ in range(50):
        patch = rectangle(image, rng.choice(places), rng)
        if ImageStat.Stat(patch.convert("L")).stddev[0] >= FLAT:
            break
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        patch = enhance(patch).enhance(rng.uniform(*LIGHT))
    return patch


def rectangle(image: Image.Image, place: Box, rng: random.Random) -> Image.Image:
    """A random, slightly turned rectangle whose corners lie inside `place`, at the size of the images written."""
    left, top, right, bottom = place
    angle = rng.uniform(-TURN, TURN)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = max(aspect, 1.0), max(1 / aspect, 1.0)  # the shorter side is 1
    cos, sin = math.cos(math.radians(abs(angle))), math.sin(math.radians(abs(angle)))
    around_width, around_height = width * cos + height * sin, width * sin + height * cos
    largest = min(CROP_SIDE[1], (right - left - 3) / around_width, (bottom - top - 3) / around_height)
    side = rng.uniform(min(CROP_SIDE[0], largest), largest)
    # a pixel more on each side: turning blends the edge with black
    around_width, around_height = math.ceil(side * around_width) + 2, math.ceil(side * around_height) + 2
    x = rng.randint(left, right - around_width)
    y = rng.randint(top, bottom - around_height)
    around = image.crop((x, y, x + around_width, y + around_height)).rotate(angle, Image.Resampling.BICUBIC)
    margin_x, margin_y = (around_width - side * width) / 2, (around_height - side * height) / 2
    inner = (margin_x, margin_y, around_width - margin_x, around_height - margin_y)
    size = (round(SHORT_SIDE * width), round(SHORT_SIDE * height))
    return around.resize(size, Image.Resampling.BICUBIC, box=inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=100, help="training images per class (default %(default)s)")
    parser.add_argument("--val", type=int, default=40, help="validation images per class (default %(default)s)")
    args = parser.parse_args()
    if args.train < 1 or args.val < 1:
        parser.error("--train and --val must be at least 1")
    try:
        counts = build(args.out, args.seed, args.train, args.val)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print("{out}: {classes} classes, {train} training and {val} validation images".format(out=args.out, **counts))


if __name__ == "__main__":
    main()
