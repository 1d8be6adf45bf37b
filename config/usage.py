"""Wrong usage: the one exception type for settings that cannot work; main.py answers it with exit code 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Where an argument of curriculum/ has another name than the setting it comes from.
FLAGS = {"base_size": "input_size", "warmup": "warmup_epochs", "images_per_s": "speeds", "even_groups": "mixup"}


class UsageError(ValueError):
    """Settings that cannot work, found before anything was written. The message names the setting and the mend."""


@contextmanager
def as_usage() -> Iterator[None]:
    """Where settings meet a library: its ValueError becomes a UsageError, and its `argument` the flag of that name."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        flag = re.sub(r"`(\w+)`", lambda match: f"--{FLAGS.get(match[1], match[1])}", str(error))
        raise UsageError(flag) from None
