"""From the rows of a run to the rows of its figures: small tables with plain column names."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, TypeVar

from ...naming import place, short
from .reading import Row, Run, numbers

POINTS = 600  # of a curve: more than a screen shows
VALUES = 20_000  # of the figures with a curve per module
Item = TypeVar("Item")


@dataclass(frozen=True)
class Grid:
    """Where the modules of a run are: (layer, module type) by name, and the layers and types in model order."""

    cells: Mapping[str, tuple[str, str]]
    layers: Sequence[str]
    types: Sequence[str]

    def row(self, name: str, **values: Any) -> Row:
        """A row about a module."""
        layer, kind = self.cells[name]
        return {"layer": layer, "type": kind, **values}


def grid(names: Iterable[str]) -> Grid:
    """Types are named as shortly as is unambiguous; two modules never share a cell (an encoder's and a decoder's)."""
    places = {name: place(name) for name in names}
    shared = Counter(places.values())
    for name, (layer, kind) in places.items():
        if shared[layer, kind] > 1:
            places[name] = (layer, name.replace(f".{layer}.", ".", 1))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    label = dict(zip(kinds, short(kinds), strict=True))
    found = dict.fromkeys(layer for layer, _ in places.values())
    layers = sorted(found, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0))
    return Grid({n: (layer, label[kind]) for n, (layer, kind) in places.items()}, layers, list(label.values()))


def grid_of(run: Run) -> Grid:
    return grid(rank_changes(run))


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
    return [pair for i, pair in enumerate(values) if i == 0 or pair[1] != values[i - 1][1]]


def rank_cells(run: Run) -> list[Row]:
    """A row per module and rank it had: {"layer", "type", "rank", "since", "until"}, true for since ≤ step < until."""
    changes = rank_changes(run)
    where, end = grid(changes), (run.steps + 1, 0)
    return [
        where.row(name, rank=rank, since=since, until=until)
        for name, values in changes.items()
        for (since, rank), (until, _) in pairwise([*values, end])
    ]


def growth(run: Run) -> list[Row]:
    """Mean rank per module type at every step where one changed, and at the end: {"step", "type", "rank"}."""
    changes = rank_changes(run)
    where, rows = grid(changes), []
    for kind in where.types:
        histories = [changes[name] for name, (_, own) in where.cells.items() if own == kind]
        steps = sorted({step for values in histories for step, _ in values} | {run.steps})
        for step in steps:
            ranks = (next((rank for since, rank in reversed(h) if since <= step), h[0][1]) for h in histories)
            rows.append({"step": step, "type": kind, "rank": round(fmean(ranks), 3)})
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
    return [{"step": s, "value": v} for s, v in changes_only(rows) + rows[-1:]]


def thin(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spaced, the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def importances(run: Run) -> list[Row]:
    """A row per module: {"layer", "type", "step": […], "importance": […]}, until the budget was spent."""
    end = spent_at(run) or run.steps
    rows = [row for row in run.trace if row["step"] <= end]
    where, found = grid_of(run), []
    for name in where.cells:
        points = [(row["step"], row["modules"].get(name, {}).get("importance")) for row in rows]
        points = thin([(s, v) for s, v in points if v and v > 0], max(2, VALUES // len(where.cells)))
        if points:
            steps, values = zip(*points, strict=True)
            found.append(where.row(name, step=steps, importance=values))
    return found


def grants(run: Run) -> list[Row]:
    """A row per grant, shaped like those of `importances`: {"step": [s], "importance": [I], "ranks", "rank", …}."""
    where = grid_of(run)
    return [
        where.row(e["module"], ranks=e["ranks"], rank=e["rank"], step=[e["step"]], importance=[e["importance"]])
        for e in run.events
        if e["kind"] == "birth" and e["module"] in where.cells and e["importance"]
    ]


def birth_rates(run: Run) -> list[Row]:
    """{"born", "step", "factor"}: learning-rate factor of the tensors born after step `born`, until none changes."""
    rows = [
        {"born": born, "step": row["step"], "factor": factor}
        for row in run.trace
        for born, factor in row["lr_factor"].items()
    ]
    last = {row["born"]: row["factor"] for row in rows}
    settled = max((row["step"] for row in rows if row["factor"] != last[row["born"]]), default=0)
    return [row for row in rows if row["step"] <= settled + max(2, settled // 10)]


def spectra(run: Run) -> list[Row]:
    """{"layer", "type", "since", "until", "index": […], "sigma": […]}: singular values of ΔW above rounding errors."""
    values = sum(len(sigma) for row in run.spectra[-1:] for sigma in row["modules"].values())
    taken = thin(run.spectra, max(2, VALUES // max(1, values)))
    where = grid(name for row in taken for name in row["modules"])
    rows = []
    for row, after in pairwise([*taken, {"step": run.steps + 1}]):
        for name, sigma in row["modules"].items():
            large = [v for v in sigma if v > 1e-6 * max(sigma)]
            index = list(range(1, len(large) + 1))
            rows.append(where.row(name, since=row["step"], until=after["step"], index=index, sigma=large))
    return rows
