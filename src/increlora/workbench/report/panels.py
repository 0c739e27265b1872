"""Figures with a curve per module: a panel per module type, a colour per layer."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from . import tables
from .charts import LABEL, SEQUENCE, WIDTH, Chart, chart, shades, slider
from .reading import Row, Run

FEW_TICKS = alt.Axis(grid=False, tickCount=5, tickMinStep=1)
POWERS = alt.Axis(grid=False, ticks=False, tickCount=4, format=".0e")  # of a logarithmic scale


def facets(figure: Chart, types: Sequence[str]) -> Chart:
    """A panel per module type, in model order."""
    header = alt.Header(title=None, labelLimit=LABEL, labelFontWeight="bold")
    order = alt.EncodingSortField("order", op="min")
    return figure.facet(alt.Facet("type:N", sort=order, header=header), columns=min(3, len(types)), spacing=18)


def powers(rows: Sequence[Row], name: str) -> alt.Scale:
    """A logarithmic scale over all values of a column of lists, and a little more."""
    values = [value for row in rows for value in row[name]]
    return alt.Scale(type="log", domain=[min(values) / 1.2, max(values) * 1.2], nice=False)


def panel_width(types: Sequence[str]) -> int:
    return (WIDTH - 120) // min(3, max(1, len(types)))


def by_layer(layers: Sequence[str]) -> Any:
    scale = alt.Scale(domain=list(layers), range=shades(len(layers)))
    return alt.Color(
        "layer:O", scale=scale, legend=alt.Legend(title="layer", symbolLimit=40, columns=1 + len(layers) // 20)
    )


def ordered(rows: Sequence[Row], types: Sequence[str]) -> list[Row]:
    order = {kind: i for i, kind in enumerate(types)}
    return [row | {"order": order[row["type"]]} for row in rows]


def scores(run: Run) -> Chart | None:
    lines, grants = tables.importances(run), tables.grants(run)
    if not lines and not grants:
        return None
    where = tables.grid_of(run)
    rows = [row | {"grant": 0} for row in lines] + [row | {"grant": 1} for row in grants]
    end = max([tables.spent_at(run) or max(1, run.steps), *(row["step"][0] for row in grants)])
    step = alt.X("step:Q", title="training step", scale=alt.Scale(domain=[0, end], nice=False), axis=FEW_TICKS)
    value = alt.Y("importance:Q", title="importance", scale=powers(rows, "importance"), axis=POWERS)
    base = alt.Chart(width=panel_width(where.types), height=130).encode(step, value, by_layer(where.layers))
    line = base.transform_filter("datum.grant == 0").mark_line(strokeWidth=1.5, clip=True)
    dot = base.transform_filter("datum.grant == 1").mark_circle(size=55, opacity=1)
    dot = dot.encode(
        tooltip=["type:N", "layer:N", "step:Q", alt.Tooltip("ranks:Q", title="ranks granted"),
                 alt.Tooltip("rank:Q", title="rank since"), alt.Tooltip("importance:Q", format=".3")]
    )  # fmt: skip
    data = alt.Data(values=ordered(rows, where.types))
    both = alt.layer(line.encode(detail="layer:O"), dot, data=data).transform_flatten(["step", "importance"])
    return facets(both, where.types)


def newborns(run: Run) -> Chart | None:
    rows = tables.birth_rates(run)
    if not rows:
        return None
    lines = chart(rows, width=WIDTH - 80, height=150).mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=14))
    born = alt.Color(
        "born:Q", scale=alt.Scale(range=SEQUENCE), legend=alt.Legend(title="born after step", tickMinStep=1)
    )
    factor = alt.Y("factor:Q", title="learning-rate factor", axis=alt.Axis(tickCount=4))
    scale, axis = alt.Scale(zero=False, nice=False), alt.Axis(grid=False, tickMinStep=1)
    step = alt.X("step:Q", title="training step", scale=scale, axis=axis)
    return lines.encode(
        step, factor, born, detail="born:N", tooltip=["born:Q", "step:Q", alt.Tooltip("factor:Q", format=".3")]
    )


def spectra(run: Run) -> Chart | None:
    rows = tables.spectra(run)
    if not any(row["sigma"] for row in rows):
        return None
    where = tables.grid(name for row in run.spectra for name in row["modules"])
    now = slider("at", min(row["since"] for row in rows), max(row["since"] for row in rows))
    shown = alt.Chart(alt.Data(values=ordered(rows, where.types)), width=panel_width(where.types), height=130)
    shown = shown.transform_filter("datum.since <= at && at < datum.until").transform_flatten(["index", "sigma"])
    value = alt.Y("sigma:Q", title="singular value", scale=powers(rows, "sigma"), axis=POWERS)
    most = max(len(row["sigma"]) for row in rows)
    index = alt.X("index:Q", title="component", scale=alt.Scale(domain=[1, max(2, most)]), axis=FEW_TICKS)
    lines = shown.mark_line(strokeWidth=1.5, point=alt.OverlayMarkDef(size=16))
    tooltip = ["type:N", "layer:N", "index:Q", alt.Tooltip("sigma:Q", format=".3")]
    lines = lines.encode(index, value, by_layer(where.layers), tooltip=tooltip)
    return facets(lines, where.types).add_params(now)
