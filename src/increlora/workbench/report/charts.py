"""What the figures share: sizes, colours, sliders, dashed lines, and our style.

Names from outside occur as data values only, never as field names or in expressions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from .reading import Row

Chart = Any  # altair's chart classes share no useful base

WIDTH = 760  # of a figure with one panel
CATEGORIES = ["#3b8fd6", "#e08f00", "#13a073", "#d9603b", "#b678c4", "#8a9a2e", "#5f6bd0", "#9a8f86"]
FAINT = "#8d939a"
# Of lines, from first to last: unlike viridis, legible on white and on black to its ends.
SEQUENCE = ["#8a4be0", "#3f7fe0", "#12a08c", "#c2960f", "#e5682e"]
FONT = "system-ui, sans-serif"  # Vega measures text to place it: no `inherit`


@dataclass(frozen=True)
class Figure:
    """A figure of one run or several: its file name, its title, one sentence on what to look at, the rows that it is
    made from, and how to draw them."""

    name: str
    title: str
    caption: str
    rows: Callable[[Any], list[Any]]
    plot: Callable[[Any, list[Any]], Chart]

    def draw(self, what: Any) -> Chart | None:
        """None where there is nothing to draw."""
        rows = self.rows(what)
        return self.plot(what, rows) if rows else None


def curve(rows: list[Row], first: int, last: int, title: str, *, zero: bool = False, **look: Any) -> Chart:
    """A line over training steps; `look`: width and height of the panel, and how the line is drawn."""
    scale = alt.Scale(domain=[first, max(first + 1, last)], nice=False)
    axis = alt.Axis(grid=False, tickMinStep=1, tickCount=10, labelOverlap=True)
    panel = alt.Chart(alt.Data(values=rows), width=look.pop("width", WIDTH), height=look.pop("height"))
    return panel.mark_line(**look).encode(
        alt.X("step:Q", title="training step", scale=scale, axis=axis),
        alt.Y("value:Q", title=title, scale=alt.Scale(zero=zero), axis=alt.Axis(tickCount=5)),
    )


def slider(name: str, start: int, stop: int) -> Any:
    """A variable that a slider under the figure moves over the steps of the run; it starts at the end."""
    bind = alt.binding_range(min=start, max=stop, step=1, name="training step")
    return alt.param(name=name, value=stop, bind=bind)


def rule(what: str, *, color: str = FAINT, dash: Sequence[int] = (4, 4), **place: Any) -> Chart:
    """A dashed line across a panel, at its `x` or `y`; `what` is shown under the pointer."""
    mark = alt.Chart().mark_rule(strokeDash=list(dash), color=color, size=2)
    return mark.encode(tooltip=alt.value(what), **{axis: alt.datum(value) for axis, value in place.items()})


def themed(figure: Chart, *, ink: str, background: str) -> Chart:
    """The chart in our style; in a page the ink is the text colour of wherever it stands."""
    lines = {"domainColor": ink, "tickColor": ink, "gridColor": ink}
    faint = {"domainOpacity": 0.35, "tickOpacity": 0.35, "gridOpacity": 0.1}
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"}
    text |= {"labelLimit": 220}  # in pixels: longer ones end in an ellipsis
    return figure.configure(
        background=background,
        font=FONT,
        axis=lines | faint | text,
        legend=text | {"symbolLimit": 40},
        header=text | {"labelAnchor": "start", "labelFontSize": 12, "labelFontWeight": "bold"},
        view={"stroke": None},
        mark={"color": CATEGORIES[0], "tooltip": True},
        line={"strokeWidth": 2},
        point={"size": 45},
        range={"category": CATEGORIES, "ordinal": {"scheme": SEQUENCE}, "ramp": {"scheme": SEQUENCE}},
    )
