"""Durations as users write them: epochs of the plan's clock, passes over the data, shares of the run, steps."""

from __future__ import annotations

import re


def parse_duration(text: str | float) -> tuple[float, str]:
    """``3.7`` (epochs of the plan's clock), ``20 passes``, ``20%`` or ``500 steps`` -> (value, unit).

    Raises:
        ValueError: not one of these forms.

    >>> parse_duration("20 passes"), parse_duration(3.7)
    ((20.0, 'passes'), (3.7, 'epochs'))
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(epochs?|pass|passes|%|steps?)?\s*", str(text))
    try:
        value = float(match[1])
    except (TypeError, ValueError):
        raise ValueError(
            f"duration {text!r} is not understood; write 3.7 (epochs), 20 passes, 20% or 500 steps"
        ) from None
    unit = {"": "epochs", "epoch": "epochs", "pass": "passes", "step": "steps"}.get(match[2] or "", match[2])
    return value, unit
