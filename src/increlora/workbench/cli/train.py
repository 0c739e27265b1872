"""`increlora train`: options, recipe and resumption, up to the settings of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...registry import METHODS
from ..runs import RunFolder
from ..tasks import TASKS
from .recipes import from_toml, read_recipe
from .settings import TrainSettings, refuse_changes, resolve

DEFAULTS = TrainSettings()


def choice(text: str, default: object) -> Any:
    """An option that knows whether it was given; the default is the settings'."""
    shown = "all" if default is None else default
    return typer.Option(help=text, show_default=str(shown))


def train(
    config: Annotated[
        Path | None, typer.Option("--config", help="A recipe (TOML); options given beside it count.")
    ] = None,
    method: Annotated[str | None, choice(f"{', '.join(METHODS)}.", DEFAULTS.method)] = None,
    task: Annotated[str | None, choice(f"{', '.join(TASKS)}.", DEFAULTS.task)] = None,
    model: Annotated[str | None, choice("Name on the hub, or a folder.", "the task's")] = None,
    data: Annotated[str | None, choice("Folder or file with the task's data.", "the task's own source")] = None,
    r: Annotated[int | None, choice("Average rank per module that the budget pays for.", DEFAULTS.r)] = None,
    preset: Annotated[str | None, choice("`paper`: settings of the published code.", "none")] = None,
    target_modules: Annotated[
        str | None, choice("Names with commas between, all-linear, or a regular expression.", "the trunk's linears")
    ] = None,
    epochs: Annotated[float | None, choice("Passes over the training examples.", DEFAULTS.epochs)] = None,
    lr: Annotated[float | None, choice("Peak learning rate.", DEFAULTS.lr)] = None,
    lr_warmup: Annotated[str | None, choice("Steps (int), or a share of the run (0.1).", DEFAULTS.lr_warmup)] = None,
    weight_decay: Annotated[float | None, choice("Of all trained parameters.", DEFAULTS.weight_decay)] = None,
    max_grad_norm: Annotated[float | None, choice("Gradients are clipped to it.", DEFAULTS.max_grad_norm)] = None,
    head_dropout: Annotated[float | None, choice("Before a classification head.", "the model's")] = None,
    batch_size: Annotated[int | None, choice("Examples per step.", DEFAULTS.batch_size)] = None,
    max_length: Annotated[int | None, choice("Tokens per example.", DEFAULTS.max_length)] = None,
    max_train_samples: Annotated[int | None, choice("Limit.", DEFAULTS.max_train_samples)] = None,
    max_eval_samples: Annotated[int | None, choice("Limit.", DEFAULTS.max_eval_samples)] = None,
    evaluations: Annotated[int | None, choice("How often validation is measured.", DEFAULTS.evaluations)] = None,
    report_to: Annotated[str | None, choice("Logger of the Trainer: tensorboard, …", DEFAULTS.report_to)] = None,
    seed: Annotated[int | None, choice("Of data order, head, adapter and dropout.", DEFAULTS.seed)] = None,
    out: Annotated[Path | None, choice("Run folder.", "runs/METHOD-TASK, or runs/RECIPE")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print modules, budget, events, memory.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable.")
    ] = None,
) -> None:
    """Fine-tune a model with an adapter, and show where the rank went."""
    given = {
        "method": method, "task": task, "model": model, "data": data, "r": r, "preset": preset,
        "target_modules": target_modules, "epochs": epochs, "lr": lr, "lr_warmup": a_time(lr_warmup),
        "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "head_dropout": head_dropout,
        "batch_size": batch_size, "max_length": max_length, "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples, "evaluations": evaluations, "report_to": report_to, "seed": seed,
    }  # fmt: skip
    if resume and (overwrite or config or dry_run):
        raise typer.BadParameter("--resume goes with neither --overwrite nor --config nor --dry-run: leave them out")
    recipe = read_recipe(config) if config else {}
    chosen = recipe | {name: value for name, value in given.items() if value is not None}
    usual = config.stem if config else f"{chosen.get('method', DEFAULTS.method)}-{chosen.get('task', DEFAULTS.task)}"
    folder = RunFolder(out or Path("runs", usual.replace("/", "-")))
    settings = settings_of(folder, given, set_ or [], recipe=recipe, resume=resume)
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


def a_time(text: str | None) -> int | float | None:
    """Steps or a share of the run, from the command line."""
    try:
        return None if text is None else int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise typer.BadParameter(f"--lr-warmup {text}: give steps as an int, or a share of the run like 0.06") from None


def settings_of(
    folder: RunFolder, given: dict[str, Any], pairs: Sequence[str], *, recipe: dict[str, Any], resume: bool
) -> TrainSettings:
    """Settings of a new run, or those of the run to resume."""
    if not resume:
        return resolve(given, pairs, recipe)
    settings = from_toml(folder.config(), folder.path)
    refuse_changes(settings, given, pairs, folder.path)
    return settings
