"""Data sets by name: `open_source("folder" | "tar" | "parquet" | "hfds/NAME" | "tfds/NAME", ...)`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from config.urls import check_url, is_url
from inputs.folder import FolderIndex
from inputs.imagenet import validation_labels
from inputs.labelled import Labelled
from inputs.parquet import ParquetIndex, split_of
from inputs.published import PUBLISHED
from inputs.splits import choose, find_split, look, no_split
from inputs.tables import Table
from inputs.tar import TarIndex
from inputs.tfds import TensorFlowData
from inputs.views import Joined, Source

STREAMS = {"hfids": "Hugging Face streaming datasets", "wds": "timm's WebDataset reader"}


def open_source(
    name: str,
    root: str | Path | None,
    split: str,
    classes: list[str] | None = None,
    part: str = "train",
    table: Table | None = None,
    label_key: str = "label",
    several: bool = False,
    cache_dir: str | None = None,
    cache_size: int | None = None,
) -> Source:
    """Opens one split of a data set.

    Args:
        name: ``folder`` (class folders), ``tar`` (archives of images, WebDataset's shards among them), ``parquet``,
            ``hfds/NAME`` (a Hugging Face data set, on the hub or a folder) or ``tfds/NAME`` (TensorFlow Datasets).
        root: where the data lies, for tar and parquet a folder or a URL; for tfds its data_dir; for hfds unused.
        split: folders below ``root`` for folder and tar (found by `inputs.splits.find_split`; at a URL by their names),
            several joined by + (the processed ImageNet-22K trains on imagenet21k_train+imagenet21k_small_classes); a
            split's name for parquet, hfds and tfds.
        classes: of the training set, for a validation set.
        part: "train" or "val": which usual names of folders the split's default name stands for.
        table: of the labels, for folder and tar; with a column of splits the images may lie anywhere below ``root``.
        label_key: of the label in the .json files of tar shards.
        several: images may have several labels.
        cache_dir, cache_size: local folder for shards of a URL and their index, and bytes of shards that it may hold.

    Raises:
        ValueError: an unknown name, a reader that only streams, or data that is not there.
        Unreachable: a URL that does not answer.
    """
    kind, _, rest = name.partition("/")
    if kind in STREAMS:
        raise ValueError(
            f"--data_set {name}: {STREAMS[kind]} can only be read from beginning to end, but the curriculum asks for "
            "images by number (its order must not depend on workers, and a stopped run must continue at any step); "
            "use --data_set tar (it reads webdataset's shards as they are), parquet or hfds/NAME"
        )
    if kind == "hfds" and rest:
        name, root = "parquet", rest if Path(rest).is_dir() else f"hf://datasets/{rest}"
    if kind == "tfds" and rest:
        name = "tfds"
    if name not in ("folder", "tar", "parquet", "tfds"):
        known = ("folder, tar, parquet, hfds/NAME, tfds/NAME", *PUBLISHED)
        raise ValueError(f"--data_set {name} is not known: choose {', '.join(known)}")
    remote = is_url(root)
    if remote:
        check_url(f"{root}/{split}", "data_path")
        if name not in ("tar", "parquet"):
            raise ValueError(
                f"--data_path {root} is a URL, of which --data_set tar and parquet read shards; --data_set {name} "
                "reads a folder: pack its files into shards, or mount the bucket"
            )
    values = split.split("+")
    cache = {"cache_dir": cache_dir, "cache_size": cache_size} if remote else {}
    open_tar = partial(TarIndex, label_key=label_key, several=several, **cache)
    if name == "tfds":
        return _joined(values, partial(TensorFlowData, rest, root), classes)
    if name == "parquet":
        return _joined(values, lambda value, classes: _parquet(str(root), value, part, classes, cache), classes)
    index = open_tar if name == "tar" else FolderIndex
    if table is not None and table.splits != [""]:
        chosen = [choose(table.splits, value, part) for value in values]
        if None in chosen:
            raise ValueError(
                f"--labels {table.name}: none of its splits ({', '.join(table.splits)}) is {split}: name one with "
                f"--{part}_split"
            )
        flat = index(root if remote else Path(root), flat=True)
        return _joined(chosen, lambda value, classes: Labelled(flat, table, "", value, classes, several), classes)
    folders = _below(str(root), values) if remote else _found(Path(root), values, part, table is not None)

    def open_one(folder: str | Path, classes: list[str] | None) -> Source:
        if table is not None:
            below = folder.removeprefix(str(root)) if remote else folder.relative_to(root).as_posix().removeprefix(".")
            where = below.strip("/")
            return Labelled(index(folder, flat=True), table, where, None, classes, several)
        return open_tar(folder, classes=classes) if name == "tar" else open_folder(folder, classes)

    return _joined(folders, open_one, classes)


def open_folder(folder: str | Path, classes: list[str] | None = None) -> Source:
    """A folder of class folders, or ImageNet's validation images in one folder, with the list of their labels."""
    folders, images = look(Path(folder))
    if images and not folders and (table := validation_labels(Path(folder))) is not None:
        return Labelled(FolderIndex(folder, flat=True), table, classes=classes)
    return FolderIndex(folder, classes=classes)


def _joined(places: list, open_one: Callable[..., Source], classes: list[str] | None) -> Source:
    """One source of several places: ``open_one(place, classes)`` of each."""
    if len(places) == 1:
        return open_one(places[0], classes)
    return Joined([open_one(place, None) for place in places], classes)


def _found(root: Path, values: list[str], part: str, labelled: bool) -> list[Path]:
    """The folders (or archives) of these splits."""
    folders = [find_split(root, value, part) for value in values]
    if folders == [None] and labelled and values == [part] == ["train"]:
        return [root]  # a table labels images wherever they lie
    for folder, value in zip(folders, values):
        if folder is None:
            raise no_split(root, value, part)
    return folders


def _below(root: str, values: list[str]) -> list[str]:
    return [f"{root.rstrip('/')}/{value}".removesuffix("/.") for value in values]


def _parquet(root: str, split: str, part: str, classes: list[str] | None, cache: dict) -> Source:
    place, pattern = split_of(root, split, part)
    return ParquetIndex(place, classes=classes, pattern=pattern, **cache)
