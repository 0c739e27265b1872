"""Regular expressions that come from configs: those that could take for ever on a module name are refused.

A backtracking matcher is slow where the same characters can be divided between repeats in many ways: a repeat within a
repeat, alternatives within a repeat, repeats in a row without a letter between them. Names need none of these.
"""

import re
from collections.abc import Iterable, Sequence
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from .errors import ConfigError

LONG = 16  # a repeat of so many counts as one without an end
MOST_REPEATS = 8
MOST_IN_A_ROW = 3
MOST_CHARACTERS = 200_000
REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


class Slow(Exception):
    """Why a pattern may be slow."""


def check_pattern(option: str, pattern: str) -> None:
    """Raise ConfigError, naming the option, unless this is a regular expression that is quick on every name."""
    try:
        if len(pattern) > MOST_CHARACTERS:
            raise Slow(f"it has {len(pattern)} characters")
        Walk().sequence(parser.parse(pattern), within=False)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{option}={shown(pattern)}: no regular expression ({error}): correct it") from None
    except Slow as why:
        raise ConfigError(
            f"{option}={shown(pattern)}: matching it may take for ever ({why}): write it simpler, or list the names"
        ) from None


def shown(value: object) -> str:
    """A value in an error message, at most a line of it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:90]}…{text[-9:]}"


class Walk:
    """One pass over a parsed pattern.   repeats: without an end, so far.   row: of them since the last letter."""

    def __init__(self) -> None:
        self.repeats = self.row = 0

    def sequence(self, items: Sequence[tuple[Any, Any]], *, within: bool) -> None:
        for (kind, value), after in zip(items, [*items[1:], None], strict=True):
            if kind in REPEATS:
                self.repeat(*value, within=within and not ended(value[2], after))
            elif kind is op.LITERAL:
                self.row = 0
            elif kind is op.BRANCH:
                self.branch(value[1], within=within)
            elif kind is op.GROUPREF:
                raise Slow("it refers back to a group")
            else:
                for part in parts(value):
                    self.sequence(part, within=within)

    def repeat(self, least: int, most: Any, items: Sequence[tuple[Any, Any]], *, within: bool) -> None:
        row, open_ended = self.row, least != most
        if open_ended and within:
            raise Slow("a repeat within a repeat")
        self.sequence(items, within=within or most >= LONG)
        if least == 0:  # it may match nothing, and separate nothing
            self.row = max(self.row, row)
        if open_ended and wild(items) and not digits(items):
            self.repeats, self.row = self.repeats + 1, max(self.row, row + 1)
        if self.repeats > MOST_REPEATS:
            raise Slow(f"more than {MOST_REPEATS} repeats")
        if self.row > MOST_IN_A_ROW:
            raise Slow(f"more than {MOST_IN_A_ROW} repeats in a row")

    def branch(self, choices: Iterable[Sequence[tuple[Any, Any]]], *, within: bool) -> None:
        if within:
            raise Slow("alternatives within a repeat")
        start, ends = (self.repeats, self.row), []
        for choice in choices:
            self.repeats, self.row = start
            self.sequence(choice, within=within)
            ends.append((self.repeats, self.row))
        self.repeats, self.row = (max(found) for found in zip(*ends, strict=True))


def ended(items: Any, after: tuple[Any, Any] | None) -> bool:
    """Does a letter follow that the repeated character cannot be? Then there is but one way to divide."""
    if after is None or after[0] is not op.LITERAL or len(items) != 1 or items[0][0] not in (op.IN, op.NOT_LITERAL):
        return False
    return compiler.compile(items).fullmatch(chr(after[1])) is None


def parts(value: Any) -> list[Any]:
    """The patterns inside a group or a look-around."""
    if isinstance(value, parser.SubPattern):
        return [value]
    return [part for part in value if isinstance(part, parser.SubPattern)] if isinstance(value, tuple) else []


def wild(items: Iterable[tuple[Any, Any]]) -> bool:
    """Is there anything in it that more than one letter matches?"""
    inner = (part for _, value in items for part in (*parts(value), *repeated(value)))
    return any(kind in (op.ANY, op.IN, op.NOT_LITERAL) for kind, _ in items) or any(map(wild, inner))


def repeated(value: Any) -> list[Any]:
    """The alternatives of a branch."""
    return value[1] if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], list) else []


def digits(items: Sequence[tuple[Any, Any]]) -> bool:
    """Is this `\\d` or a digit of `[0-9]`? Names have few of them in a row."""
    sets = [(op.CATEGORY, op.CATEGORY_DIGIT)], [(op.RANGE, (48, 57))]
    return len(items) == 1 and items[0][0] is op.IN and items[0][1] in sets
