"""`increlora report RUN…`: what runs did, as one HTML file, and as figures."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...errors import ConfigError

EXTRA = {"altair", "jinja2", "markupsafe", "vl_convert"}


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders that `increlora train` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write.", show_default="RUN/report.html; report.html for several")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Also write every figure into this folder.")] = None,
    format_: Annotated[Literal["png", "svg"], typer.Option("--format", help="Format of the figures.")] = "svg",
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
    write_report(found, page, command=command(runs, out, figures, format_))
    typer.echo(f"written to {page}")
    if figures is not None:
        written = save_figures(found, figures, kind=format_)
        typer.echo(f"{len(written)} figures written to {figures}")


def command(runs: Sequence[Path], out: Path | None, figures: Path | None, kind: str) -> str:
    """The command line that was given, for the foot of the page."""
    words = ["increlora", "report", *map(str, runs)]
    words += [] if out is None else ["--out", str(out)]
    words += [] if figures is None else ["--figures", str(figures), "--format", kind]
    return shlex.join(words)
