"""Recipes: TOML files with the settings of a run; what they do not say has its default.

    # increlora train --config recipes/paper/increlora-rte-r2.toml
    task = "glue/rte"
    epochs = 50
    [options]
    top_h = 5

The config.toml of a run folder is a recipe, too.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, TaskError
from ...hosts.peft.old import DEFAULT_SWITCHES
from .options import checked
from .settings import FLAGS, TrainSettings, check_options


def read_recipe(path: Path) -> dict[str, Any]:
    """The table of a recipe: every key known, every value of its type and range.

    Raises: ConfigError, TaskError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a TOML file") from error
    try:
        recipe = checked(table, FLAGS, "increlora train")
        recipe["options"] = method_options(recipe)
        TrainSettings(**recipe)
    except (ConfigError, TaskError) as error:
        raise type(error)(f"{path}{line_of(str(error), text)}: {error}") from error
    return recipe


def method_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the recipe's method. Earlier versions wrote into every config.toml that nothing is as published;
    that is left out."""
    method, options, preset = (
        recipe.get("method", TrainSettings.method),
        recipe.get("options", {}),
        recipe.get("preset"),
    )
    usual = DEFAULT_SWITCHES.get(method, {}) if preset is None else {}
    said = {name: value for name, value in options.items() if name not in usual or value != usual[name]}
    return check_options(method, said, preset)


def line_of(message: str, text: str) -> str:
    """`, line 7`: that of the first key that the message names, as a key or a flag; nothing if it names none."""
    keys = [line.partition("=")[0].strip(' \t"') for line in text.splitlines()]
    named = [word.lstrip("-").replace("-", "_") for word in re.findall(r"[\w-]+", message)]
    number = next((keys.index(name) + 1 for name in named if name in keys), 0)
    return f", line {number}" if number else ""
