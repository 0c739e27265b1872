"""Charts as files: inside one HTML page, or as PNG and SVG."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...files import write_text
from .charts import Chart, Figure
from .figures import FIGURES, compared
from .reading import Run
from .summary import comparison_table, module_rows, tiles
from .tables import spent_at

PRINT_INK = "#1c2024"
FONT = "system-ui, sans-serif"  # Vega measures text to place it: no `inherit`
PIXELS = 2  # per CSS pixel in PNG files


def write_report(runs: Sequence[Run], out: Path, *, command: str) -> None:
    """One self-contained page on these runs; it asks nothing of the network and runs no script but its own.

    Jinja escapes every value; scripts are admitted by their hash alone."""
    together = compared(runs) if len(runs) > 1 else []
    charts = drawn("all", together, runs)
    for i, run in enumerate(runs):
        charts |= drawn(f"run{i}", FIGURES, run)
    own = resources.files(__package__)
    scripts = [vega(), own.joinpath("page.js").read_text(encoding="utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    environment = Environment(
        loader=PackageLoader(str(__package__), "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals |= {"tiles": tiles, "module_rows": module_rows, "spent_at": spent_at}
    page = environment.get_template("page.html").render(
        runs=runs,
        title=f"{len(runs)} runs" if together else runs[0].label,
        table=comparison_table(runs) if together else None,
        together=together,
        single=FIGURES,
        charts=charts,
        command=command,
        versions=f"increlora {version('increlora')}, altair {version('altair')}, "
        f"vl-convert {version('vl-convert-python')}, vega {vl_convert.get_vega_version()}",
        style=Markup(own.joinpath("page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        + " ".join(f"'sha256-{h}'" for h in hashes),
    )
    write_text(out, page)


def drawn(key: str, figures: Sequence[Figure], what: Any) -> dict[str, Any]:
    """The charts of a run or several, as a page shows them, by key and name of the figure; none without data."""
    charts = {f"{key}-{figure.name}": figure.draw(what) for figure in figures}
    return {k: themed(c, ink="currentColor", background="transparent") for k, c in charts.items() if c is not None}


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script; takes seconds to make."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def save_figures(runs: Sequence[Run], folder: Path, *, kind: str) -> list[Path]:
    """Every figure as a file of this kind (`png` or `svg`), in a folder per run if there are several."""
    written = []
    for i, run in enumerate(runs):
        place = folder if len(runs) == 1 else folder / f"{i + 1}-{run.path.resolve().name}"
        place.mkdir(parents=True, exist_ok=True)
        for figure in FIGURES:
            if (chart := figure.draw(run)) is not None:
                path = place / f"{figure.name}.{kind}"
                spec = themed(chart, ink=PRINT_INK, background="white")
                if kind == "svg":
                    path.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
                else:
                    path.write_bytes(vl_convert.vegalite_to_png(spec, scale=PIXELS))
                written.append(path)
    return written


def themed(chart: Chart, *, ink: str, background: str) -> dict[str, Any]:
    """The Vega-Lite spec of a chart; in a page the ink is the text colour of wherever it stands."""
    lines = {"domainColor": ink, "domainOpacity": 0.35, "tickColor": ink, "tickOpacity": 0.35,
             "gridColor": ink, "gridOpacity": 0.1}  # fmt: skip
    text = {"labelColor": ink, "titleColor": ink, "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12}
    return (
        chart.configure(background=background, font=FONT)
        .configure_axis(**lines, **text)
        .configure_legend(**text)
        .configure_header(labelColor=ink, labelFontSize=12, labelAnchor="start")
        .configure_view(stroke=None)
        .to_dict()
    )
