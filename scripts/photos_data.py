"""A set of photographs for studies: `python scripts/photos_data.py OUT` writes OUT/{train,val}/<class>/*.jpg.

A class is one of the wallpapers that Debian packages. The machine needs Debian's package client: `apt-get update`
first; 350 MB are downloaded and unpacked into --work, nothing is installed. Each photograph is cut in a 4 x 4 grid: ten
cells give the training crops, six the validation crops, so no pixel is in both. Crops are of random scale, with the hue
turned and saturation, gain and offset changed at random, so that the palette alone does not give the class away. Less
noisy than the demo's set: 41 classes of 300 training and 120 validation images of 64 pixels. The same seed gives the
same images.
"""

import argparse
import math
import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = (
    "gnome-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
)
# Parts of the paths of what is a photograph and not flat.
PHOTOS = """
Bridge_by_Sander Dragonfly_by_Bolly Picture_0B_by Picture_1A_by Wine_by_Jakkub aitzgorri_by analogpattern_by
free_by_Peter friends_by_Aitzol greentock_by life_by_Aitzol picosdeeuropa seeding_by sunset_by Kleiber_by
Elephants_3840 nature/Aqua nature/Blinds nature/Dune nature/Garden nature/GreenMeadow nature/LadyBird nature/RainDrops
nature/Storm nature/TwoWings nature/YellowFlower Autumn/ BytheWater/ ColdRipple/ ColorfulCups/ DarkestHour/
EveningGlow/ FallenLeaf/ Grey/ Kite/ OneStandsOut/ Path/ summer_1am/ licorice-l Infinite-Sea wood-l
"""
SHORT_SIDE = 1024  # of a photograph
LONG_SIDE = 1638  # at most; the middle is kept
GRID = 4  # cells a side
VALIDATION_CELLS = 6
SMALLEST_CROP = 84  # pixels of the photograph
FLAT = 12  # standard deviation of grey levels below which a crop shows nothing
TRIES = 40  # crops looked at for each image; then flat ones are taken


def fetch(work: Path) -> None:
    """Downloads and unpacks the packages that are not there yet."""
    (work / "unpacked").mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not list(work.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=work, check=True, stdout=subprocess.DEVNULL)
    for package in sorted(work.glob("*.deb")):
        folder = work / "unpacked" / package.name.split("_")[0]
        if not folder.is_dir():
            subprocess.run(["dpkg", "-x", package, folder], check=True)


def photographs(work: Path) -> dict[str, Image.Image]:
    """RGB, the short side SHORT_SIDE, by the name of their class.

    Raises:
        FileNotFoundError: another version of the packages lacks one of them.
    """
    files = sorted(
        str(path)
        for name in PACKAGES
        for path in (work / "unpacked" / name / "usr/share").rglob("*")
        if path.suffix.lower() in (".jpg", ".png", ".webp")
        and not path.is_symlink()
        and path.stat().st_size > 100_000
        and "screenshot" not in str(path)
    )
    found = {}
    for number, part in enumerate(PHOTOS.split()):
        matching = [file for file in files if part in file]
        if not matching:
            raise FileNotFoundError(f"no file with {part} in its path below {work}: the packages are other versions")
        image = Image.open(matching[0])
        image.draft("RGB", (SHORT_SIDE, SHORT_SIDE))
        image = image.convert("RGB")
        scale = SHORT_SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        if image.width > LONG_SIDE:
            left = (image.width - LONG_SIDE) // 2
            image = image.crop((left, 0, left + LONG_SIDE, SHORT_SIDE))
        found[f"{number:02d}_{part.strip('/').replace('/', '_')}"] = image
    return found


def recolour(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """float (H, W, 3), 0 to 255: hue turned about the grey axis, then saturation, gain and offset."""
    angle = math.radians(rng.uniform(-180, 180))
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    pixels = pixels @ (cos * np.eye(3) + (1 - cos) / 3 * np.ones((3, 3)) + sin * cross).T.astype(np.float32)
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.2, 1.2)
    mean = pixels.mean()
    return (pixels - mean) * rng.uniform(0.7, 1.3) + mean + rng.uniform(-20, 20)


def build(out: Path, work: Path, seed: int, size: int, train: int, val: int) -> int:
    """Writes the set; returns the number of classes."""
    fetch(work)
    images = photographs(work)
    for name, image in images.items():
        rng = random.Random(f"{seed}/{name}")
        cells = [(column, row) for column in range(GRID) for row in range(GRID)]
        rng.shuffle(cells)
        for split, some, count in (("val", cells[:VALIDATION_CELLS], val), ("train", cells[VALIDATION_CELLS:], train)):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                crop = _crop(image, some, size, rng)
                if rng.random() < 0.5:
                    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                pixels = recolour(np.asarray(crop, np.float32), rng).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=rng.randint(82, 93))
    return len(images)


def _crop(image: Image.Image, cells: list[tuple[int, int]], size: int, rng: random.Random) -> Image.Image:
    """A random square of one of the cells that is not flat, size x size."""
    width, height = image.width // GRID, image.height // GRID
    for _ in range(TRIES):
        column, row = rng.choice(cells)
        side = round(2 ** rng.uniform(math.log2(SMALLEST_CROP), math.log2(min(width, height))))
        left, top = column * width + rng.randint(0, width - side), row * height + rng.randint(0, height - side)
        square = image.crop((left, top, left + side, top + side))
        if np.asarray(square.convert("L"), np.float32).std() >= FLAT:
            break
    return square.resize((size, size), Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the set")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other crops of the same photographs")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--train", type=int, default=300, help="training images of each class")
    parser.add_argument("--val", type=int, default=120, help="validation images of each class")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "photos", help="for the packages")
    args = parser.parse_args()
    classes = build(args.out, args.work, args.seed, args.size, args.train, args.val)
    print(
        f"{classes} classes, {classes * args.train:,} training and {classes * args.val:,} validation images: {args.out}"
    )


if __name__ == "__main__":
    main()
