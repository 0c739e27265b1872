"""`increlora train`: flags, recipe and resumption, up to the settings of a run."""

from inspect import Signature, signature
from pathlib import Path

import typer
from rich.console import Console

from ..runs import RunFolder
from .options import flags, from_flags
from .settings import TrainSettings, read_recipe, refuse_changes, resolve


def train(
    *,
    config: Path | None = typer.Option(None, help="A recipe (TOML); options given beside it override it."),
    out: Path | None = typer.Option(None, help="Run folder.", show_default="runs/METHOD-TASK, or runs/RECIPE"),
    resume: bool = typer.Option(False, "--resume", help="Continue the interrupted run in --out."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run in --out."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print modules, budget, events and memory; train nothing."),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="An option of the method; may be given again."
    ),
    **texts: str | None,
) -> None:
    """Fine-tune a model with an adapter, and show where the rank went."""
    if resume and (overwrite or config or dry_run):
        raise typer.BadParameter("--resume goes with neither --overwrite nor --config nor --dry-run: leave them out")
    given, pairs = from_flags(TrainSettings, texts), set_ or []
    method, task = (given.get(name, getattr(TrainSettings, name)) for name in ("method", "task"))
    folder = RunFolder(out or Path("runs", config.stem if config else f"{method}-{task}".replace("/", "-")))
    if resume:
        settings = read_recipe(folder.config())
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
