"""Data sets by name: `open_source("folder" | "tar" | "hfds/NAME", ...)`; which others cannot serve a curriculum."""

from pathlib import Path

from inputs.folder import FolderIndex
from inputs.hugging_face import HuggingFace
from inputs.published import PUBLISHED
from inputs.tar import TarIndex
from inputs.views import Joined, Source

STREAMS = {
    "tfds": "TensorFlow Datasets",
    "hfids": "Hugging Face streaming datasets",
    "wds": "timm's WebDataset reader",
}


def open_source(name: str, root: str | Path, split: str, classes: list[str] | None = None) -> Source:
    """Opens one split of a data set.

    Args:
        name: ``folder`` (class folders), ``tar`` (archives of images, WebDataset's shards among them) or ``hfds/NAME``
            (a Hugging Face data set).
        root: where the data lies; for hfds the cache folder.
        split: folders below ``root`` for folder and tar, several joined by + (the processed ImageNet-22K trains on
            imagenet21k_train+imagenet21k_small_classes); a split's name for hfds.
        classes: of the training set, for a validation set.

    Raises:
        ValueError: an unknown name, a reader that only streams, or data that is not there.
    """
    kind, _, rest = name.partition("/")
    if kind in STREAMS:
        raise ValueError(
            f"--data_set {name}: {STREAMS[kind]} can only be read from beginning to end, but the curriculum asks for "
            "images by number (its order must not depend on workers, and a stopped run must continue at any step); "
            "export it to class folders or to tar shards, which --data_set folder and tar read (webdataset's shards "
            "as they are)"
        )
    if kind == "hfds" and rest:
        return HuggingFace(rest, root, split, classes)
    makers = {"folder": FolderIndex, "tar": TarIndex}
    if name not in makers:
        raise ValueError(f"--data_set {name} is not known: choose folder, tar, hfds/NAME, {', '.join(PUBLISHED)}")
    folders = [Path(root) / part for part in split.split("+")]
    if len(folders) == 1:
        return makers[name](folders[0], classes=classes)
    return Joined([makers[name](folder) for folder in folders], classes)
