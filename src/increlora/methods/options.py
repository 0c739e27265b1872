"""Options of methods: those that all have in common, and types that say which values an option may have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import inf, isfinite
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from ..patterns import check_pattern, shown
from .base import Settings


@dataclass(frozen=True)
class Allowed:
    """A mark of a type: which of its values an option may have, and how to say so."""

    test: Callable[[Any], bool]
    remedy: str


Count = Annotated[int, Allowed(lambda value: type(value) is int and value >= 1, "an int of at least 1")]
Share = Annotated[float, Allowed(lambda value: isinstance(value, Real) and 0 <= value < 1, "a number in [0, 1)")]
Weight = Annotated[float, Allowed(lambda value: isinstance(value, Real) and 0 <= value < inf, "a finite weight ≥ 0")]


@dataclass(frozen=True)
class LoraOptions(Settings):
    """The options that all methods of the library have; those of each are checked by their types."""

    r: Count = 8
    lora_alpha: float = 8
    lora_dropout: Share = 0.0
    init_lora_weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


def check_options(settings: Any) -> None:
    """Raise ConfigError for an option, or an entry of one that is a table, with a value that its type does not have."""
    hints = get_type_hints(type(settings), include_extras=True)
    for name, hint in ((f.name, hints[f.name]) for f in fields(settings)):
        value, kinds = getattr(settings, name), (hint, *get_args(hint))
        if get_origin(hint) is Literal and value not in kinds:
            raise ConfigError(f"{name}={shown(value)}: give one of {', '.join(kinds[1:])}")
        table = get_origin(hint) is Mapping
        if table and not isinstance(value, Mapping):
            raise ConfigError(f"{name}={shown(value)}: give a table, such as {{'q_proj': 4}}")
        for key in value if table else ():
            check_pattern(name, str(key))
        values = {f"{name}: {key}": entry for key, entry in value.items()} if table else {name: value}
        for mark in (mark for kind in kinds for mark in getattr(kind, "__metadata__", ())):
            for where, entry in values.items():
                if not ((entry is None and NoneType in kinds) or mark.test(entry)):
                    raise ConfigError(f"{where}={shown(entry)}: give {mark.remedy}")
        if not fits(value, hint):
            raise ConfigError(f"{name}={shown(value)}: expected {in_words(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Has a value the type that an annotation says? Numbers are finite, whole ones below 2⁶³; no bool is a number."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is Annotated:
        return fits(value, inner[0])
    if kind in (Union, UnionType):
        return any(fits(value, choice) for choice in inner)
    if kind is Literal:
        return isinstance(value, tuple(map(type, inner)))  # which of them: said elsewhere
    if kind in (list, set):
        return isinstance(value, list | set | tuple) and all(fits(entry, inner[0]) for entry in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63
    if kind is float:
        whole = isinstance(value, Integral)
        return fits(value, int) if whole else isinstance(value, Real) and isfinite(value)
    return isinstance(value, kind)


def in_words(hint: Any) -> str:
    """A type as an error names it."""
    if get_origin(hint) is Annotated:
        return in_words(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(in_words, get_args(hint)))
    names = {float: "a finite number", int: "a whole number below 2⁶³", str: "a text", bool: "true or false",
             NoneType: "nothing"}  # fmt: skip
    return names.get(hint, getattr(hint, "__name__", str(hint)))
