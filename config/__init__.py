"""Settings: every one declared once (settings.py), read from recipes (recipes.py) and the command line
(command_line.py), and checked for its range (checks.py). What cannot work is a UsageError (usage.py)."""

from config.recipes import load_curriculum, load_recipe, plain, to_yaml
from config.settings import GROUPS, Config
from config.usage import UsageError, as_usage

__all__ = [
    "GROUPS",
    "Config",
    "UsageError",
    "as_usage",
    "load_curriculum",
    "load_recipe",
    "plain",
    "to_yaml",
]
