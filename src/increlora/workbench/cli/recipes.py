"""Recipes: TOML files with the settings of a run; what they do not say has its default.

    # increlora train --config recipes/paper/increlora_rte_r2.toml
    task = "glue/rte"
    epochs = 50
    [options]
    top_h = 5

The config.toml of a run folder is a recipe, too.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from ...errors import ConfigError, RunFolderError, TaskError
from ...naming import nearest
from .options import checked, config_class, typed
from .settings import TrainSettings, flag


def read_recipe(path: Path) -> dict[str, Any]:
    """The table of a recipe: every key known, every value of its type and range.

    Raises: ConfigError, TaskError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    try:
        recipe = checked_table(table)
        TrainSettings(**recipe)
    except (ConfigError, TaskError) as error:
        raise type(error)(f"{path}{line_of(str(error), table, text)}: {error}") from error
    return recipe


def checked_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with every value checked. Raises ConfigError at the first wrong key or value."""
    hints = get_type_hints(TrainSettings)
    known = [option.name for option in fields(TrainSettings)]
    for key in table:
        if key not in known:
            raise ConfigError(f"{key}: no such setting; did you mean {nearest(key, known)!r}?")
    chosen = {key: typed(key, value, hints[key]) for key, value in table.items() if key != "options"}
    method = chosen.get("method", TrainSettings.method)
    config_class(method)
    options = typed("options", table.get("options", {}), dict)
    return chosen | {"options": {key: checked(method, key, value) for key, value in options.items()}}


def line_of(message: str, table: Mapping[str, Any], text: str) -> str:
    """`, line 7` of the first key that the message speaks of; nothing if it speaks of none."""
    options = table.get("options", {})
    found = []
    for key in [*table, *(options if isinstance(options, Mapping) else ())]:
        spoken = re.search(rf"(?<![\w-])({re.escape(key)}|{re.escape(flag(key))})(?![\w-])", message)
        written = re.search(rf"^[ \t]*\"?{re.escape(key)}\"?[ \t]*=", text, re.MULTILINE)
        if spoken and written:
            found.append((spoken.start(), text.count("\n", 0, written.start()) + 1))
    return f", line {min(found)[1]}" if found else ""


def from_toml(table: Mapping[str, Any], path: Path) -> TrainSettings:
    """Settings of the run in folder `path`, from its config.toml. Raises RunFolderError if they do not fit."""
    try:
        return TrainSettings(**checked_table(table))
    except ConfigError as error:
        raise RunFolderError(f"{path}/config.toml: {error}; it was changed, or written by another version") from error
