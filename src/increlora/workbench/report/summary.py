"""The words and numbers of a report beside the figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import tables
from .reading import Run

NONE = "–"


def shown(value: float | None, form: str = "{:,.0f}") -> str:
    return NONE if value is None else form.format(value)


def metric(value: float | None) -> str:
    """Three decimals, so that a column lines up; four figures where that would show too little or too much."""
    return shown(value, "{:.3f}" if value == 0 or 0.01 <= abs(value or 0) < 1000 else "{:.4g}")


def seconds(value: float | None) -> str:
    if value is None or value < 600:
        return shown(value, "{:.0f} s")
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


STATE = {  # numbers of run.json
    "metric": ("before", "after", "best", "baseline"),
    "budget": ("ranks_used", "ranks_target", "parameters_used", "parameters_average", "parameters_peak"),
    "seconds": ("train",),
}


def facts(run: Run) -> Mapping[str, float | None]:
    """The numbers of a run by their name in run.json, None where unknown; before it has finished, what its rows say."""
    state = {name: run.number(part, name) for part, names in STATE.items() for name in names}
    values = run.column(run.get("metric", "name"))
    ranks, live, time = (run.column(name) for name in ("ranks", "parameters", "seconds"))
    rows = {
        "before": values[0] if values and run.metrics[0]["step"] == 0 else None,
        "after": values[-1] if values else None,
        "ranks_used": ranks[-1] if ranks else None,
        "parameters_used": live[-1] if live else None,
        "parameters_average": sum(live) / len(live) if live else None,
        "parameters_peak": max(live, default=None),
        "train": max(time, default=0 if run.metrics else None),
    }
    better, other = (state, rows) if run.get("status") == "finished" else (rows, state)
    return {name: better.get(name) if better.get(name) is not None else other.get(name) for name in state}


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures to see first: (name, value, more)."""
    said, ranks = line(run), [end for _, _, end in module_rows(run)]
    spread = f"{min(ranks)} to {max(ranks)} per module, {len(ranks)} modules" if ranks else ""
    return [
        (str(run.get("metric", "name") or "metric"), f"{said['before']} → {said['after']}", judged(run)),
        ("active ranks", said["ranks"], spread),
        ("adapter parameters", said["parameters"], f"{said['on average']} on average, {said['at peak']} at peak"),
        ("time of training", said["time"], f"{run.steps} steps"),
        ("memory at peak", said["memory"], str(run.get("environment", "device") or "")),
    ]


def judged(run: Run) -> str:
    """What the metric compares with."""
    found = facts(run)
    words = [f"{name} {metric(found[name])}" for name in ("best", "baseline") if found[name] is not None]
    words += ["lower is better"] if run.get("metric", "higher_is_better") is False else []
    return ", ".join(words)


def module_rows(run: Run) -> list[tuple[str, int, int]]:
    """(module, rank at the start, rank now), the highest rank first."""
    changes = tables.rank_changes(run)
    return sorted(((name, v[0][1], v[-1][1]) for name, v in changes.items()), key=lambda row: -row[2])


def comparison_table(runs: Sequence[Run]) -> Mapping[str, Any]:
    """{"head", "rows", "shared"}: what differs between the runs as a table, what does not as (name, value) pairs."""
    lines = [line(run) for run in runs]
    shared = [(name, lines[0][name]) for name in SETTINGS if len({line[name] for line in lines}) == 1]
    head = [name for name in lines[0] if name not in dict(shared)]
    return {"head": head, "rows": [tuple(line[name] for name in head) for line in lines], "shared": shared}


SETTINGS = ("method", "task", "seed", "status", "metric")


def line(run: Run) -> Mapping[str, str]:
    """A run in words, as in a table of several."""
    found, peak = facts(run), run.number("peak_memory_bytes")
    ranks, target = found["ranks_used"], found["ranks_target"]
    named = {name: run.get(name) for name in SETTINGS} | {"metric": run.get("metric", "name") or None}
    return {
        "run": run.label,
        **{name: NONE if value is None else str(value) for name, value in named.items()},
        **{name: metric(found[name]) for name in ("before", "after", "best")},
        "ranks": shown(ranks) + ("" if target is None else f" of {target:,.0f}"),
        "parameters": shown(found["parameters_used"]),
        "on average": shown(found["parameters_average"]),
        "at peak": shown(found["parameters_peak"]),
        "time": seconds(found["train"]),
        "memory": NONE if peak is None else f"{peak / 2**20:,.0f} MiB",
    }
