"""The kinds of settings: what it means for a run if one differs from those of the checkpoint that it resumes from.

A kind stands in the type of each setting (config/settings.py), as in ``lr: Learned[float] = 4e-3``.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, TypeVar, get_type_hints

T = TypeVar("T")
Free = Annotated[T, "free"]  # where and how a run is carried out: may differ, and is noted
Learned = Annotated[T, "learned"]  # changes the result: refused, unless --allow_change names it
Planned = Annotated[T, "curriculum"]  # the same; the plans that settings lead to are compared, part "curriculum"
Stateful = Annotated[T, "optimizer"]  # the same; what the optimizer's saved state rests on, part "optimizer"
Shape = Annotated[T, "model"]  # the shape of the weights, or what they are for: cannot differ, part "model"


@cache
def kinds(config: type) -> dict[str, str | None]:
    """Name of a setting -> its kind, None for one that states none."""
    hints = get_type_hints(config, include_extras=True)
    return {name: getattr(hint, "__metadata__", (None,))[0] for name, hint in hints.items()}


def named(config: type, *wanted: str) -> list[str]:
    """The settings of these kinds."""
    return [name for name, kind in kinds(config).items() if kind in wanted]
