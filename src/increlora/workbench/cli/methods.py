"""`increlora methods`: what every method can do, as the probes in the project's tests found it (capabilities.json)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from ...errors import ConfigError
from ...naming import nearest
from ...registry import METHODS

CAPABILITIES = Path(__file__).with_name("capabilities.json")  # written by `python -m tests.probes --write`
SIGNS = {"yes": ("yes", "green"), "no": ("no", "yellow"), "not probed": ("–", "dim"), "broken": ("BROKEN", "bold red")}


@dataclass(frozen=True)
class Outcome:
    """A cell of the table.

    Attributes:
        verdict: `yes`, the probe ran and its numbers agree; `no`, the library refuses; `not probed`, something is
            missing on that machine; `broken`, a crash, or numbers that do not agree.
        reason: why not, with the alternative where the library refuses; what to know where it is a yes.
    """

    verdict: Literal["yes", "no", "not probed", "broken"]
    reason: str = ""


Table = dict[str, dict[str, Outcome]]  # capability → method → outcome


def methods(
    method: Annotated[
        list[str] | None, typer.Option(help="Show this method alone; may be given again.", show_default="all of them")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with reasons in full.")] = False,
) -> None:
    """Print what every method can do, as a table: probed on tiny models, with the versions that are named.

    "yes" means that a small run did it and its numbers agree; "no", that the library refuses, with the alternative."""
    data = only(json.loads(CAPABILITIES.read_text()), [known(name) for name in method or METHODS])
    if as_json:
        typer.echo(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False, markup=False)
        show(console, table_of(data))
        console.print(f"Probed with {versions(data)}.")


def known(name: str) -> str:
    """Raises ConfigError, with the nearest name, for a method that does not exist."""
    if name not in METHODS:
        raise ConfigError(f"--method {name}: no such method; did you mean {nearest(name, METHODS)}?")
    return name


def only(data: dict[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """The data of these methods, in their order."""
    cells = {name: {method: row[method] for method in chosen} for name, row in data["capabilities"].items()}
    return data | {"capabilities": cells}


def table_of(data: dict[str, Any]) -> Table:
    cells = data["capabilities"]
    return {name: {method: Outcome(**cell) for method, cell in row.items()} for name, row in cells.items()}


def versions(data: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in data["versions"].items())


def footnotes(table: Table) -> dict[str, int]:
    """Every reason that is given, numbered in the order of the table."""
    reasons = dict.fromkeys(told(*cell) for row in table.values() for cell in row.items() if cell[1].reason)
    return {reason: number for number, reason in enumerate(reasons, 1)}


def told(method: str, outcome: Outcome) -> str:
    """The reason in words that hold for every method it is given for."""
    return re.sub(rf"\b{method}\b", "the method", outcome.reason)


def show(console: Console, outcomes: Table) -> None:
    """A row per capability, a column per method, in as many tables as the terminal needs; and the reasons below."""
    notes = footnotes(outcomes)
    for methods in fitting(list(next(iter(outcomes.values()))), console.width - max(map(len, outcomes)) - 2):
        table = Grid("", *methods, padding=(0, 1, 0, 0), show_edge=False)
        for name, row in outcomes.items():
            table.add_row(name, *(cell(method, row[method], notes) for method in methods))
        console.print(table)
    reasons = Grid.grid(padding=(0, 2))
    for reason, number in notes.items():
        reasons.add_row(str(number), reason)
    if notes:
        console.print(reasons)


def fitting(methods: list[str], room: int) -> list[list[str]]:
    """The methods in groups, each of which fits in so many characters, with two beside every name."""
    groups: list[list[str]] = [[]]
    for method in methods:
        if groups[-1] and sum(len(name) + 2 for name in (*groups[-1], method)) > room:
            groups.append([])
        groups[-1].append(method)
    return groups


def cell(method: str, outcome: Outcome, notes: dict[str, int]) -> Text:
    sign, style = SIGNS[outcome.verdict]
    number = notes.get(told(method, outcome))
    return Text(f"{sign} {number}" if number else sign, style)
