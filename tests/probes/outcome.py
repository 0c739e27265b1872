"""What a probe finds out: an `Outcome`, a cell of the table that `increlora methods` shows.

A probe is a function of a subject. It returns (a note, if there is something to add) where the library does what is
asked and the numbers agree; it lets an error of ours through where the library refuses; everything else is broken.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from increlora.errors import IncreLoraError


@dataclass(frozen=True)
class Outcome:
    """As `increlora.workbench.cli.methods` explains it."""

    verdict: Literal["yes", "no", "not probed", "broken"]
    reason: str = ""


Table = dict[str, dict[str, Outcome]]  # capability → method → outcome


class NotProbed(Exception):
    """A probe cannot run on this machine; the text says what is missing."""


class Disagreement(Exception):
    """The library did what was asked, and the numbers are wrong."""


def outcome_of(probe: Callable[[Any], str | None], subject: Any) -> Outcome:
    """Run a probe. Nothing it raises gets out."""
    try:
        with quiet():
            note = probe(subject)
    except NotProbed as missing:
        return Outcome("not probed", one_line(missing))
    except IncreLoraError as refusal:
        return Outcome("no", one_line(refusal))
    except Exception as error:
        kind = "" if isinstance(error, Disagreement) else f"{type(error).__name__}: "
        return Outcome("broken", kind + one_line(error))
    return Outcome("yes", note or "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and logs, which concern what is tried and not what the user does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def check(condition: bool, otherwise: str) -> None:
    """Raise Disagreement, saying what is the case otherwise."""
    if not condition:
        raise Disagreement(otherwise)


def same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Raise Disagreement unless two tensors differ by at most `tolerance` of the largest entry (0: not one bit)."""
    off = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    limit = tolerance * float(expected.abs().max())
    check(off <= limit, f"{what}: off by {off:.1e}, at most {limit:.1e} expected")


def different(one: Tensor, other: Tensor, what: str, least: float = 1e-4) -> None:
    """Raise Disagreement if two tensors are all but equal: then comparing them with a third shows nothing."""
    check(not torch.allclose(one, other, rtol=least, atol=least), f"{what}: nothing changed")
