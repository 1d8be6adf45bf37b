"""Data sets by name: `open_source("folder" | "tar" | "hfds/NAME", ...)`; which others cannot serve a curriculum."""

from pathlib import Path

from inputs.folder import FolderIndex
from inputs.hugging_face import HuggingFace
from inputs.imagenet import validation_labels
from inputs.labelled import Labelled
from inputs.published import PUBLISHED
from inputs.splits import choose, find_split, look, no_split
from inputs.tables import Table
from inputs.tar import TarIndex
from inputs.views import Joined, Source

STREAMS = {
    "tfds": "TensorFlow Datasets",
    "hfids": "Hugging Face streaming datasets",
    "wds": "timm's WebDataset reader",
}


def open_source(
    name: str,
    root: str | Path,
    split: str,
    classes: list[str] | None = None,
    part: str = "train",
    table: Table | None = None,
    label_key: str = "label",
    several: bool = False,
) -> Source:
    """Opens one split of a data set.

    Args:
        name: ``folder`` (class folders), ``tar`` (archives of images, WebDataset's shards among them) or ``hfds/NAME``
            (a Hugging Face data set).
        root: where the data lies; for hfds the cache folder.
        split: folders below ``root`` for folder and tar (found by `inputs.splits.find_split`), several joined by + (the
            processed ImageNet-22K trains on imagenet21k_train+imagenet21k_small_classes); a split's name for hfds.
        classes: of the training set, for a validation set.
        part: "train" or "val": which usual names of folders the split's default name stands for.
        table: of the labels, for folder and tar; with a column of splits the images may lie anywhere below ``root``.
        label_key: of the label in the .json files of tar shards.
        several: images may have several labels.

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
    if table is not None and table.splits != [""]:
        values = [choose(table.splits, value, part) for value in split.split("+")]
        if None in values:
            raise ValueError(
                f"--labels {table.name}: none of its splits ({', '.join(table.splits)}) is {split}: name one with "
                f"--{part}_split"
            )
        only = classes if len(values) == 1 else None
        flat = _open_flat(name, Path(root))
        sources: list[Source] = [Labelled(flat, table, "", value, only, several) for value in values]
        return sources[0] if len(sources) == 1 else Joined(sources, classes)
    folders = [find_split(root, value, part) for value in split.split("+")]
    if folders == [None] and table is not None and split == part == "train":
        folders = [Path(root)]  # a table labels images wherever they lie
    for folder, value in zip(folders, split.split("+")):
        if folder is None:
            raise no_split(root, value, part)
    only = classes if len(folders) == 1 else None
    sources = []
    for folder in folders:
        if table is not None:
            where = folder.relative_to(root).as_posix().removeprefix(".")
            sources.append(Labelled(_open_flat(name, folder), table, where, None, only, several))
        elif name == "tar":
            sources.append(TarIndex(folder, classes=only, label_key=label_key, several=several))
        else:
            sources.append(open_folder(folder, only))
    return sources[0] if len(sources) == 1 else Joined(sources, classes)


def open_folder(folder: str | Path, classes: list[str] | None = None) -> Source:
    """A folder of class folders, or ImageNet's validation images in one folder, with the list of their labels."""
    folders, images = look(Path(folder))
    if images and not folders and (table := validation_labels(Path(folder))) is not None:
        return Labelled(FolderIndex(folder, flat=True), table, classes=classes)
    return FolderIndex(folder, classes=classes)


def _open_flat(name: str, folder: Path) -> Source:
    return TarIndex(folder, flat=True) if name == "tar" else FolderIndex(folder, flat=True)
