"""Options of a method: read from `key=value` pairs or a table, checked against their declared types."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...errors import ConfigError
from ...hosts.peft.config import CONFIGS, OURS, type_name
from ...hosts.peft.options import default_of
from ...naming import nearest
from ...registry import METHODS

OWN_FLAG = {"r": "--r", "seed": "--seed", "target_modules": "--target-modules"}
SET_HERE = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode", *OURS
}  # fmt: skip


def config_class(method: str) -> Any:
    """The peft config class of a method. Raises ConfigError for an unknown name, with the nearest known one."""
    if method not in METHODS:
        raise ConfigError(f"--method {method}: not known; did you mean {nearest(method, METHODS)!r}?")
    return CONFIGS[type_name(method)]


def option_names(method: str) -> list[str]:
    """Options of a method that have no flag of their own."""
    return [option.name for option in fields(config_class(method).settings_cls) if option.name not in OWN_FLAG]


def default_options(method: str) -> dict[str, Any]:
    """These options with their defaults."""
    settings = fields(config_class(method).settings_cls)
    return {option.name: default_of(option) for option in settings if option.name in option_names(method)}


def parse_options(method: str, pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` pairs, values as in TOML (bare words are strings, `none` is None where that means something)."""
    config_class(method)
    return dict(parse_option(method, pair) for pair in pairs)


def parse_option(method: str, pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"--set {pair}: write it as key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    try:
        return key, checked(method, key, value)
    except ConfigError as error:
        raise ConfigError(f"--set {error}") from None


def checked(method: str, key: str, value: Any) -> Any:
    """The value, None for "none". Raises ConfigError if there is no such option, or the value is not of its type."""
    if key in OWN_FLAG:
        raise ConfigError(f"{key}={value}: use {OWN_FLAG[key]}")
    known = [option.name for option in fields(config_class(method)) if option.name not in SET_HERE]
    if key not in known:
        raise ConfigError(f"{key}: {method} has no such option; did you mean {nearest(key, known)!r}?")
    return typed(key, value, get_type_hints(config_class(method).settings_cls).get(key, Any))


def typed(key: str, value: Any, hint: Any) -> Any:
    """The value, None for "none". Raises ConfigError if it is not of this type."""
    if fits(value, hint):
        return value
    if value == "none" and fits(None, hint):
        return None
    shown = json.dumps(value) if isinstance(value, bool) else value
    raise ConfigError(f"{key}={shown}: give {described(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Is the value of this type? An int is a float, a bool is no int."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,), NoneType: (NoneType,)}
    if hint in kinds:
        return isinstance(value, kinds[hint]) and isinstance(value, bool) == (hint is bool)
    return hint is Any or isinstance(value, get_origin(hint) or hint)


def described(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(described(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(member) for member in get_args(hint))
    if get_origin(hint) is list:
        return "a list of words"
    words = {int: "an int", float: "a number", bool: "true or false", str: "a word", NoneType: "none"}
    return words.get(hint, "a table such as {query = 4}")


def toml_value(value: Any) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    return "none" if value is None else json.dumps(value)
