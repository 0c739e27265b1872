"""What the figures share: sizes, colours, axes, sliders.

Names from outside occur as data values only, never as field names or in expressions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from . import tables
from .reading import Row, Run

Chart = Any  # altair's chart classes share no useful base

WIDTH = 760  # of a figure with one panel
CATEGORIES = ["#3b8fd6", "#e08f00", "#13a073", "#d9603b", "#b678c4", "#8a9a2e", "#5f6bd0", "#9a8f86"]
ACCENT, FAINT = CATEGORIES[0], "#8d939a"
SEQUENCE = ["#4a6fe3", "#1fa187", "#d9900a"]  # of lines: unlike viridis, legible on white and on black to its ends
LABEL = 220  # longest label in pixels; longer ones end in an ellipsis


@dataclass(frozen=True)
class Figure:
    """A figure: its file name, title, one sentence on what to look at, how to draw one run or several (None: nothing
    to draw), and whether a dashed line marks in it where the budget was spent."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any], Chart | None]
    marked: bool = False


def chart(rows: Sequence[Row], **properties: Any) -> Chart:
    return alt.Chart(alt.Data(values=list(rows)), **properties)


def steps(run: Run) -> Any:
    scale = alt.Scale(domain=[0, max(1, run.steps)], nice=False)
    axis = alt.Axis(grid=False, tickMinStep=1, tickCount=10, labelOverlap=True)
    return alt.X("step:Q", title="training step", scale=scale, axis=axis)


def categories(field: str, names: Sequence[str], title: str | None) -> Any:
    """A colour per name, with the names in a legend."""
    colors = [CATEGORIES[i % len(CATEGORIES)] for i in range(len(names))]
    legend = alt.Legend(title=title, labelLimit=LABEL, symbolLimit=40)
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names), range=colors), legend=legend)


def slider(name: str, start: int, stop: int) -> Any:
    """A variable that a slider under the figure moves over the steps of the run; it starts at the end."""
    bind = alt.binding_range(min=start, max=stop, step=1, name="training step")
    return alt.param(name=name, value=stop, bind=bind)


def mark_spent(figure: Chart, run: Run) -> Chart:
    """The figure with a rule where the budget was spent."""
    step = tables.spent_at(run)
    if step is None:
        return figure
    rule = chart([{"step": step, "what": f"budget spent at step {step}"}]).mark_rule(
        strokeDash=[4, 4], color=FAINT, size=1.5
    )
    return figure + rule.encode(x=steps(run), tooltip=alt.Tooltip("what:N", title=" "))


def shades(count: int) -> list[str]:
    """So many colours along SEQUENCE."""
    anchors = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in SEQUENCE]
    places = [2 * i / max(1, count - 1) for i in range(count)]
    pairs = [(anchors[min(1, int(x))], anchors[min(1, int(x)) + 1], x - min(1, int(x))) for x in places]
    return ["#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(u, v, strict=True)) for u, v, t in pairs]
