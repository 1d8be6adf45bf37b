"""Where the training and the validation images lie: the usual names of split folders, in any case and nesting."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from inputs.formats import ENDINGS, ending, hidden

# What the parts of a data set are called, the likeliest first; a folder may have more words (seg_train, Training set).
USUAL = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "valset", "dev", "test", "testing", "testset"),
}
IMAGENET = Path("ILSVRC/Data/CLS-LOC")  # where Kaggle's edition has its split folders


def choose(names: Iterable[str], wanted: str, part: str) -> str | None:
    """The name among ``names`` that ``wanted`` means: itself, itself in another case, or if it is the default
    ("train", "val") the usual name of that part. None if there is none.

    Raises:
        ValueError: several would do.
    """
    names = list(names)
    if wanted in names:
        return wanted
    found = [name for name in names if name.lower() == wanted.lower()]
    if not found and wanted == part:
        ranked = []
        for name in names:
            words = re.findall("[a-z]+", name.lower())
            rank = next((rank for rank, usual in enumerate(USUAL[part]) if usual in words), None)
            if rank is not None:
                ranked.append((rank, len(words), name))
        found = [name for rank, words, name in ranked if (rank, words) == min(ranked)[:2]]
    if len(found) > 1:
        raise ValueError(f"--{part}_split: {' and '.join(sorted(found))} could each be it; name one")
    return found[0] if found else None


def find_split(root: str | Path, wanted: str, part: str) -> Path | None:
    """The folder (or archive) below ``root`` that a split's name means (`choose`), or None.

    Folders that hold nothing but one folder, as archives from Kaggle unpack, are passed through.

    Raises:
        ValueError: there is no folder ``root``, or several folders would do.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data_path: there is no folder {root}")
    for _ in range(5):
        if (root / wanted).exists():
            return _inside(root / wanted)
        folders, images = look(root)
        if (found := choose(folders, wanted, part)) is not None:
            return _inside(root / found)
        if (root / IMAGENET).is_dir():
            root = root / IMAGENET
        elif len(folders) == 1 and not images:
            root = root / folders[0]
        else:
            break
    return None


def _inside(path: Path) -> Path:
    """Of seg_train/seg_train/<classes>, the inner folder; any other path as it is."""
    for _ in range(5):
        folders, images = look(path)
        if len(folders) != 1 or images:
            break
        inner, more = look(path / folders[0])
        if not inner or more:
            break
        path = path / folders[0]
    return path


def look(folder: Path) -> tuple[list[str], bool]:
    """(names of the folders in a folder, sorted; whether there are images in it too). Of a file: none."""
    folders, images = [], False
    if folder.is_dir():
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not hidden(entry.name):
                        if entry.is_dir():
                            folders.append(entry.name)
                        else:
                            images = images or ending(entry.name) in ENDINGS
        except OSError as error:
            raise ValueError(f"--data_path: cannot list {folder}: {error.strerror}") from error
    return sorted(folders), images


def no_split(root: str | Path, wanted: str, part: str) -> ValueError:
    """What to say where `find_split` found none."""
    folders, _ = look(Path(root))
    there = f"; folders there: {', '.join(folders[:8])}" + ", ..." * (len(folders) > 8) if folders else ""
    if part == "train":
        mend = "name the folder with --train_split ('.' where the class folders lie in --data_path itself)"
    else:
        mend = "name it with --val_split, or hold training images out with --val_share 10%"
    usual = f" nor one of a usual name ({', '.join(USUAL[part])})" if wanted == part else ""
    return ValueError(f"--data_path: there is no folder {Path(root) / wanted}{usual}{there}: {mend}")
