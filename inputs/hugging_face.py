"""Hugging Face data sets by number: prepared by timm's reader in a process of its own, memory-mapped here.

Of its own, because their package is called `datasets`, as this project's module is, and one process cannot have both.
What it prepares are Arrow files, which pyarrow (which comes with it) maps into memory: nothing is held per process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Prints, last, where the data lie: {"files", "rows", "classes", "image", "label"}.
PREPARE = """
import json, sys
from timm.data.readers.reader_hfds import ReaderHfds
name, root, split = sys.argv[1:]
reader = ReaderHfds(name, root=root or None, split=split)
names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
files = [file["filename"] for file in reader.dataset.cache_files]
print(json.dumps({"files": files, "rows": len(reader), "classes": names,
                  "image": reader.image_key, "label": reader.label_key}))
"""


class HuggingFace:
    """One split of a data set with the columns ``image`` and ``label``.

    Args:
        name: on the hub, or a folder of its files. root: cache folder; None: the package's own.
        split: a whole split, not a slice of one.
        classes: of the training set, for a validation set.

    Raises:
        ValueError: the package is missing, the data set or its split is not there, or it has unknown classes.
    """

    def __init__(self, name: str, root: str | Path | None, split: str, classes: Sequence[str] | None = None):
        self._name = f"hfds/{name}"
        self._layout = _prepare(name, "" if root is None else os.fspath(root), split)
        self._open()
        numbers = np.concatenate([batch[self._layout["label"]].to_numpy() for batch in self._batches])
        names = self._layout["classes"] or [str(number) for number in range(int(numbers.max()) + 1)]
        self.classes = list(classes) if classes is not None else names
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise ValueError(f"{self._name}, split {split}, has classes that training lacks: {', '.join(unknown[:3])}")
        self._labels = np.array([self.classes.index(name) for name in names], dtype=np.int32)[numbers]
        if len(self) != self._layout["rows"]:
            raise ValueError(
                f"--data_set {self._name}: split {split} is a part of its files; take a whole split (--val_per_class "
                "holds images out)"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int) -> Any:
        """Encoded bytes of image ``i``. Raises OSError if it is a file of its own and that has gone."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        batch = int(np.searchsorted(self._starts, i, side="right")) - 1
        image = self._batches[batch][self._layout["image"]][i - int(self._starts[batch])].as_py()
        return image["bytes"] or Path(image["path"]).read_bytes()

    def name(self, i: int) -> str:
        return f"{self._name}: image {i}"

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def labels(self) -> np.ndarray:
        return self._labels

    def _open(self) -> None:
        import pyarrow

        self._batches = []
        for file in self._layout["files"]:
            self._batches += pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all().to_batches()
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self._batches])])

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("_batches", "_starts")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()


def _prepare(name: str, root: str, split: str) -> dict:
    """Runs `PREPARE` where this project's folder is not on the path."""
    project = Path(__file__).resolve().parent.parent
    path = [place for place in sys.path if place and Path(place).resolve() != project]
    command = [sys.executable, "-c", f"import sys; sys.path = {path!r}\n{PREPARE}", name, root, split]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if "No module named 'datasets'" in reason:
        raise ValueError(f"--data_set hfds/{name} needs a package: pip install datasets")
    raise ValueError(f"--data_set hfds/{name}, split {split}: {reason}")
