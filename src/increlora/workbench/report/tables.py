"""From the rows of a run to the rows of its figures: small tables with plain column names."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from statistics import fmean
from typing import Any

from ...naming import Grid, grid
from .reading import Row, Run, numbers

POINTS = 600  # of a curve: more than a screen shows
VALUES = 20_000  # of the figures with a curve per module


def grid_of(run: Run) -> Grid:
    """The modules of a run, whichever of its files names them."""
    return grid([*rank_changes(run), *(name for row in run.spectra for name in row["modules"])])


def rank_changes(run: Run) -> dict[str, list[tuple[int, int]]]:
    """(step, rank from then on) per module: from the trace, or from the events where a run has none."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in run.trace:
        for name, module in row["modules"].items():
            found[name].append((row["step"], module["rank"]))
    return {name: changes_only(values) for name, values in found.items()} or changes_by_events(run)


def changes_by_events(run: Run) -> dict[str, list[tuple[int, int]]]:
    """The same from events, which hold the change and the rank after it: the first one also gives the rank before."""
    ranks = run.get("ranks")
    found = {n: [(0, int(rank))] for n, rank in numbers(ranks if isinstance(ranks, Mapping) else {}).items()}
    changed: dict[str, list[tuple[int, int]]] = {}
    for row in run.events:
        if row["ranks"]:
            before = (0, row["rank"] - row["ranks"])
            changed.setdefault(row["module"], [before]).append((row["step"], row["rank"]))
    return found | changed


def changes_only(values: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The first value and those that differ from the one before."""
    return [next(same) for _, same in groupby(values, key=itemgetter(1))]


def rank_cells(run: Run) -> list[Row]:
    """A row per module and rank it had: {"layer", "type", "rank", "since", "until"}, true for since ≤ step < until."""
    cells = grid_of(run).cells
    return [
        cells[name]._asdict() | {"rank": rank, "since": since, "until": until}
        for name, values in rank_changes(run).items()
        for (since, rank), (until, _) in pairwise([*values, (run.steps + 1, 0)])
    ]


def growth(run: Run) -> list[Row]:
    """Mean rank per module type at every step where one changed, and at the end: {"step", "type", "value"}."""
    by_type, rows = defaultdict(list), []
    for cell in rank_cells(run):
        by_type[cell["type"]].append(cell)
    for kind, cells in by_type.items():
        for step in sorted({cell["since"] for cell in cells} | {run.steps}):
            rank = fmean(cell["rank"] for cell in cells if cell["since"] <= step < cell["until"])
            rows.append({"step": step, "type": kind, "value": round(rank, 3)})
    return rows


def spent_at(run: Run) -> int | None:
    """Step after which the budget was spent; None if it never grew or is not spent."""
    return next((row["step"] for row in run.events if row["kind"] == "finish"), None)


def column(run: Run, name: str) -> list[Row]:
    """{"step", "value"} of one column of metrics.jsonl, thinned."""
    return thin([{"step": row["step"], "value": row[name]} for row in run.metrics if name in row], POINTS)


def smoothed(rows: Sequence[Row]) -> list[Row]:
    """Mean of the values around each, over a twentieth of the curve."""
    half = max(1, len(rows) // 40)
    values = [row["value"] for row in rows]
    return [row | {"value": fmean(values[max(0, i - half) : i + half + 1])} for i, row in enumerate(rows)]


def stairs(run: Run, name: str) -> list[Row]:
    """The same for a column that changes seldom: its changes, and the end."""
    rows = [(row["step"], row[name]) for row in run.metrics if name in row]
    return [{"step": s, "value": v} for s, v in dict.fromkeys(changes_only(rows) + rows[-1:])]


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spaced, the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def scores(run: Run) -> list[Row]:
    """A row per module, {"layer", "type", "step": […], "importance": […]}, until the budget was spent; and one per
    grant of ranks, of the same columns and "granted", "rank"."""
    end, cells = spent_at(run) or run.steps, grid_of(run).cells
    rows = [row for row in run.trace if row["step"] <= end]
    found = []
    for name, cell in cells.items():
        points = [(row["step"], row["modules"].get(name, {}).get("importance") or 0) for row in rows]
        if points := thin([(step, value) for step, value in points if value > 0], max(2, VALUES // len(cells))):
            steps, values = zip(*points, strict=True)
            found.append(cell._asdict() | {"step": steps, "importance": values})
    for event in run.events:
        if event["kind"] == "birth" and event["module"] in cells and event["importance"]:
            grant = {"step": [event["step"]], "importance": [event["importance"]]}
            found.append(cells[event["module"]]._asdict() | {"granted": event["ranks"], "rank": event["rank"]} | grant)
    return found


def birth_rates(run: Run) -> list[Row]:
    """{"born", "step", "value"}: learning-rate factor of the tensors born after step `born`, until none changes."""
    rows = [
        {"born": born, "step": row["step"], "value": factor}
        for row in run.trace
        for born, factor in row["lr_factor"].items()
    ]
    last = {row["born"]: row["value"] for row in rows}
    settled = max((row["step"] for row in rows if row["value"] != last[row["born"]]), default=0)
    return [row for row in rows if row["step"] <= settled + max(2, settled // 10)]


def spectra(run: Run) -> list[Row]:
    """{"layer", "type", "since", "until", "index": […], "sigma": […]}: singular values of ΔW above rounding errors."""
    values = sum(len(sigma) for row in run.spectra[-1:] for sigma in row["modules"].values())
    taken = thin(run.spectra, max(2, VALUES // max(1, values)))
    cells, rows = grid_of(run).cells, []
    for row, after in pairwise([*taken, {"step": run.steps + 1}]):
        for name, sigma in row["modules"].items():
            if large := [value for value in sigma if value > 1e-6 * max(sigma)]:
                shown = {"since": row["step"], "until": after["step"], "index": list(range(1, len(large) + 1))}
                rows.append(cells[name]._asdict() | shown | {"sigma": large})
    return rows
