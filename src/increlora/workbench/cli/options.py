"""Options are declared once, as fields of a dataclass; flags, help, TOML keys and type checks are made from these."""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import field, fields
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from ...errors import ConfigError
from ...naming import nearest

WORDS = {
    int: "an int", float: "a number", bool: "true or false", str: "a word", list: "a list of words",
    Mapping: "a table such as {query = 4}", NoneType: "none",
}  # fmt: skip
Valid = tuple[Callable[[Any], bool], str]  # a test of every value but None, and what to give when it fails


def option(default: Any, text: str, *, unset: str = "none", valid: Valid | None = None) -> Any:
    """A dataclass field that is also a flag and a TOML key.

    Args: text: what `--help` says about it.   unset: what a default of None stands for."""
    return field(default=default, metadata={"text": text, "unset": unset, "valid": valid})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags(settings_cls: Any) -> Iterator[Parameter]:
    """The declared options as parameters of a typer command: each is the text that was given, or None."""
    hints = get_type_hints(settings_cls)
    for declared in fields(settings_cls):
        if "text" in declared.metadata:
            kinds = [kind for kind in members(hints[declared.name]) if kind is not NoneType]
            shown = typer.Option(
                None,
                help=declared.metadata["text"],
                metavar="<" + "|".join(getattr(kind, "__name__", str(kind)) for kind in kinds) + ">",
                show_default=declared.metadata["unset"] if declared.default is None else str(declared.default),
            )
            yield Parameter(declared.name, Parameter.KEYWORD_ONLY, default=shown, annotation=str | None)


def from_flags(settings_cls: Any, texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Values of the flags that were given. Raises ConfigError for one that is not of its type."""
    hints, given = get_type_hints(settings_cls), {name: text for name, text in texts.items() if text is not None}
    return {name: typed(flag(name), from_text(text, hints[name]), hints[name]) for name, text in given.items()}


def from_text(text: str, hint: Any) -> Any:
    """A value from the command line: TOML or a number as Python writes it, if that has the type; else a bare word."""
    readers: tuple[Callable[[str], Any], ...] = (lambda text: tomllib.loads(f"value = {text}")["value"], int, float)
    for read in readers:
        with suppress(ValueError):
            if fits(value := read(text), hint):
                return value
    return text.strip()


def to_text(value: Any) -> str:
    """A value as the command line reads it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {json.dumps(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def checked(table: Mapping[str, Any], hints: Mapping[str, Any], owner: str, given: str = "") -> dict[str, Any]:
    """The table with its values as `typed`. Raises ConfigError for an option that `owner` does not have."""
    for key in table:
        if key not in hints:
            raise ConfigError(f"{given}{key}: {owner} has no such option; did you mean {nearest(key, hints)!r}?")
    return {key: typed(given + key, value, hints[key]) for key, value in table.items()}


def typed(key: str, value: Any, hint: Any) -> Any:
    """The value; None for "none" where the type allows it. Raises ConfigError if the value is not of this type."""
    if value == "none" and fits(None, hint):
        return None
    if not fits(value, hint):
        raise ConfigError(f"{key}={to_text(value)}: give {described(hint)}")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Is the value, as TOML or a flag says it, of this type? An int is a float, too."""
    own, kinds = type(value), [get_origin(kind) or kind for kind in members(hint)]
    allowed = (Any, own, {int: float, dict: Mapping}.get(own, own))
    return any(kind in allowed or (type(kind), kind) == (own, value) for kind in kinds)  # in a Literal: a value


def described(hint: Any) -> str:
    return " or ".join(WORDS.get(get_origin(member) or member, repr(member)) for member in members(hint))


def members(hint: Any) -> list[Any]:
    """The types, and the values of a Literal, that a type allows."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return [member for part in get_args(hint) for member in members(part)]
    return [hint]
