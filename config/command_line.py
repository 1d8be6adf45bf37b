"""The command line and recipes -> settings."""

from __future__ import annotations

import difflib
import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from config.recipes import load_recipe
from config.settings import GROUPS, Config
from config.urls import redact

DESCRIPTION = """\
Trains vision backbones with the EfficientTrain curricula: early training sees low-frequency, weakly augmented images.

  python main.py --recipe recipes/demo.yaml --plan table          what a run would do, before it costs anything
  python main.py --recipe recipes/demo.yaml --data_path DIR --output_dir OUT            train (or go on training)
  torchrun --nproc_per_node 8 main.py --recipe ...                 the same on eight devices
  python main.py --recipe ... --eval true --resume OUT/checkpoint-best.pth              evaluate
  python main.py --predict IMAGES --resume OUT/checkpoint-best.pth                      label images
  python main.py --suggest true --data_path DIR                    a first recipe for your own images
"""


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's help, with the description's line breaks kept."""


def parse_config(argv: list[str]) -> Config:
    """Command line -> settings: defaults, then ``--recipe``, then flags. Wrong usage exits with code 2 and one line."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="main.py",
        usage="main.py [--recipe FILE] [--setting value ...]",
        description=DESCRIPTION,
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_argument("--recipe", type=str | None, help="YAML file of settings; flags override it")
    for group in GROUPS:
        parser.add_class_arguments(group, as_group=True)
    recipe = _value_of("--recipe", argv)
    try:
        settings = load_recipe(recipe) if recipe else {}
        _refuse_unknown(settings, f"recipe {recipe}")
        _refuse_unknown([flag for flag in _flags(argv) if flag not in ("recipe", "help")], "command line")
        try:
            known = parser.parse_object(settings)
        except ArgumentError as error:
            raise ValueError(f"recipe {recipe}: {_short(error)}") from None
        values = vars(parser.parse_args(argv, namespace=known))
    except (ArgumentError, ValueError, OSError) as error:
        sys.exit(usage_error(_short(error)))
    values.pop("recipe")
    return Config(**values)


def given(argv: list[str]) -> set[str]:
    """The settings that a command line states, in its recipe or by flags, be they the defaults or not."""
    recipe = _value_of("--recipe", argv)
    return {*(load_recipe(recipe) if recipe else {}), *_flags(argv)}


def usage_error(message: str) -> int:
    """Prints one line on standard error and returns the exit code of wrong usage."""
    print(f"error: {redact(message)}", file=sys.stderr)
    return 2


def _refuse_unknown(settings: dict[str, Any] | list[str], where: str) -> None:
    names = Config.__dataclass_fields__
    for key in settings:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 3, 0.5)
            raise ValueError(
                f"{where}: unknown setting {key!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "; --help lists all")
            )


def _flags(argv: list[str]) -> list[str]:
    return [arg[2:].split("=")[0] for arg in argv if arg.startswith("--")]


def _value_of(flag: str, argv: list[str]) -> str | None:
    for place, arg in enumerate(argv):
        if arg == flag and place + 1 < len(argv):
            return argv[place + 1]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
    return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).replace('Parser key "', 'setting "')
