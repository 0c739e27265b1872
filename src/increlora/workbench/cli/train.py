"""`increlora train`: flags, recipe and resumption, up to the settings of a run."""

from inspect import Signature, signature
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..runs import RunFolder
from .options import flags, from_flags
from .recipes import read_recipe
from .settings import TrainSettings, refuse_changes, resolve


def train(
    *,
    config: Annotated[Path | None, typer.Option(help="A recipe (TOML); options given beside it override it.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/METHOD-TASK, or runs/RECIPE")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print modules, budget, events and memory; train nothing.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; may be given again."),
    ] = None,
    **texts: str | None,
) -> None:
    """Fine-tune a model with an adapter, and show where the rank went."""
    if resume and (overwrite or config or dry_run):
        raise typer.BadParameter("--resume goes with neither --overwrite nor --config nor --dry-run: leave them out")
    given, pairs = from_flags(TrainSettings, texts), set_ or []
    method, task = (given.get(name, getattr(TrainSettings, name)) for name in ("method", "task"))
    folder = RunFolder(out or Path("runs", config.stem if config else f"{method}-{task}".replace("/", "-")))
    if resume:
        settings = TrainSettings(**read_recipe(folder.config()))
        refuse_changes(settings, given, pairs, folder.path)
    else:
        settings = resolve(given, pairs, read_recipe(config) if config else None)
    if dry_run:
        from .plan import show_plan

        return show_plan(settings, Console())
    from .run import train as run

    try:
        run(settings, folder, Console(), resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        if folder.path.exists():
            typer.echo(f"interrupted; continue with: increlora train --resume --out {folder.path}", err=True)
        raise typer.Exit(130) from None


first, *others, _ = signature(train).parameters.values()  # the last stands for the flags of the settings
train.__signature__ = Signature([first, *flags(TrainSettings), *others])  # type: ignore[attr-defined]
