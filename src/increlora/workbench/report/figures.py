"""The figures of a run, and of several together: Vega-Lite charts, the same for the page, PNG and SVG."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import altair as alt

from . import tables
from .charts import ACCENT, CATEGORIES, FAINT, LABEL, WIDTH, Chart, Figure, categories, chart, mark_spent, slider, steps
from .panels import newborns, scores, spectra
from .reading import Row, Run


def rank_map(run: Run) -> Chart | None:
    """Cells with their rank, and beside them the sums by module type and by layer, at the step of the slider."""
    rows = tables.rank_cells(run)
    if not rows:
        return None
    where, most = tables.grid_of(run), max(row["rank"] for row in rows)
    cell = max(16, min(56, 600 // len(where.layers)))
    width, height = cell * len(where.layers), 30 * len(where.types)
    shown = chart(rows).transform_filter("datum.since <= step && step < datum.until")
    layers, types = (alt.Scale(domain=list(names), padding=0.06) for names in (where.layers, where.types))
    layer = alt.X("layer:O", title="layer", scale=layers, axis=alt.Axis(labelAngle=0))
    kind = alt.Y("type:N", title=None, scale=types, axis=alt.Axis(labelLimit=LABEL, ticks=False, domain=False))
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


def growth(run: Run) -> Chart | None:
    rows = tables.growth(run)
    if not rows:
        return None
    lines = chart(rows, width=WIDTH - 140, height=220).mark_line(interpolate="step-after", strokeWidth=2)
    lines = lines.encode(
        steps(run), alt.Y("rank:Q", title="mean rank per module"),
        categories("type", tables.grid_of(run).types, None),
        tooltip=[alt.Tooltip("type:N"), alt.Tooltip("step:Q"), alt.Tooltip("rank:Q", title="mean rank")],
    )  # fmt: skip
    return mark_spent(lines, run)


def learning(run: Run) -> Chart | None:
    """The loss, and each metric with the value that a model reaches which ignores its input."""
    panels = []
    if rows := tables.column(run, "loss"):
        value = alt.Y("value:Q", title="training loss", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
        raw = chart(rows, width=WIDTH, height=180).mark_line(color=ACCENT, opacity=0.3, strokeWidth=1)
        mean = chart(tables.smoothed(rows)).mark_line(color=ACCENT, strokeWidth=2)
        tooltip = [alt.Tooltip("step:Q"), alt.Tooltip("value:Q", title="mean loss around it", format=".4")]
        panels.append(raw.encode(steps(run), value) + mean.encode(steps(run), value, tooltip=tooltip))
    for i, name in enumerate(run.metric_names):
        color = CATEGORIES[1 + i % (len(CATEGORIES) - 1)]
        points = chart([{"step": row["step"], "value": row[name]} for row in run.metrics if name in row],
                       width=WIDTH, height=120)  # fmt: skip
        value = alt.Y("value:Q", title=name, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))
        line = points.mark_line(point=alt.OverlayMarkDef(size=45, color=color), color=color)
        line = line.encode(steps(run), value, tooltip=["step:Q", "value:Q"])
        if (baseline := run.number("metrics", "baseline", name)) is not None:
            line += chart([{"value": baseline}]).mark_rule(color=color, strokeDash=[2, 3]).encode(y="value:Q")
        panels.append(line)
    return alt.vconcat(*(mark_spent(panel, run) for panel in panels), spacing=14) if panels else None


def budget(run: Run) -> Chart | None:
    panels = []
    for name, title in {"ranks": "active ranks", "parameters": "live adapter parameters"}.items():
        if rows := tables.stairs(run, name):
            area = chart(rows, width=(WIDTH - 80) // 2, height=160).mark_area(
                interpolate="step-after", line={"color": ACCENT}, color=ACCENT, fillOpacity=0.25
            )
            value = alt.Y("value:Q", title=title, axis=alt.Axis(tickCount=5))
            panel = area.encode(steps(run), value, tooltip=["step:Q", "value:Q"])
            if (target := run.number("budget", f"{name}_target")) is not None:
                rule = chart([{"value": target, "what": f"budget: {target:,.0f}"}])
                rule = rule.mark_rule(color=CATEGORIES[3], strokeDash=[5, 3], size=2)
                panel += rule.encode(y="value:Q", tooltip=alt.Tooltip("what:N", title=" "))
            panels.append(panel)
    return alt.hconcat(*panels, spacing=30) if panels else None


POINT = alt.OverlayMarkDef(size=45)
FIGURES = (
    Figure(
        "rank_map", "Where the rank went",
        "Each cell is a module, its number the rank: move the slider to see it grow, and look for rows and columns "
        "that stay dark.", rank_map,
    ),
    Figure(
        "growth", "When it grew",
        "A module type whose line leaves the others behind is where training asked for capacity.", growth, marked=True,
    ),
    Figure(
        "learning", "Did it help",
        "The faint line is the loss of each step, the strong one the mean around it (a dotted one what ignoring the "
        "input reaches): see what growth changed, and whether the metric was still moving at the end.",
        learning, marked=True,
    ),
    Figure(
        "budget", "What it cost",
        "The area under a curve is what the run trained: below the dashed line, less than a fixed rank.",
        budget,
    ),
    Figure(
        "scores", "Why there",
        "A line is the importance of one module, a dot a grant of ranks: grants should sit on the highest lines of "
        "their step.", scores,
    ),
    Figure(
        "newborns", "How newborn ranks started",
        "One line per birth: the share of the learning rate that its tensors got; where it reaches 1 they learn at "
        "full speed.", newborns,
    ),
    Figure(
        "spectra", "What the ranks do",
        "Singular values of each ΔW, largest first: a line that falls off steeply uses few of its ranks, a flat one "
        "might use more.", spectra,
    ),
)  # fmt: skip


def compared(runs: Sequence[Run]) -> list[Figure]:
    """Figures of several runs, a colour per run: loss, the main metric of each task, and the budget."""
    metrics = dict.fromkeys(run.metric_names[0] for run in runs if run.metric_names)
    loss = partial(curves, rows=lambda run: tables.smoothed(tables.column(run, "loss")), title="training loss")
    costs = partial(curves, rows=partial(tables.stairs, name="parameters"), title="parameters", zero=True,
                    interpolate="step-after")  # fmt: skip
    return [
        Figure("loss", "Training loss", "Means around each step: the lower curve learns faster.", loss),
        *(
            Figure(f"metric{i}", name, "Measured at a few steps: compare the ends, and how early they are reached.",
                   partial(curves, rows=partial(tables.column, name=name), title=name, point=POINT))
            for i, name in enumerate(metrics)
        ),
        Figure("parameters", "Live adapter parameters", "The area under a curve is the cost of its run.", costs),
    ]  # fmt: skip


def curves(
    runs: Sequence[Run], *, rows: Callable[[Run], list[Row]], title: str, zero: bool = False, **mark: Any
) -> Chart | None:
    """`rows` of every run as a curve."""
    found = [row | {"run": run.label} for run in runs for row in rows(run)]
    if not found:
        return None
    return (
        chart(found, width=WIDTH - 140, height=200)
        .mark_line(strokeWidth=2, **mark)
        .encode(
            alt.X("step:Q", title="training step", axis=alt.Axis(grid=False, tickMinStep=1)),
            alt.Y("value:Q", title=title, scale=alt.Scale(zero=zero)),
            categories("run", [run.label for run in runs], None),
            tooltip=["run:N", "step:Q", "value:Q"],
        )
    )
