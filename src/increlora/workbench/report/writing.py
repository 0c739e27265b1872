"""Charts as files: inside one HTML page, or as PNG and SVG."""

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
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
from .summary import comparison_table, facts, module_rows, tiles
from .tables import spent_at

PRINT_INK = "#1c2024"
FONT = "system-ui, sans-serif"  # Vega measures text to place it: no `inherit`
PIXELS = 2  # per CSS pixel in PNG files


def write_report(runs: Sequence[Run], out: Path, *, command: str) -> None:
    """One self-contained page on these runs; it asks nothing of the network and runs no script but its own."""
    several = len(runs) > 1
    charts: dict[str, Any] = {}
    page = {
        "title": f"{len(runs)} runs" if several else runs[0].label,
        "table": comparison_table(runs) if several else None,
        "compared": placed("all", compared(runs), runs, charts) if several else [],
        "runs": [section(run, f"run{i}", charts) for i, run in enumerate(runs)],
        "command": command,
        "versions": f"increlora {version('increlora')}, altair {version('altair')}, "
        f"vl-convert {version('vl-convert-python')}, vega {vl_convert.get_vega_version()}",
        "charts": charts,
    }
    write_text(out, rendered(page))


def save_figures(runs: Sequence[Run], folder: Path, *, kind: str) -> list[Path]:
    """Every figure as a file of this kind (`png` or `svg`), in a folder per run if there are several."""
    written = []
    for i, run in enumerate(runs):
        place = folder if len(runs) == 1 else folder / f"{i + 1}-{run.path.resolve().name}"
        place.mkdir(parents=True, exist_ok=True)
        for figure in FIGURES:
            if (drawn := figure.draw(run)) is not None:
                path = place / f"{figure.name}.{kind}"
                spec = themed(drawn, ink=PRINT_INK, background="white")
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


def section(run: Run, key: str, charts: dict[str, Any]) -> Mapping[str, Any]:
    """What the template shows of one run; its charts are added to `charts`."""
    return {
        "run": run,
        "key": key,
        "status": str(run.get("status") or "unknown"),
        "tiles": tiles(run),
        "spent": spent_at(run) is not None,
        "figures": placed(key, FIGURES, run, charts),
        "modules": module_rows(run),
        "facts": facts(run),
    }


def placed(key: str, figures: Sequence[Figure], drawn: Any, charts: dict[str, Any]) -> list[tuple[str, Figure]]:
    """(key, figure) of each of these figures of a run or several; those that can be drawn are added to `charts`."""
    keys = [f"{key}-{figure.name}" for figure in figures]
    found = {key: figure.draw(drawn) for key, figure in zip(keys, figures, strict=True)}
    charts |= {k: themed(c, ink="currentColor", background="transparent") for k, c in found.items() if c is not None}
    return list(zip(keys, figures, strict=True))


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script; takes seconds to make."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def rendered(page: Mapping[str, Any]) -> str:
    """The template filled in. Jinja escapes every value; scripts are admitted by their hash alone."""
    own = resources.files(__package__)
    scripts = [vega(), own.joinpath("page.js").read_text(encoding="utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    environment = Environment(
        loader=PackageLoader(str(__package__), "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        page,
        style=Markup(own.joinpath("page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        + " ".join(f"'sha256-{h}'" for h in hashes),
    )
