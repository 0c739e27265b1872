"""Checks that the settings of several methods share; each names the option, its value and the remedy."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from ..errors import ConfigError


def check_counts(settings: Any, names: Iterable[str]) -> None:
    """Raise ConfigError unless each is None or an int of at least 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: give an int of at least 1")


def check_patterns(settings: Any, names: Iterable[str]) -> None:
    """Raise ConfigError unless every value in each of these tables is an int of at least 1."""
    for option in names:
        for name, count in getattr(settings, option).items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(f"{option}: {name}={count!r}: give an int of at least 1")


def check_shares(settings: Any, names: Iterable[str]) -> None:
    """Raise ConfigError unless each is a number in [0, 1)."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)!r}: give a number in [0, 1)")


def check_choices(settings: Any) -> None:
    """Raise ConfigError unless every option with a fixed set of values has one of them."""
    for option in fields(settings):
        value, choices = getattr(settings, option.name), get_args(option.type)
        if get_origin(option.type) is Literal and value not in choices:
            raise ConfigError(f"{option.name}={value!r}: give one of {', '.join(choices)}")


def check_weight(settings: Any, name: str) -> None:
    """Raise ConfigError for a weight that is no finite number of at least 0."""
    if not 0 <= getattr(settings, name) < float("inf"):
        raise ConfigError(f"{name}={getattr(settings, name)!r}: give a finite weight ≥ 0")
