"""Commands, and errors as one sentence: exit code 2, no traceback."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import NoMatchingPeftModuleError
from rich.console import Console
from typer.core import TyperGroup

from ..errors import IncreloraError
from ..methods import METHODS
from ..runs import RunFolder
from ..tasks import TASKS
from .settings import TrainSettings, from_toml, nearest, refuse_changes, resolve

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's, of which newer releases of typer bring a copy
DEFAULTS = TrainSettings()


class OneSentence(TyperGroup):
    """A group whose expected errors are one sentence on stderr."""

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        try:
            code = super().main(args, *more, **kwargs | {"standalone_mode": False})
        except USAGE_ERROR as error:
            code = complain(unknown_option(error) or error.format_message())
        except (IncreloraError, NoMatchingPeftModuleError, OSError) as error:
            code = complain(str(error))
        if standalone_mode:
            raise SystemExit(code)
        return code


def complain(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def unknown_option(error: Any) -> str | None:
    """The sentence for an option that does not exist, naming the nearest one that does."""
    if not hasattr(error, "possibilities") or error.ctx is None:
        return None
    known = [name for parameter in error.ctx.command.params for name in parameter.opts if name.startswith("--")]
    return f"no option {error.option_name}; did you mean {nearest(error.option_name, known)}?"


app = typer.Typer(cls=OneSentence, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def increlora() -> None:
    """Low-rank adapters whose rank grows during fine-tuning, where it matters most."""


def choice(text: str, default: object) -> Any:
    """An option that knows whether it was given; the default is the settings'."""
    shown = "all" if default is None else default
    return typer.Option(help=text, show_default=str(shown))


@app.command()
def train(
    method: Annotated[str | None, choice(f"{', '.join(METHODS)}.", DEFAULTS.method)] = None,
    task: Annotated[str | None, choice(f"{', '.join(TASKS)}.", DEFAULTS.task)] = None,
    model: Annotated[str | None, choice("Name on the hub, or a folder.", DEFAULTS.model)] = None,
    r: Annotated[int | None, choice("Average rank per module that the budget pays for.", DEFAULTS.r)] = None,
    target_modules: Annotated[
        str | None, choice("Names with commas between, all-linear, or a regular expression.", "the encoder's linears")
    ] = None,
    epochs: Annotated[float | None, choice("Passes over the training examples.", DEFAULTS.epochs)] = None,
    lr: Annotated[float | None, choice("Peak learning rate.", DEFAULTS.lr)] = None,
    batch_size: Annotated[int | None, choice("Examples per step.", DEFAULTS.batch_size)] = None,
    max_length: Annotated[int | None, choice("Tokens per example.", DEFAULTS.max_length)] = None,
    max_train_samples: Annotated[int | None, choice("Limit.", DEFAULTS.max_train_samples)] = None,
    max_eval_samples: Annotated[int | None, choice("Limit.", DEFAULTS.max_eval_samples)] = None,
    seed: Annotated[int | None, choice("Of data order, head, adapter and dropout.", DEFAULTS.seed)] = None,
    out: Annotated[Path | None, choice("Run folder.", "runs/METHOD-TASK")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable.")
    ] = None,
) -> None:
    """Fine-tune a model with an adapter, and show where the rank went."""
    given = {
        "method": method, "task": task, "model": model, "r": r, "target_modules": target_modules, "epochs": epochs,
        "lr": lr, "batch_size": batch_size, "max_length": max_length, "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples, "seed": seed,
    }  # fmt: skip
    folder = RunFolder(out or Path("runs", f"{method or DEFAULTS.method}-{task or DEFAULTS.task}"))
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other: give one of them")
    settings = settings_of(folder, given, set_ or [], resume=resume)
    from .train import train as run  # the Trainer takes a second to import; a wrong option should not wait for it

    try:
        run(settings, folder, Console(), resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        if folder.path.exists():
            typer.echo(f"interrupted; continue with: increlora train --resume --out {folder.path}", err=True)
        raise typer.Exit(130) from None


def settings_of(folder: RunFolder, given: dict[str, Any], pairs: Sequence[str], *, resume: bool) -> TrainSettings:
    """Settings of a new run, or those of the run to resume."""
    if not resume:
        return resolve(given, pairs)
    settings = from_toml(folder.config(), folder.path)
    refuse_changes(settings, given, pairs, folder.path)
    return settings
