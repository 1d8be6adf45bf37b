"""Small scenes for the dense tests, whose masks are known: discs, boxes and triangles on noise.

The same scenes are written as COCO json, Pascal VOC, ADE20K and a folder of masks. Among them are an image without
objects (`EMPTY`), a crowd as uncompressed RLE (`CROWD`), compressed RLEs (`COMPRESSED`), a file that EXIF turns
(`TURNED`), and image and category ids with gaps.
"""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "box", "triangle")
COLOURS = ((220, 50, 40), (40, 200, 60), (60, 80, 230))
CATEGORY_IDS = (2, 7, 40)
EMPTY, CROWD, TURNED, COMPRESSED = 3, 5, 7, (9, 11)


@dataclass
class Scene:
    """One image, uint8 (H, W, 3), and its objects: (class, polygon x y x y ..., mask bool (H, W))."""

    image: np.ndarray
    objects: list = field(default_factory=list)


def scenes(count=24, seed=0, smallest=96, largest=160):
    return [_scene(random.Random(f"{seed} {k}"), k, smallest, largest) for k in range(count)]


def _scene(rng, number, smallest, largest):
    width, height = rng.randint(smallest, largest), rng.randint(smallest, largest)
    if number == TURNED:
        width, height = smallest, largest
    noise = np.random.default_rng(rng.randrange(2**32)).normal(128, 20, (height, width, 3))
    scene = Scene(noise.clip(0, 255).astype(np.uint8))
    taken = np.zeros((height, width), bool)
    for _ in range(0 if number == EMPTY else rng.randint(2, 4)):
        for _ in range(30):
            label, size = rng.randrange(3), rng.randint(smallest // 5, smallest // 2)
            points = _polygon(label, rng.randint(0, width - size), rng.randint(0, height - size), size)
            mask = raster(points, height, width)
            if not (mask & taken).any():
                taken |= mask
                scene.image[mask] = COLOURS[label]
                scene.objects.append((label, [value for point in points for value in point], mask))
                break
    return scene


def _polygon(label, x, y, size):
    if label == 0:
        half = size / 2
        angles = [2 * math.pi * k / 24 for k in range(24)]
        return [(round(x + half + half * math.cos(a), 2), round(y + half + half * math.sin(a), 2)) for a in angles]
    if label == 1:
        return [(x, y), (x + size, y), (x + size, y + size), (x, y + size)]
    return [(x, y + size), (x + size, y + size), (x + size / 2, y)]


def raster(points, height, width, fine=5):
    """bool (H, W): pixels of which half or more lies in the polygon."""
    big = Image.new("L", (width * fine, height * fine))
    ImageDraw.Draw(big).polygon([(x * fine, y * fine) for x, y in points], fill=1)
    share = np.array(big).reshape(height, fine, width, fine).mean((1, 3))
    return share >= 0.5


def runs(mask):
    """Lengths of the runs of a mask in columns, background first: an uncompressed RLE."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(np.diff(flat.astype(np.int8)))
    return np.diff([0, *edges, mask.size]).tolist()


def write_coco(root, made, split="train", first_id=10):
    """ROOT/split/*.jpg and ROOT/annotations/instances_split.json. Returns what the json holds."""
    root = Path(root)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    names = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES)]
    content = {"images": [], "annotations": [], "categories": names[::-1]}
    for k, scene in enumerate(made):
        height, width = scene.image.shape[:2]
        number, file = first_id + 3 * k, f"scene_{k:02d}.jpg"
        content["images"].append({"id": number, "file_name": file, "height": height, "width": width})
        write_image(scene.image, root / split / file, turned=k == TURNED)
        for label, polygon, mask in scene.objects:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            segmentation = [polygon]
            if k in COMPRESSED:
                from pycocotools import mask as library

                rle = library.encode(np.asfortranarray(mask.astype(np.uint8)))
                segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
            content["annotations"].append(
                {
                    "id": 100 + len(content["annotations"]),
                    "image_id": number,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [int(value) for value in box],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        if k == CROWD:
            mask = np.zeros((height, width), bool)
            mask[height // 2 :, width // 4 :] = True
            content["annotations"].append(
                {
                    "id": 100 + len(content["annotations"]),
                    "image_id": number,
                    "category_id": CATEGORY_IDS[0],
                    "bbox": [width // 4, height // 2, width - width // 4, height - height // 2],
                    "area": int(mask.sum()),
                    "iscrowd": 1,
                    "segmentation": {"size": [height, width], "counts": runs(mask)},
                }
            )
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return content


def write_image(image, path, turned=False):
    picture, options = Image.fromarray(image), {}
    if turned:  # stored on its side, and EXIF says so
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    picture.save(path, quality=95, subsampling=0, **options)


def write_voc(root, made, name="trainval"):
    """Pascal's folders, boxes numbered from 1; the last object of the first scene is difficult."""
    root = Path(root)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    stems = [f"{name}_{k:03d}" for k in range(len(made))]
    for k, (stem, scene) in enumerate(zip(stems, made)):
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
        height, width = scene.image.shape[:2]
        objects = ""
        for place, (label, _, mask) in enumerate(scene.objects):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            difficult = int(k == 0 and place == len(scene.objects) - 1)
            objects += (
                f"<object><name>{CLASSES[label]}</name><difficult>{difficult}</difficult><bndbox>"
                f"<xmin>{columns[0] + 1}</xmin><ymin>{rows[0] + 1}</ymin>"
                f"<xmax>{columns[-1] + 1}</xmax><ymax>{rows[-1] + 1}</ymax></bndbox></object>"
            )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (root / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def label_map(scene, background=255):
    """uint8 (H, W): classes 0 to 2, and ``background`` elsewhere."""
    labels = np.full(scene.image.shape[:2], background, np.uint8)
    for label, _, mask in scene.objects:
        labels[mask] = label
    return labels


def write_ade20k(root, made, split="training"):
    """ADEChallengeData2016's folders: background 0, classes from 1."""
    root = Path(root)
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True)
    for k, scene in enumerate(made):
        Image.fromarray(scene.image).save(root / "images" / split / f"{k:03d}.jpg", quality=95)
        labels = label_map(scene)
        Image.fromarray(np.where(labels == 255, 0, labels + 1).astype(np.uint8)).save(
            root / "annotations" / split / f"{k:03d}.png"
        )
    lines = [f"{k}\t0.1\t1\t1\t{name}, synonym" for k, name in enumerate(CLASSES, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]) + "\n")


def write_masks(root, made, split="train", palette=True):
    """ROOT/images/split, ROOT/masks/split and classes.txt, the background a class of its own, number 3."""
    root = Path(root)
    for folder in ("images", "masks"):
        (root / folder / split).mkdir(parents=True)
    for k, scene in enumerate(made):
        Image.fromarray(scene.image).save(root / "images" / split / f"{k:03d}.jpg", quality=95)
        labels = Image.fromarray(label_map(scene, background=3))
        if palette:
            labels = labels.convert("P")
            labels.putdata(label_map(scene, background=3).ravel().tolist())
            labels.putpalette([value for colour in (*COLOURS, (9, 9, 9)) for value in colour])
        labels.save(root / "masks" / split / f"{k:03d}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in (*CLASSES, "background")))
