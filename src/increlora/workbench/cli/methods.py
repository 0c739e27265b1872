"""`increlora methods`: what every method can do, as the probes in the project's tests found it (capabilities.json).

A cell of the table is {"verdict", "reason"}. The verdict is `yes`, the probe ran and its numbers agree; `no`, the
library refuses; `not probed`, something is missing on that machine; `broken`, a crash, or numbers that do not agree.
The reason is why not, with the alternative where the library refuses; what to know where it is a yes.
"""

import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...errors import ConfigError
from ...naming import nearest
from ...registry import METHODS
from .display import grid

CAPABILITIES = Path(__file__).with_name("capabilities.json")  # written by `python -m tests.probes --write`
SIGNS = {"yes": ("yes", "green"), "no": ("no", "yellow"), "not probed": ("–", "dim"), "broken": ("BROKEN", "bold red")}

Capabilities = Mapping[str, Mapping[str, Mapping[str, str]]]  # capability → method → cell


def methods(
    method: Annotated[
        list[str] | None, typer.Option(help="Show this method alone; may be given again.", show_default="all of them")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with reasons in full.")] = False,
) -> None:
    """Print what every method can do, as a table: probed on tiny models, with the versions that are named.

    "yes" means that a small run did it and its numbers agree; "no", that the library refuses, with the alternative."""
    chosen = method or list(METHODS)
    for name in chosen:
        if name not in METHODS:
            raise ConfigError(f"--method {name}: no such method; did you mean {nearest(name, METHODS)}?")
    data = json.loads(CAPABILITIES.read_text())
    data["capabilities"] = {name: {m: row[m] for m in chosen} for name, row in data["capabilities"].items()}
    if as_json:
        typer.echo(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False, markup=False)
        show(console, data["capabilities"])
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        console.print(f"Probed with {versions}.")


def footnoted(table: Capabilities) -> tuple[dict[str, dict[str, tuple[str, str]]], dict[str, str]]:
    """(verdict, number of its reason) of every cell, and {reason: number} in the order of the table; a reason is in
    words that hold for every method it is given for."""
    numbers, cells = {"": ""}, defaultdict[str, dict[str, tuple[str, str]]](dict)
    for name, row in table.items():
        for method, cell in row.items():
            reason = re.sub(rf"\b{method}\b", "the method", cell["reason"])
            cells[name][method] = cell["verdict"], numbers.setdefault(reason, str(len(numbers)))
    return cells, {reason: number for reason, number in numbers.items() if reason}


def show(console: Console, table: Capabilities) -> None:
    """A row per capability, a column per method, in as many tables as the terminal needs; and the reasons below."""
    cells, reasons = footnoted(table)
    room = console.width - max(map(len, cells)) - 4
    names = "  ".join(next(iter(cells.values())))  # each with two spaces to the next
    for line in textwrap.wrap(names, max(1, room), break_long_words=False, break_on_hyphens=False):
        part = Table("", *line.split(), padding=(0, 1, 0, 0), show_edge=False)
        for name, row in cells.items():
            part.add_row(name, *(sign(*row[method]) for method in line.split()))
        console.print(part)
    if reasons:
        console.print(grid((number, reason) for reason, number in reasons.items()))


def sign(verdict: str, number: str) -> Text:
    word, style = SIGNS[verdict]
    return Text(f"{word} {number}".rstrip(), style)
