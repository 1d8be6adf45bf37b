"""The command line and recipes -> settings."""

from __future__ import annotations

import difflib
import re
import sys
import types
from argparse import Action, RawDescriptionHelpFormatter
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, get_loader, set_loader

from config.paths import PATHS, expand
from config.recipes import load_recipe
from config.settings import GROUPS, Config
from config.urls import redact
from config.usage import UsageError

DESCRIPTION = """\
Trains vision backbones with the EfficientTrain curricula: early training sees low-frequency, weakly augmented images.

  python main.py --recipe recipes/demo.yaml --plan table          what a run would do, before it costs anything
  python main.py --recipe recipes/demo.yaml --data_path DIR --output_dir OUT            train, or resume training
  torchrun --nproc_per_node 8 main.py --recipe ...                 the same on eight devices
  python main.py --recipe ... --eval true --resume OUT/checkpoint-best.pth              evaluate
  python main.py --predict IMAGES --resume OUT/checkpoint-best.pth                      label images
  python main.py --suggest true --data_path DIR                    a first recipe for your own images

N is a whole number, X any number; lists are written 4,2,1 or [4,2,1], mappings {NAME: VALUE}. A DURATION is 3.7 (epochs
of the plan's clock), "20 passes" over the data, 20% of the run, or "500 steps". A recipe's keys are the names below.
"""
# The settings with which nearly every run begins; --help shows them first.
FIRST = ("data_path", "output_dir", "model", "curriculum", "epochs", "batch_size", "micro_batch", "lr", "plan")
# Values whose type says too little; all other floats or strings are durations.
WRITTEN = {"val_share": "X%", "wandb": "PROJECT", "stop_if": "'NAME < X after DURATION'"}


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The description's line breaks are kept, and defaults are written as one writes them in a flag."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        unsaid = not isinstance(action.default, bool | int | float | str | tuple)
        return text if unsaid or action.dest == "help" else f"{text} (default: {_flag_value(action.default)})"

    def _format_action_invocation(self, action: Action) -> str:
        names = action.option_strings if action.dest == "help" else action.option_strings[:1]  # not --rows+ as well
        return ", ".join(names) + (f" {action.metavar}" if action.metavar else "")


class _Recipe(Action):
    """One recipe: which of two was to override the other could only be guessed."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, "recipe", None) is not None:
            raise ArgumentError(None, f"--recipe is given twice; let one recipe extend the other (extends: {values})")
        namespace.recipe = values


def parse_config(argv: list[str]) -> Config:
    """As :func:`parse_stated`, the settings alone; wrong usage exits with code 2 and one line."""
    try:
        return parse_stated(argv)[0]
    except UsageError as error:
        sys.exit(usage_error(str(error)))


def parse_stated(argv: list[str]) -> tuple[Config, set[str]]:
    """Command line -> settings: defaults, then ``--recipe``, then flags; and the names of those that the command line
    states, in its recipe or by flags, be they the defaults or not. Raises UsageError."""
    parser = _parser()
    try:
        flags = vars(_parse(parser, argv))
        recipe = expand("recipe", flags.pop("recipe", None))
        content = load_recipe(recipe) if recipe else {}
        if unknown := [key for key in content if key not in Config.__dataclass_fields__]:
            raise ValueError(f"recipe {recipe}: " + _unknown(unknown[0], []))
        try:
            known = parser.parse_object(content)
        except ArgumentError as error:
            raise ValueError(f"recipe {recipe}: {_short(error)}") from None
        values = vars(parser.parse_args(argv, namespace=known))
        name = str(content.get("model", ""))
        if (":" in name or "/" in name) and "model" not in flags:
            raise ValueError(
                f"recipe {recipe} asks for the model {name}, which is code from outside this project; if you trust it, "
                f"name it on the command line: --model {name}"
            )
    except (ArgumentError, ValueError, OSError) as error:
        raise UsageError(_short(error)) from None
    values.pop("recipe")
    values.update({name: expand(name, values[name]) for name in PATHS})
    return Config(**values), {*content, *flags}


def rescaled(argv: list[str]) -> list[str]:
    """A warning if the command line changes the batch and leaves the learning rate, which belong together."""
    parser = _parser()
    flags = vars(_parse(parser, argv))
    if "batch_size" not in flags or "lr" in flags:
        return []
    recipe = expand("recipe", flags.get("recipe"))
    known = {**vars(Config()), **(vars(parser.parse_object(load_recipe(recipe))) if recipe else {})}
    batch, before, lr = flags["batch_size"], known["batch_size"], known["lr"]
    if batch == before:
        return []
    whose = "the recipe's" if recipe else "the default's"
    return [
        f"warning: --lr {lr:g} is {whose} for batches of {before}, and --batch_size is {batch}: "
        f"{lr * batch / before:.2g} (linear) or "
        f"{lr * (batch / before) ** 0.5:.2g} (square root, usual for Adam and LAMB) would go with it"
    ]


def flags_of(argv: list[str]) -> set[str]:
    """The names of the flags that a command line gives, its recipe aside. Exits as :func:`parse_config` does."""
    try:
        return {*vars(_parse(_parser(), argv))}
    except (ArgumentError, ValueError) as error:
        sys.exit(usage_error(_short(error)))


def usage_error(message: str) -> int:
    """Prints one line on standard error and returns the exit code of wrong usage."""
    print(f"error: {redact(message)}", file=sys.stderr)
    return 2


def _parse(parser: ArgumentParser, argv: list[str]) -> Any:
    """The flags that are given, without defaults. Raises ValueError for one that does not exist."""
    try:
        return parser.parse_args(argv, defaults=False)
    except ArgumentError as error:
        if match := re.match(r"(?i)unrecognized arguments: (-*)([^\s=]*)", str(error)):
            if match[1]:
                raise ValueError("command line: " + _unknown(match[2], ["recipe"])) from None
            raise ValueError(f"command line: {match[2]!r} belongs to no setting; write --setting value") from None
        raise


def _unknown(name: Any, others: list[str]) -> str:
    near = difflib.get_close_matches(str(name), [*Config.__dataclass_fields__, *others], 3, 0.5)
    return f"unknown setting {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "; --help lists all")


def _short(error: Exception) -> str:
    """On one line; for a value of the wrong type, what is to be written instead of the parser's types."""
    text = " ".join(str(error).split())
    if match := re.match(r'Parser key "(\w+)(?:\.\w+)*":', text):
        value = re.search(r"Given value: (.*)$|Got value: (.*)$", text)
        got, name = f" is {value[1] or value[2]}" if value else "", match[1]
        return f"--{name}{got}; write --{name} {WRITTEN.get(name) or written(get_type_hints(Config)[name])}"
    return text


