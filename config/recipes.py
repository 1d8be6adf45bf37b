"""Recipes: YAML files of settings, which may extend each other."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from config.files import read_text
from config.paths import expand
from config.settings import Config

SIZE = 1 << 17  # bytes of a file: long numbers take time by the square of their length
DEPTH, FILES = 32, 64  # levels of nesting, and files that one recipe may build on


def load_recipe(path: str) -> dict[str, Any]:
    """Reads a recipe, after what it ``extends``: a file or a list of files, as paths from its own folder.

    Keys of a later file replace those of an earlier one, and the recipe's own replace them all. Each file is read once.

    Raises:
        ValueError: not readable, not a mapping, extending itself or more than 64 files; names the file.
    """
    return _resolve(path, {}, ())


def _resolve(path: str, known: dict[str, dict[str, Any]], children: tuple[str, ...]) -> dict[str, Any]:
    """``known``: what was read before, by real path; ``children``: the chain of files that led here."""
    real = os.path.realpath(path)
    if real in children:
        raise ValueError(f"recipe {path} extends itself")
    if real not in known:
        if len(known) + len(children) >= FILES:
            raise ValueError(f"recipe {path}: a recipe may build on {FILES} files at most; join some of them")
        content = read_yaml(path)
        parents = content.pop("extends", [])
        settings: dict[str, Any] = {}
        for parent in parents if isinstance(parents, list) else [parents]:
            settings.update(_resolve(str(Path(path).parent / expand("extends", str(parent))), known, (*children, real)))
        known[real] = {**settings, **content}
    return dict(known[real])


def read_yaml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """A YAML file's mapping, with bounded work whatever it holds.

    Raises:
        ValueError: not readable, larger than 128 KB, deeper than 32 levels, referring to itself, or no mapping.
    """
    where = f"{what} {path}"
    try:
        text = read_text(path, SIZE)
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # which can grow without bounds
                raise ValueError(f"{where} refers to a part of itself (*name); write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise ValueError(f"{where} is not YAML of settings: it is nested deeper than {DEPTH} levels")
        content = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except (OverflowError, TypeError, RecursionError) as error:  # what the loader makes of odd keys and numbers
        raise ValueError(f"{where} is not YAML: {error}") from None
    except ValueError as error:  # a bad date's
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where} is not YAML: {message}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of settings to values")
    return content


def load_curriculum(value: str | dict[str, Any]) -> str | dict[str, Any]:
    """A curriculum's name or mapping as it is; the path of a YAML file becomes the file's mapping."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return load_recipe(value)
    return value


def to_yaml(config: Config) -> str:
    """The resolved configuration, readable as a recipe again."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return yaml.safe_dump(settings, sort_keys=False)


def plain(value: Any) -> Any:
    """A dataclass or nested value as JSON's types, as files keep it: tuples become lists, keys strings."""
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) else value))
