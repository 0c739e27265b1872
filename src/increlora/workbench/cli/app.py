"""Commands, and errors as one sentence: exit code 2, no traceback."""

from typing import Any

import typer
from peft import NoMatchingPeftModuleError
from typer.core import TyperGroup

from ...errors import IncreLoraError
from ...naming import nearest
from .adapters import check, export, inspect
from .methods import methods
from .report import report
from .train import train

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # click's, of which newer releases of typer bring a copy


class OneSentence(TyperGroup):
    """A group whose expected errors are one sentence on stderr."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except (USAGE_ERROR, IncreLoraError, NoMatchingPeftModuleError, OSError) as error:
            code = 2
            if message := sentence(error):  # without a command typer has printed the help
                typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise SystemExit(code)


def sentence(error: Any) -> str:
    """What an error says; of an option that does not exist, the nearest one that does."""
    if not isinstance(error, USAGE_ERROR):
        return str(error)
    if not hasattr(error, "possibilities"):
        return str(error.format_message())
    parameters = error.ctx.command.get_params(error.ctx)  # --help among them
    known = [name for parameter in parameters for name in parameter.opts if name.startswith("--")]
    return f"no option {error.option_name}; did you mean {nearest(error.option_name, known)}?"


app = typer.Typer(cls=OneSentence, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def increlora() -> None:
    """Low-rank adapters whose rank grows during fine-tuning, where it matters most."""


for command in (train, report, export, check, inspect, methods):
    app.command()(command)