@cache
def _parser() -> ArgumentParser:
    set_loader("flags", _load, (yaml.YAMLError, ValueError))
    parser = ArgumentParser(
        prog="main.py",
        usage="main.py [--recipe FILE] [--setting value ...]",
        description=DESCRIPTION,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        parser_mode="flags",
    )
    first = parser.add_argument_group("the settings to begin with")
    first.add_argument("--recipe", action=_Recipe, metavar="FILE", help="YAML file of settings; flags override it.")
    types, fields = get_type_hints(Config), Config.__dataclass_fields__
    lines = {line.arg_name: line.description for group in GROUPS for line in parse_from_object(group).params}
    titled = [(parser.add_argument_group(group.__doc__), group) for group in GROUPS]
    groups = {name: title for title, group in titled for name in group.__annotations__}
    for name in dict.fromkeys((*FIRST, *groups)):
        group = first if name in FIRST else groups[name]
        kind = types[name]
        text = " ".join(lines[name].split())
        value = WRITTEN.get(name) or written(kind)
        group.add_argument(f"--{name}", type=kind, default=fields[name].default, metavar=value, help=text)
    return parser


def _load(text: str) -> Any:
    """A flag's value: YAML, where 4,2,1 is a list without its brackets."""
    is_list = re.fullmatch(r"[^\s,:{}\[\]]+(,[^\s,:{}\[\]]+)+", text)
    return get_loader("yaml")(f"[{text}]" if is_list else text)


def _flag_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_flag_value, value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def written(kind: Any) -> str:
    """How a value of a type is written in a flag: ``float`` is X, ``tuple[float, float]`` X,X, a choice its values.

    >>> written(tuple[float, float] | None), written(float | str), written(Literal["none", "bf16"])
    ('X,X', 'DURATION', 'none|bf16')
    """
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        some = [one for one in of if one is not type(None)]
        return "DURATION" if some == [float, str] else "|".join(written(one) for one in some)
    if origin is Literal:
        return "|".join(of)
    if origin is tuple:
        return ",".join(written(one) for one in of)
    if origin is list:
        return f"{written(of[0])},{written(of[0])},..."
    if origin is dict:
        key, value = ("NAME" if of[0] is str else "N"), ("N" if of[1] is int else "VALUE")
        return f"{{{key}: {value}}}"
    return {bool: "true|false", int: "N", float: "X", str: "TEXT"}[kind]
