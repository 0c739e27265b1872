"""`increlora check`: would this engine serve that adapter?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...export.adapters import adapter_folder
from ...export.engines import ALIASES, ENGINES, EngineReport, check_export


def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter folder, or a run (its lora/ is checked).")],
    engine: Annotated[
        str | None, typer.Option(help=f"{', '.join([*ENGINES, *ALIASES])}.", show_default="all of them")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="The rank limit that the server runs with.", show_default="one that fits")
    ] = None,
) -> None:
    """Report what an engine would refuse or compute wrongly, with the remedy. Exit code 1 if there is anything."""
    report = check_export(adapter_folder(path, "lora"), engine, max_lora_rank=max_lora_rank)
    Console(highlight=False, markup=False).print(verdicts(report))
    if not report.ok:
        raise typer.Exit(1)


def verdicts(report: EngineReport) -> Table:
    """What each engine does with the folder, one line per finding."""
    table = Table.grid(padding=(0, 2))
    for engine in report.engines:
        findings = report.of(engine)
        if not findings:
            table.add_row(engine, "serves it")
        for finding in findings:
            verdict = "refuses it, or is wrong" if finding.level == "error" else "serves it on a condition"
            table.add_row(engine, verdict, f"{finding.where}: {finding.problem}; {finding.remedy}")
    for column in table.columns:
        column.overflow = "fold"  # names are never cut
    return table
