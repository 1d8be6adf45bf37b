"""What happens when an image cannot be used: named, recorded, replaced within a budget; in evaluation, an error."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from inputs.decode import BadImage

Result = TypeVar("Result")
FILE_NAME = "bad_files.txt"
FLOOR = 10  # bad files that are always allowed, unless none are: of 1,500 images a thousandth is one
# Substitutes tried for one sample. At a share of bad files as large as one in ten, all fail once in 10^10.
ATTEMPTS = 10


def load(source, index: int, transform: Callable[..., Result]) -> Result:
    """Returns ``transform(source.read(index))``.

    Raises:
        BadImage: the image cannot be read or decoded; names the file.
    """
    try:
        return transform(source.read(index))
    except (BadImage, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadImage(f"{source.name(index)}: {reason}") from error


def budget(max_fraction: float, num_images: int) -> int:
    """How many of so many images may be bad: the share, but at least `FLOOR`; none if the share is 0."""
    return max(FLOOR, int(max_fraction * num_images)) if max_fraction > 0 else 0


class BadFiles:
    """Replaces training images that cannot be used, up to a share of the data set, and writes down which they were.

    The substitute follows from the sample's seed, so that a run can be repeated. The record has one line per file. It
    is shared by all loader workers and processes that write to the same output folder, and by later runs there: a file
    counts once. Without an output folder each worker counts for itself.

    Args:
        max_fraction: of the training set (``--max_bad``).
        folder: where ``bad_files.txt`` is written; None: nowhere.
    """

    def __init__(self, max_fraction: float = 0.001, folder: str | Path | None = None):
        self.max_fraction = max_fraction
        self.path = Path(folder) / FILE_NAME if folder else None
        self.names: set[str] = set()

    def load(self, source, index: int, seed: int, transform: Callable[..., Result]) -> tuple[Result, int]:
        """Returns (``transform`` of image ``index``, its label), or of a substitute drawn with ``seed``.

        Raises:
            BadImage: more files are bad than the budget allows; names the last one, the number and the record.
        """
        rng = None
        for _ in range(1 + ATTEMPTS):
            try:
                return load(source, index, transform), source.label(index)
            except BadImage as error:
                self.record(str(error), source.name(index), len(source))
                rng = rng or random.Random(f"substitute {seed}")
                index = rng.randrange(len(source))
        raise BadImage(f"{ATTEMPTS} substitutes in a row could not be used either; the last: {source.name(index)}")

    def record(self, message: str, name: str, num_images: int) -> None:
        """Counts a bad file, once per name. Raises BadImage when that exceeds the budget."""
        if name in self.names:
            return
        self.names.add(name)
        known = self._share(name, message)
        allowed = budget(self.max_fraction, num_images)
        if known > allowed:
            where = f"; they are listed in {self.path}" if self.path else ""
            raise BadImage(
                f"{known} of {num_images} training images cannot be used, --max_bad {self.max_fraction:g} allows "
                f"{allowed} (the last: {message}){where}: the same command with --max_bad "
                f"{max(2 * known / num_images, 0.01):.2g} resumes; to mend files, write good ones under the same names "
                "(without them it is another data set, and another run)"
            )
        print(f"warning: replaced an image that cannot be used ({known} of {allowed}): {message}", file=sys.stderr)

    def _share(self, name: str, message: str) -> int:
        """Adds the file to the record unless it is there; returns how many it names."""
        if not self.path:
            return len(self.names)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = message.replace("\n", " ") + "\n"
        recorded = self.recorded()
        if not any(other.startswith(name + ": ") for other in recorded):
            # One write to a file opened for appending: lines of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode("utf-8", "surrogateescape"))
            finally:
                os.close(descriptor)
            recorded = self.recorded()
        return len(recorded)

    def recorded(self) -> set[str]:
        """The lines of the record: a file and its fault each."""
        try:
            return set(self.path.read_text("utf-8", "surrogateescape").splitlines())
        except FileNotFoundError:
            return set()
