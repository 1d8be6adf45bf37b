"""The command line and recipes -> settings."""

from __future__ import annotations

import difflib
import sys
from argparse import RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from config.recipes import load_recipe
from config.settings import GROUPS, Config
from config.usage import UsageError

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
    """As :func:`read_config`; wrong usage exits with code 2 and one line."""
    try:
        return read_config(argv)
    except UsageError as error:
        sys.exit(usage_error(str(error)))


def read_config(argv: list[str]) -> Config:
    """Command line -> settings: defaults, then ``--recipe``, then flags. Raises UsageError."""
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
    try:
        recipe = _value_of("--recipe", argv)
        settings = load_recipe(recipe) if recipe else {}
        _refuse_unknown(settings, f"recipe {recipe}")
        _refuse_unknown([flag for flag in _flags(argv) if flag not in ("recipe", "help")], "command line")
        try:
            known = parser.parse_object(settings)
        except ArgumentError as error:
            raise ValueError(f"recipe {recipe}: {_short(error)}") from None
        values = vars(parser.parse_args(argv, namespace=known))
        name = str(settings.get("model", ""))
        if (":" in name or "/" in name) and "model" not in _flags(argv):
            raise ValueError(
                f"recipe {recipe} asks for the model {name}, which is code from outside this project; if you trust it, "
                f"name it on the command line: --model {name}"
            )
    except (ArgumentError, ValueError, OSError) as error:
        raise UsageError(_short(error)) from None
    values.pop("recipe")
    return Config(**values)


def given(argv: list[str]) -> set[str]:
    """The settings that a command line states, in its recipe or by flags, be they the defaults or not."""
    recipe = _value_of("--recipe", argv)
    return {*(load_recipe(recipe) if recipe else {}), *_flags(argv)}


def usage_error(message: str) -> int:
    """Prints one line on standard error and returns the exit code of wrong usage."""
    print(f"error: {message}", file=sys.stderr)
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
    """The value of a flag, None if it is not given. Raises ValueError if it is given twice."""
    places = [place for place, arg in enumerate(argv) if arg == flag or arg.startswith(flag + "=")]
    if len(places) > 1:
        raise ValueError(f"{flag} is given twice: name one file, which may extend others (extends: [a.yaml, b.yaml])")
    for place in places:
        _, equals, value = argv[place].partition("=")
        if equals or place + 1 < len(argv):
            return value if equals else argv[place + 1]
    return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).replace('Parser key "', 'setting "')
