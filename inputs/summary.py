"""What was read, in one line: images by ending, what was skipped and why, the classes' order, kinds of images."""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from inputs.decode import JPEG_START, open_image
from inputs.formats import listed
from inputs.labelled import Labelled
from inputs.names import order_of
from inputs.shards import in_threads
from inputs.views import Joined, Source, View, class_counts
from utils import Unreachable

SAMPLE = 1000  # images whose headers are read; of fewer, every one


def describe(train: Source, val: Source, how: str) -> str:
    """One line on the training and the validation images; ``how``: where the latter come from."""
    names = train.classes
    some = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
    lines = [
        f"data: {len(train):,} training and {len(val):,} validation images ({how})",
        f"{len(names):,} classes in {order_of(names)}: {some}",
    ]
    without = [name for name, count in zip(names, class_counts(val)) if not count]
    if without:
        lines.append(f"{len(without):,} of them without a validation image: {_first(without)}")
    seen = set()
    for source in (*_roots(train), *_roots(val)):
        if isinstance(source, Labelled):
            if source.table not in seen and (source.unlabelled or source.unused):
                seen.add(source.table)
                lines.append(
                    f"{source.table}: {source.unused:,} rows without an image, {source.unlabelled:,} images below "
                    f"{source.source.root} without a label (skipped)"
                )
        elif source.root not in seen:
            seen.add(source.root)
            endings, left_out = source.contents()
            lines.append(f"{source.root}: {listed(endings)}" + (f"; not read: {listed(left_out)}" if left_out else ""))
    return "; ".join([*lines, *look_at(train.read, len(train))])


def look_at(read: Callable[[int], bytes | Image.Image], count: int) -> list[str]:
    """How many training images are of each kind that is not used just as it is, by their headers.

    Args:
        read: gives an image's bytes, or the image; of at most SAMPLE of the ``count`` images.
    """
    places = np.linspace(0, count - 1, min(SAMPLE, count), dtype=np.int64).tolist()
    found = Counter(
        trait for traits in in_threads(lambda k: _traits(read, places[k]), len(places), 16) for trait in traits
    )
    return [f"{number:,} of {len(places):,} training images looked at are {trait}" for trait, number in found.items()]


def _traits(read: Callable[[int], bytes | Image.Image], i: int) -> list[str]:
    try:
        data = read(i)
        if isinstance(data, bytes) and data.startswith(JPEG_START):
            return []
        image = data if isinstance(data, Image.Image) else open_image(data)
    except Unreachable:
        raise
    except Exception:  # PIL's plugins let many types through on broken files
        return ["not to be opened"]
    traits = []
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        traits.append("16-bit grey (reduced to the 8 high bits)")
    elif image.mode in ("I", "F"):
        traits.append("of 32-bit integers or floats (scaled to 8 bits from the range the file declares, else its own)")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        traits.append("transparent (transparency is dropped, the stored colours stay)")
    if getattr(image, "is_animated", False):
        traits.append("animated (the first frame is used)")
    return traits


def _roots(source: Source) -> Iterator[Source]:
    """The tables' views and the indices that a source rests on."""
    if isinstance(source, Joined):
        for part in source.sources:
            yield from _roots(part)
    elif isinstance(source, View):
        if isinstance(source, Labelled):
            yield source
        yield from _roots(source.source)
    elif hasattr(source, "contents"):
        yield source


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
