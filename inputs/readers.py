"""Data sets by name: `open_source("folder" | "tar" | "parquet" | "hfds/NAME" | "tfds/NAME", ...)`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from config.urls import check_url, is_url
from inputs.folder import FolderIndex
from inputs.parquet import ParquetIndex, split_of
from inputs.published import PUBLISHED
from inputs.tar import TarIndex
from inputs.tfds import TensorFlowData
from inputs.views import Joined, Source

STREAMS = {"hfids": "Hugging Face streaming datasets", "wds": "timm's WebDataset reader"}


def open_source(
    name: str,
    root: str | Path | None,
    split: str,
    classes: list[str] | None = None,
    cache_dir: str | None = None,
    cache_size: int | None = None,
) -> Source:
    """Opens one split of a data set.

    Args:
        name: ``folder`` (class folders), ``tar`` (archives of images, WebDataset's shards among them), ``parquet``,
            ``hfds/NAME`` (a Hugging Face data set, on the hub or a folder) or ``tfds/NAME`` (TensorFlow Datasets).
        root: where the data lies, for tar and parquet a folder or a URL; for tfds its data_dir; for hfds unused.
        split: folders below ``root`` for folder and tar, several joined by + (the processed ImageNet-22K trains on
            imagenet21k_train+imagenet21k_small_classes); a split's name for parquet, hfds and tfds.
        classes: of the training set, for a validation set.
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
    shards = {"cache_dir": cache_dir, "cache_size": cache_size} if is_url(root or "") or kind == "hfds" else {}
    if kind == "hfds" and rest:
        name, root = "parquet", rest if Path(rest).is_dir() else f"hf://datasets/{rest}"
    if kind == "tfds" and rest:
        name, make = "tfds", partial(TensorFlowData, rest, root)
    elif name in (makers := _makers(str(root), shards)):
        make = makers[name]
    else:
        known = ("folder, tar, parquet, hfds/NAME, tfds/NAME", *PUBLISHED)
        raise ValueError(f"--data_set {name} is not known: choose {', '.join(known)}")
    if is_url(root or ""):
        check_url(f"{root}/{split}", "data_path")
        if name not in ("tar", "parquet"):
            raise ValueError(
                f"--data_path {root} is a URL, of which --data_set tar and parquet read shards; --data_set {name} "
                "reads a folder: pack its files into shards, or mount the bucket"
            )
    parts = split.split("+")
    if len(parts) == 1:
        return make(split, classes=classes)
    return Joined([make(part) for part in parts], classes)


def _makers(root: str, shards: dict) -> dict[str, Callable[..., Source]]:
    """Of each kind: (split, classes=None) -> its source."""

    def parquet(split: str, classes: list[str] | None = None) -> Source:
        place, pattern = split_of(root, split)
        return ParquetIndex(place, classes=classes, pattern=pattern, **shards)

    def below(split: str) -> str | Path:
        return f"{root.rstrip('/')}/{split}".removesuffix("/.") if is_url(root) else Path(root) / split

    return {
        "folder": lambda split, classes=None: FolderIndex(below(split), classes=classes),
        "tar": lambda split, classes=None: TarIndex(below(split), classes=classes, **shards),
        "parquet": parquet,
    }
