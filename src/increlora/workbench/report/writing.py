"""Charts as files: inside one HTML page, or as PNG and SVG."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...files import whole, write_text
from .charts import themed
from .figures import FIGURES, compared
from .reading import Run
from .summary import comparison_table, module_rows, tiles

PRINT_INK = "#1c2024"
PIXELS = 2  # per CSS pixel in PNG files


def write_report(runs: Sequence[Run], out: Path, *, command: str) -> None:
    """One self-contained page on these runs; it asks nothing of the network and runs no script but its own.

    Jinja escapes every value; scripts are admitted by their hash alone."""
    together = compared(runs) if len(runs) > 1 else []
    shown = [("all", together, runs), *((f"run{i}", FIGURES, run) for i, run in enumerate(runs))]
    charts = {f"{key}-{figure.name}": figure.draw(what) for key, figures, what in shown for figure in figures}
    loader = PackageLoader(str(__package__), ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    scripts = [vega(), loader.get_source(environment, "page.js")[0]]
    page = environment.get_template("page.html").render(
        runs=runs,
        title=f"{len(runs)} runs" if together else runs[0].label,
        table=comparison_table(runs) if together else None,
        together=together,
        single=FIGURES,
        charts={k: themed(c, ink="currentColor", background="transparent").to_dict() for k, c in charts.items() if c},
        tiles=tiles,
        module_rows=module_rows,
        command=command,
        versions=f"increlora {version('increlora')}, altair {version('altair')}, "
        f"vl-convert {version('vl-convert-python')}, vega {vl_convert.get_vega_version()}",
        scripts=[Markup(script) for script in scripts],
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )
    write_text(out, page)


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script; takes seconds to make."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def save_figures(runs: Sequence[Run], folder: Path, *, kind: str) -> list[Path]:
    """Every figure as a file of this kind (`png` or `svg`), in a folder per run if there are several."""
    written = []
    for i, run in enumerate(runs):
        target = folder if len(runs) == 1 else folder / f"{i + 1}-{run.path.resolve().name}"
        target.mkdir(parents=True, exist_ok=True)
        for figure in FIGURES:
            if (chart := figure.draw(run)) is not None:
                written.append(target / f"{figure.name}.{kind}")
                with whole(written[-1]) as new:
                    themed(chart, ink=PRINT_INK, background="white").save(new, format=kind, scale_factor=PIXELS)
    return written
