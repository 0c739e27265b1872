"""`increlora methods`: what every method can do here, probed on the spot."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ... import probes
from ...errors import ConfigError
from ...naming import nearest
from ...registry import METHODS

SIGNS = {"yes": ("yes", "green"), "no": ("no", "yellow"), "not probed": ("–", "dim"), "broken": ("BROKEN", "bold red")}


def methods(
    method: Annotated[
        list[str] | None, typer.Option(help="Probe this method alone; may be given again.", show_default="all of them")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with reasons in full.")] = False,
) -> None:
    """Probe on tiny models what every method can do, and print it as a table. Exit code 1 if anything is broken.

    "yes" means that a small run did it and its numbers agree; "no", that the library refuses, with the alternative."""
    chosen = [known(name) for name in method or METHODS]
    errors = Console(stderr=True, highlight=False, markup=False)
    with errors.status("probing") as status:
        table = probes.probe_methods(chosen, tell=lambda news: status.update(f"probing {news}"))
    if as_json:
        typer.echo(json.dumps(probes.as_data(table), indent=1, ensure_ascii=False))
    else:
        show(Console(highlight=False, markup=False), table)
    if any(probes.broken(table)):
        raise typer.Exit(1)


def known(name: str) -> str:
    """Raises ConfigError, with the nearest name, for a method that does not exist."""
    if name not in METHODS:
        raise ConfigError(f"--method {name}: no such method; did you mean {nearest(name, METHODS)}?")
    return name


def show(console: Console, outcomes: probes.Table) -> None:
    """A row per capability, a column per method, in as many tables as the terminal needs; and the reasons below."""
    notes = probes.footnotes(outcomes)
    for methods in fitting(list(next(iter(outcomes.values()))), console.width - max(map(len, outcomes)) - 2):
        table = Table("", *methods, padding=(0, 1, 0, 0), show_edge=False)
        for name, row in outcomes.items():
            table.add_row(name, *(cell(method, row[method], notes) for method in methods))
        console.print(table)
    reasons = Table.grid(padding=(0, 2))
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


def cell(method: str, outcome: probes.Outcome, notes: dict[str, int]) -> Text:
    sign, style = SIGNS[outcome.verdict]
    number = notes.get(probes.told(method, outcome))
    return Text(f"{sign} {number}" if number else sign, style)
