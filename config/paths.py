"""Settings that name files and folders: ``~`` and ``~user`` in them are what a shell makes of them."""

from __future__ import annotations

import os
from typing import Any

from config.usage import UsageError

PATHS = (
    *("output_dir", "data_path", "train_split", "val_split", "eval_data", "labels", "class_map", "cache_dir"),
    *("resume", "finetune", "curriculum", "speeds", "predict", "predict_to"),
)


def expand(name: str, value: Any) -> Any:
    """A setting's value with its ``~`` expanded; what is no path that starts with one is returned as it is.

    Raises:
        UsageError: ``~user`` of a user that there is not.
    """
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path == value and not os.path.lexists(path):
        user = value[1:].split("/")[0]
        raise UsageError(f"--{name} {value}: there is no user {user!r}; write ./{value} for a path of that name")
    return path
