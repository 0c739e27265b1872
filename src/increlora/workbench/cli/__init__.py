"""The command line: `increlora train …`. Needs the extra `cli`."""

import sys

EXTRA = {"accelerate", "huggingface_hub", "numpy", "pyarrow", "rich", "tomli_w", "transformers", "typer"}


def main() -> None:
    """Entry point of the console script `increlora`."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRA:
            raise
        print(f"error: the command line needs {error.name}: pip install 'increlora[cli]'", file=sys.stderr)
        sys.exit(2)
    app(prog_name="increlora")
