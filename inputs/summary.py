"""What was read, in one line: images by ending, what was skipped and why, the classes' order, kinds of images."""

from collections import Counter
from collections.abc import Iterator

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
    looked, traits = look_at(train)
    lines += [f"{count:,} of {looked:,} training images looked at are {trait}" for trait, count in traits.items()]
    return "; ".join(lines)


def look_at(source: Source) -> tuple[int, Counter]:
    """(headers looked at, how many images of each kind that is not used just as it is)."""
    places = np.linspace(0, len(source) - 1, min(SAMPLE, len(source)), dtype=np.int64).tolist()
    found = in_threads(lambda k: _traits(source, places[k]), len(places), 16)
    return len(places), Counter(trait for traits in found for trait in traits)


def _traits(source: Source, i: int) -> list[str]:
    try:
        data = source.read(i)
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
