"""Recipes: YAML files of settings, which may extend each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from config.settings import Config


def load_recipe(path: str, children: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads a recipe, after what it ``extends``: a file or a list of files, as paths from its own folder.

    Keys of a later file replace those of an earlier one, and the recipe's own replace them all.

    Raises:
        ValueError: not readable, not a mapping, or extending itself; names the file.
    """
    try:
        text = Path(path).read_text()
        refers = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
        content = None if refers else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"recipe {path} is not a text file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the loader lets a bad date's ValueError through
        raise ValueError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if refers:  # which can grow without bounds
        raise ValueError(f"recipe {path} refers to a part of itself (*name); write the values out")
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} must be a mapping of settings to values")
    parents = content.pop("extends", [])
    if path in children:
        raise ValueError(f"recipe {path} extends itself")
    settings: dict[str, Any] = {}
    for parent in parents if isinstance(parents, list) else [parents]:
        settings.update(load_recipe(str(Path(path).parent / str(parent)), (*children, path)))
    return {**settings, **content}


def load_curriculum(value: str | dict[str, Any]) -> str | dict[str, Any]:
    """A curriculum's name or mapping as it is; the path of a YAML file becomes the file's mapping."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return load_recipe(value)
    return value


def to_yaml(config: Config) -> str:
    """The resolved configuration, readable as a recipe again."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    return yaml.safe_dump(plain, sort_keys=False)
