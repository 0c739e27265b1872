"""Options of methods: those that all have in common, and types that say which values an option may have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from numbers import Real
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError
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
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value, kinds = getattr(settings, name), (hint, *get_args(hint))
        if get_origin(hint) is Literal and value not in kinds:
            raise ConfigError(f"{name}={value!r}: give one of {', '.join(kinds[1:])}")
        table = get_origin(hint) is Mapping
        if table and not isinstance(value, Mapping):
            raise ConfigError(f"{name}={value!r}: give a table, such as {{'q_proj': 4}}")
        values = {f"{name}: {key}": entry for key, entry in value.items()} if table else {name: value}
        for mark in (mark for kind in kinds for mark in getattr(kind, "__metadata__", ())):
            for where, entry in values.items():
                if not ((entry is None and NoneType in kinds) or mark.test(entry)):
                    raise ConfigError(f"{where}={entry!r}: give {mark.remedy}")
