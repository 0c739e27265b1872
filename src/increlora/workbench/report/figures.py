"""The figures of a run, and of several together: Vega-Lite charts, the same for the page, PNG and SVG.

A function draws one figure from its rows; its docstring is the caption.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import cleandoc
from itertools import cycle
from typing import Any

import altair as alt

from . import tables
from .charts import CATEGORIES, FAINT, WIDTH, Chart, Figure, curve, rule, slider
from .reading import Row, Run

FEW_TICKS = alt.Axis(grid=False, tickCount=5, tickMinStep=1)


def rank_map(run: Run, rows: list[Row]) -> Chart:
    """Each cell is a module, its number the rank: move the slider to see it grow, and look for rows and columns that
    stay dark."""
    where, most = tables.grid_of(run), max(row["rank"] for row in rows)
    cell = max(16, min(56, 600 // len(where.layers)))
    width, height = alt.Step(cell), alt.Step(30)
    shown = alt.Chart(alt.Data(values=rows)).transform_filter("datum.since <= step && step < datum.until")
    angle = -90 if any("." in layer for layer in where.layers) else 0  # "decoder.block.3" is long
    layer = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=angle)).scale(domain=where.layers, padding=0.06)
    plain = alt.Axis(ticks=False, domain=False)
    kind = alt.Y("type:N", title=None, axis=plain).scale(domain=where.types, padding=0.06)
    color = alt.Color("rank:Q", scale=alt.Scale(scheme="viridis", domain=[0, most]), legend=None)
    tooltip = ["layer:N", "type:N", "rank:Q", alt.Tooltip("since:Q", title="since step")]
    ink = alt.condition(f"datum.rank > {0.62 * most}", alt.value("black"), alt.value("white"))  # by brightness
    numbers = shown.mark_text(fontSize=9 if cell < 24 else 12).encode(text="rank:Q", color=ink)
    cells = shown.mark_rect(cornerRadius=2).encode(color=color, tooltip=tooltip) + numbers
    total = alt.Axis(grid=False, tickCount=3, title="ranks in all", tickMinStep=1)
    bar = shown.mark_bar(color=FAINT, cornerRadiusEnd=2)
    return alt.concat(
        cells.encode(layer, kind).properties(width=width, height=height),
        bar.encode(alt.X("sum(rank):Q", axis=total), kind.axis(None)).properties(width=100, height=height),
        bar.encode(layer, alt.Y("sum(rank):Q", axis=total)).properties(width=width, height=60),
        columns=2, spacing=12,
    ).add_params(slider("step", 0, run.steps))  # fmt: skip


def growth(run: Run, rows: list[Row]) -> Chart:
    """A module type whose line leaves the others behind is where training asked for capacity. At a dashed line the
    budget was spent."""
    look = {"width": WIDTH - 140, "height": 220, "interpolate": "step-after"}
    lines = curve(rows, 0, run.steps, "mean rank per module", zero=True, **look)
    return mark_spent(lines.encode(color=alt.Color("type:N", title=None, sort=None)), run)


def learning(run: Run, names: list[str]) -> Chart:
    """The faint line is the loss of each step, the strong one the mean around it (a dotted one what ignoring the input
    reaches): see what growth changed, and whether the metric was still moving at the end. At a dashed line the budget
    was spent."""
    panels = []
    for name, color in zip(names, cycle(CATEGORIES)):
        rows = tables.column(run, name)
        if name == "loss":
            raw = curve(rows, 0, run.steps, "training loss", height=180, opacity=0.3, strokeWidth=1)
            mean = curve(tables.smoothed(rows), 0, run.steps, "training loss", height=180)
            tooltip = alt.Tooltip("value:Q", title="mean loss around it", format=".4")
            panel = raw + mean.encode(tooltip=["step:Q", tooltip])
        else:
            panel = curve(rows, 0, run.steps, name, height=120, point=True).encode(color=alt.value(color))
        if (baseline := run.number("metrics", "baseline", name)) is not None:
            panel += rule(f"without the input: {baseline:.4g}", y=baseline, color=color, dash=(2, 3))
        panels.append(mark_spent(panel, run))
    return alt.vconcat(*panels, spacing=14)


def budget(run: Run, rows: list[Row]) -> Chart:
    """The area under a curve is what the run trained: below the dashed line, less than a fixed rank."""
    panels = []
    for name, title in {"ranks": "active ranks", "parameters": "live adapter parameters"}.items():
        panel = curve(tables.stairs(run, name), 0, run.steps, title, zero=True, width=(WIDTH - 80) // 2, height=160)
        panel = panel.mark_area(interpolate="step-after", line=True, fillOpacity=0.25)
        if (target := run.number("budget", f"{name}_target")) is not None:
            panel += rule(f"budget: {target:,.0f}", y=target, color=CATEGORIES[3])
        panels.append(panel)
    return alt.hconcat(*panels, spacing=30)


def mark_spent(figure: Chart, run: Run) -> Chart:
    """The figure with a line where the budget was spent."""
    step = tables.spent_at(run)
    return figure if step is None else figure + rule(f"budget spent at step {step}", x=step)


def newborns(run: Run, rows: list[Row]) -> Chart:
    """One line per birth: the share of the learning rate that its tensors got; where it reaches 1 they learn at full
    speed."""
    steps, look = [row["step"] for row in rows], {"width": WIDTH - 80, "height": 150, "point": {"size": 14}}
    lines = curve(rows, min(steps), max(steps), "learning-rate factor", zero=True, **look)
    color = alt.Color("born:Q", legend=alt.Legend(title="born after step", tickMinStep=1))
    tooltip = ["born:Q", "step:Q", alt.Tooltip("value:Q", title="factor", format=".3")]
    return lines.encode(color=color, detail="born:N", tooltip=tooltip)


# -- a panel per module type, a colour per layer -----------------------------------------------------------------------


def scores(run: Run, rows: list[Row]) -> Chart:
    """A line is the importance of one module, a dot a grant of ranks: grants should sit on the highest lines of their
    step."""
    last = max(step for row in rows for step in row["step"])
    step = alt.X("step:Q", title="training step", scale=alt.Scale(domain=[0, max(1, last)], nice=False), axis=FEW_TICKS)
    base = panel(run, step, powers(rows, "importance", "importance"))
    line = base.transform_filter("!datum.granted").mark_line(strokeWidth=1.5, clip=True).encode(detail="layer:O")
    dot = base.transform_filter("datum.granted").mark_circle(size=55, opacity=1)
    tooltip = ["type:N", "layer:N", "step:Q", "granted:Q", "rank:Q", alt.Tooltip("importance:Q", format=".3")]
    return facets(alt.layer(line, dot.encode(tooltip=tooltip)).transform_flatten(["step", "importance"]), rows)


def spectra(run: Run, rows: list[Row]) -> Chart:
    """Singular values of each ΔW, largest first: a line that falls off steeply uses few of its ranks, a flat one might
    use more."""
    now = slider("at", min(row["since"] for row in rows), max(row["since"] for row in rows))
    most = max(len(row["sigma"]) for row in rows)
    index = alt.X("index:Q", title="component", scale=alt.Scale(domain=[1, max(2, most)]), axis=FEW_TICKS)
    shown = panel(run, index, powers(rows, "sigma", "singular value"))
    shown = shown.transform_filter("datum.since <= at && at < datum.until").transform_flatten(["index", "sigma"])
    lines = shown.mark_line(strokeWidth=1.5, point={"size": 16})
    tooltip = ["type:N", "layer:N", "index:Q", alt.Tooltip("sigma:Q", format=".3")]
    return facets(lines.encode(tooltip=tooltip), rows).add_params(now)


def panel(run: Run, *encodings: Any) -> Chart:
    """A chart of one module type, without its data."""
    where = tables.grid_of(run)
    legend = alt.Legend(title="layer", columns=1 + len(where.layers) // 20)
    color = alt.Color("layer:O", scale=alt.Scale(domain=where.layers), legend=legend)
    return alt.Chart(width=(WIDTH - 120) // min(3, len(where.types)), height=130).encode(*encodings, color)


def powers(rows: list[Row], name: str, title: str) -> Any:
    """A logarithmic axis over all values of a column of lists, and a little more."""
    values = [value for row in rows for value in row[name]]
    scale = alt.Scale(type="log", domain=[min(values) / 1.2, max(values) * 1.2], nice=False)
    axis = alt.Axis(grid=False, ticks=False, tickCount=4, format=".0e")
    return alt.Y(f"{name}:Q", title=title, scale=scale, axis=axis)


def facets(figure: Chart, rows: list[Row]) -> Chart:
    """The chart of these rows for every module type, in their order."""
    facet = alt.Facet("type:N", title=None, sort=alt.EncodingSortField("place", op="min"))
    data = alt.Data(values=[row | {"place": i} for i, row in enumerate(rows)])
    return figure.facet(facet, data=data, columns=3, spacing=18)


DRAWN: list[tuple[str, Any, Any]] = [  # title, from the run to the rows, from both to the chart
    ("Where the rank went", tables.rank_cells, rank_map),
    ("When it grew", tables.growth, growth),
    ("Did it help", lambda run: [name for name in ("loss", *run.metric_names) if run.column(name)], learning),
    ("What it cost", partial(tables.stairs, name="ranks"), budget),
    ("Why there", tables.scores, scores),
    ("How newborn ranks started", tables.birth_rates, newborns),
    ("What the ranks do", tables.spectra, spectra),
]
FIGURES = [Figure(draw.__name__, title, cleandoc(draw.__doc__ or ""), rows, draw) for title, rows, draw in DRAWN]


def compared(runs: Sequence[Run]) -> list[Figure]:
    """Figures of several runs, a colour per run: loss, the main metric of each task, and the budget."""

    def figure(name: str, title: str, caption: str, rows: Callable[[Run], list[Row]], **look: Any) -> Figure:
        found = [row | {"run": run.label} for run in runs for row in rows(run)]
        return Figure(name, title, caption, lambda runs: found, partial(curves, title=title, **look))

    metrics = dict.fromkeys(run.metric_names[0] for run in runs if run.metric_names)
    return [
        figure("loss", "Training loss", "Means around each step: the lower curve learns faster.",
               lambda run: tables.smoothed(tables.column(run, "loss"))),
        *(
            figure(f"metric{i}", name, "Measured at a few steps: compare the ends, and how early they are reached.",
                   partial(tables.column, name=name), point=True)
            for i, name in enumerate(metrics)
        ),
        figure("parameters", "Live adapter parameters", "The area under a curve is the cost of its run.",
               partial(tables.stairs, name="parameters"), zero=True, interpolate="step-after"),
    ]  # fmt: skip


def curves(runs: Sequence[Run], rows: list[Row], *, title: str, **look: Any) -> Chart:
    lines = curve(rows, 0, max(run.steps for run in runs), title, width=WIDTH - 140, height=200, **look)
    return lines.encode(color=alt.Color("run:N", title=None, scale=alt.Scale(domain=[run.label for run in runs])))
