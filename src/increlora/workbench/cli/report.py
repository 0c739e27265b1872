"""`increlora report RUN…`: what runs did, as one HTML file, and as figures."""

import shlex
from pathlib import Path
from typing import Literal

import typer

from ...errors import ConfigError

EXTRA = {"altair", "jinja2", "markupsafe", "vl_convert"}


def report(
    runs: list[Path] = typer.Argument(metavar="RUN…", help="Folders that `increlora train` wrote."),
    out: Path | None = typer.Option(
        None, help="The page to write.", show_default="RUN/report.html; report.html for several"
    ),
    figures: Path | None = typer.Option(None, help="Also write every figure into this folder."),
    format_: Literal["png", "svg"] = typer.Option("svg", "--format", help="Format of the figures."),
) -> None:
    """Show where the rank went, when, and what it bought: one HTML file that needs no network."""
    try:
        from ..report import read_runs, save_figures, write_report
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ConfigError(f"reports need {error.name}: pip install 'increlora[report]'") from error
    found = read_runs(runs)
    page = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    command = ["increlora", "report", *map(str, runs)]
    command += [] if out is None else ["--out", str(out)]
    command += [] if figures is None else ["--figures", str(figures), "--format", format_]
    write_report(found, page, command=shlex.join(command))
    typer.echo(f"written to {page}")
    if figures is not None:
        written = save_figures(found, figures, kind=format_)
        typer.echo(f"{len(written)} figures written to {figures}")
