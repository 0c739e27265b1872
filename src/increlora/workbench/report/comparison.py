"""Figures of several runs together: a colour per run."""

from collections.abc import Sequence
from functools import partial

import altair as alt

from . import tables
from .charts import WIDTH, Chart, Figure, categories, chart
from .reading import Row, Run


def compared(runs: Sequence[Run]) -> list[Figure]:
    """Loss, the main metric of each task, and the budget."""
    metrics = dict.fromkeys(run.metric_names[0] for run in runs if run.metric_names)
    return [
        Figure("loss", "Training loss", "Means around each step: the lower curve learns faster.", losses),
        *(
            Figure(f"metric{i}", name, "Measured at a few steps: compare the ends, and how early they are reached.",
                   partial(measurements, name=name))
            for i, name in enumerate(metrics)
        ),
        Figure("parameters", "Live adapter parameters", "The area under a curve is the cost of its run.", costs),
    ]  # fmt: skip


def losses(runs: Sequence[Run]) -> Chart | None:
    rows = [row | {"run": run.label} for run in runs for row in tables.smoothed(tables.column(run, "loss"))]
    return lines(runs, rows, "training loss").mark_line(strokeWidth=2) if rows else None


def measurements(runs: Sequence[Run], name: str) -> Chart | None:
    rows = [row | {"run": run.label} for run in runs for row in tables.column(run, name)]
    return lines(runs, rows, name).mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=45)) if rows else None


def costs(runs: Sequence[Run]) -> Chart | None:
    rows = [row | {"run": run.label} for run in runs for row in tables.stairs(run, "parameters")]
    drawn = lines(runs, rows, "parameters", zero=True) if rows else None
    return drawn and drawn.mark_line(strokeWidth=2, interpolate="step-after")


def lines(runs: Sequence[Run], rows: Sequence[Row], title: str, *, zero: bool = False) -> Chart:
    return chart(rows, width=WIDTH - 140, height=200).encode(
        alt.X("step:Q", title="training step", axis=alt.Axis(grid=False, tickMinStep=1)),
        alt.Y("value:Q", title=title, scale=alt.Scale(zero=zero)),
        categories("run", [run.label for run in runs], None),
        tooltip=["run:N", "step:Q", "value:Q"],
    )
