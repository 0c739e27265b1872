"""Figures with a curve per module: a panel per module type, a colour per layer."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from . import tables
from .charts import LABEL, SEQUENCE, WIDTH, Chart, chart, shades, slider
from .reading import Row, Run

FEW_TICKS = alt.Axis(grid=False, tickCount=5, tickMinStep=1)
POWERS = alt.Axis(grid=False, ticks=False, tickCount=4, format=".0e")  # of a logarithmic scale


def powers(rows: Sequence[Row], name: str) -> alt.Scale:
    """A logarithmic scale over all values of a column of lists, and a little more."""
    values = [value for row in rows for value in row[name]]
    return alt.Scale(type="log", domain=[min(values) / 1.2, max(values) * 1.2], nice=False)


def panel(where: tables.Grid, *encodings: Any) -> Chart:
    """A chart of one module type, without its data."""
    scale = alt.Scale(domain=list(where.layers), range=shades(len(where.layers)))
    legend = alt.Legend(title="layer", symbolLimit=40, columns=1 + len(where.layers) // 20)
    width = (WIDTH - 120) // min(3, max(1, len(where.types)))
    return alt.Chart(width=width, height=130).encode(*encodings, alt.Color("layer:O", scale=scale, legend=legend))


def facets(figure: Chart, rows: Sequence[Row], where: tables.Grid) -> Chart:
    """The chart of these rows for every module type, in model order."""
    order = {kind: i for i, kind in enumerate(where.types)}
    figure.data = alt.Data(values=[row | {"order": order[row["type"]]} for row in rows])
    header = alt.Header(title=None, labelLimit=LABEL, labelFontWeight="bold")
    facet = alt.Facet("type:N", sort=alt.EncodingSortField("order", op="min"), header=header)
    return figure.facet(facet, columns=min(3, len(where.types)), spacing=18)


def scores(run: Run) -> Chart | None:
    lines, grants = tables.importances(run), tables.grants(run)
    if not lines and not grants:
        return None
    where = tables.grid_of(run)
    rows = [row | {"grant": 0} for row in lines] + [row | {"grant": 1} for row in grants]
    end = max([tables.spent_at(run) or max(1, run.steps), *(row["step"][0] for row in grants)])
    step = alt.X("step:Q", title="training step", scale=alt.Scale(domain=[0, end], nice=False), axis=FEW_TICKS)
    value = alt.Y("importance:Q", title="importance", scale=powers(rows, "importance"), axis=POWERS)
    base = panel(where, step, value)
    line = base.transform_filter("datum.grant == 0").mark_line(strokeWidth=1.5, clip=True).encode(detail="layer:O")
    dot = base.transform_filter("datum.grant == 1").mark_circle(size=55, opacity=1)
    dot = dot.encode(
        tooltip=["type:N", "layer:N", "step:Q", alt.Tooltip("ranks:Q", title="ranks granted"),
                 alt.Tooltip("rank:Q", title="rank since"), alt.Tooltip("importance:Q", format=".3")]
    )  # fmt: skip
    return facets(alt.layer(line, dot).transform_flatten(["step", "importance"]), rows, where)


def newborns(run: Run) -> Chart | None:
    rows = tables.birth_rates(run)
    if not rows:
        return None
    lines = chart(rows, width=WIDTH - 80, height=150).mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=14))
    legend = alt.Legend(title="born after step", tickMinStep=1)
    axis = alt.Axis(grid=False, tickMinStep=1)
    return lines.encode(
        alt.X("step:Q", title="training step", scale=alt.Scale(zero=False, nice=False), axis=axis),
        alt.Y("factor:Q", title="learning-rate factor", axis=alt.Axis(tickCount=4)),
        alt.Color("born:Q", scale=alt.Scale(range=SEQUENCE), legend=legend),
        detail="born:N",
        tooltip=["born:Q", "step:Q", alt.Tooltip("factor:Q", format=".3")],
    )


def spectra(run: Run) -> Chart | None:
    rows = tables.spectra(run)
    if not any(row["sigma"] for row in rows):
        return None
    where = tables.grid(name for row in run.spectra for name in row["modules"])
    now = slider("at", min(row["since"] for row in rows), max(row["since"] for row in rows))
    value = alt.Y("sigma:Q", title="singular value", scale=powers(rows, "sigma"), axis=POWERS)
    most = max(len(row["sigma"]) for row in rows)
    index = alt.X("index:Q", title="component", scale=alt.Scale(domain=[1, max(2, most)]), axis=FEW_TICKS)
    tooltip = ["type:N", "layer:N", "index:Q", alt.Tooltip("sigma:Q", format=".3")]
    shown = panel(where, index, value).encode(tooltip=tooltip)
    shown = shown.transform_filter("datum.since <= at && at < datum.until").transform_flatten(["index", "sigma"])
    lines = shown.mark_line(strokeWidth=1.5, point=alt.OverlayMarkDef(size=16))
    return facets(lines, rows, where).add_params(now)
