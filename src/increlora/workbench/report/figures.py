"""The figures of one run: Vega-Lite charts, the same for the page, PNG and SVG."""

from collections.abc import Sequence

import altair as alt

from . import tables
from .charts import ACCENT, CATEGORIES, FAINT, LABEL, WIDTH, Chart, Figure, categories, chart, mark_spent, slider, steps
from .panels import newborns, scores, spectra
from .reading import Row, Run

# -- where and when ---------------------------------------------------------------------------------------------------


def rank_map(run: Run) -> Chart | None:
    """Cells with their rank, and beside them the sums by module type and by layer, at the step of the slider."""
    rows = tables.rank_cells(run)
    if not rows:
        return None
    where = tables.grid_of(run)
    cell = max(16, min(56, 600 // len(where.layers)))
    width, height = cell * len(where.layers), 30 * len(where.types)
    shown = chart(rows).transform_filter("datum.since <= step && step < datum.until")
    layers, types = (alt.Scale(domain=list(names), padding=0.06) for names in (where.layers, where.types))
    layer = alt.X("layer:O", title="layer", scale=layers, axis=alt.Axis(labelAngle=0))
    kind = alt.Y("type:N", title=None, scale=types, axis=alt.Axis(labelLimit=LABEL, ticks=False, domain=False))
    total = alt.Axis(grid=False, tickCount=3, title="ranks in all", tickMinStep=1)
    bar = shown.mark_bar(color=FAINT, cornerRadiusEnd=2)
    return alt.concat(
        shaded_cells(shown, max(row["rank"] for row in rows), small=cell < 24)
        .encode(layer, kind).properties(width=width, height=height),
        bar.encode(alt.X("sum(rank):Q", axis=total), kind.axis(None)).properties(width=100, height=height),
        bar.encode(layer, alt.Y("sum(rank):Q", axis=total)).properties(width=width, height=60),
        columns=2, spacing=12,
    ).add_params(slider("step", 0, run.steps))  # fmt: skip


def shaded_cells(shown: Chart, most: int, *, small: bool) -> Chart:
    """A coloured cell per module and its rank on it, black where the colour is bright."""
    color = alt.Color("rank:Q", scale=alt.Scale(scheme="viridis", domain=[0, most]), legend=None)
    tooltip = ["layer:N", "type:N", "rank:Q", alt.Tooltip("since:Q", title="since step")]
    ink = alt.condition(f"datum.rank > {0.62 * most}", alt.value("black"), alt.value("white"))
    numbers = shown.mark_text(fontSize=9 if small else 12).encode(text="rank:Q", color=ink)
    return shown.mark_rect(cornerRadius=2).encode(color=color, tooltip=tooltip) + numbers


def growth(run: Run) -> Chart | None:
    rows = tables.growth(run)
    if not rows:
        return None
    where = tables.grid_of(run)
    lines = chart(rows, width=WIDTH - 140, height=220).mark_line(interpolate="step-after", strokeWidth=2)
    lines = lines.encode(
        steps(run), alt.Y("rank:Q", title="mean rank per module"), categories("type", where.types, None),
        tooltip=[alt.Tooltip("type:N"), alt.Tooltip("step:Q"), alt.Tooltip("rank:Q", title="mean rank")],
    )  # fmt: skip
    return mark_spent(lines, run)


# -- did it help, and what did it cost ---------------------------------------------------------------------------------


def learning(run: Run) -> Chart | None:
    losses = tables.column(run, "loss")
    panels = [mark_spent(loss_panel(run, losses), run)] if losses else []
    panels += [mark_spent(metric_panel(run, name, i), run) for i, name in enumerate(run.metric_names)]
    return alt.vconcat(*panels, spacing=14) if panels else None


def metric_panel(run: Run, name: str, number: int) -> Chart:
    """One metric at the steps where it was measured, and dotted what a model reaches that ignores its input."""
    color = CATEGORIES[1 + number % (len(CATEGORIES) - 1)]
    rows = [{"step": row["step"], "value": row[name]} for row in run.metrics if name in row]
    line = chart(rows, width=WIDTH, height=120).mark_line(point=alt.OverlayMarkDef(size=45, color=color), color=color)
    value = alt.Y("value:Q", title=name, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))
    line = line.encode(steps(run), value, tooltip=["step:Q", "value:Q"])
    baseline = run.number("metrics", "baseline", name)
    if baseline is None:
        return line
    return line + chart([{"value": baseline}]).mark_rule(color=color, strokeDash=[2, 3]).encode(y="value:Q")


def loss_panel(run: Run, rows: Sequence[Row]) -> Chart:
    value = alt.Y("value:Q", title="training loss", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    raw = chart(rows, width=WIDTH, height=180).mark_line(color=ACCENT, opacity=0.3, strokeWidth=1)
    mean = chart(tables.smoothed(rows)).mark_line(color=ACCENT, strokeWidth=2)
    tooltip = [alt.Tooltip("step:Q"), alt.Tooltip("value:Q", title="mean loss around it", format=".4")]
    return raw.encode(steps(run), value) + mean.encode(steps(run), value, tooltip=tooltip)


def budget(run: Run) -> Chart | None:
    panels = [
        budget_panel(run, name, title, run.number("budget", f"{name}_target"))
        for name, title in {"ranks": "active ranks", "parameters": "live adapter parameters"}.items()
        if tables.stairs(run, name)
    ]
    return alt.hconcat(*panels, spacing=30) if panels else None


def budget_panel(run: Run, name: str, title: str, target: float | None) -> Chart:
    used = chart(tables.stairs(run, name), width=(WIDTH - 80) // 2, height=160).mark_area(
        interpolate="step-after", line={"color": ACCENT}, color=ACCENT, fillOpacity=0.25
    )
    used = used.encode(
        steps(run), alt.Y("value:Q", title=title, axis=alt.Axis(tickCount=5)), tooltip=["step:Q", "value:Q"]
    )
    if target is None:
        return used
    rule = chart([{"value": target, "what": f"budget: {target:,.0f}"}]).mark_rule(
        color=CATEGORIES[3], strokeDash=[5, 3], size=2
    )
    return used + rule.encode(y="value:Q", tooltip=alt.Tooltip("what:N", title=" "))


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
