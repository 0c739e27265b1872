"""The words and numbers of a report beside the figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import tables
from .reading import Run, is_number

NONE = "–"


def shown(value: Any, form: str = ",.0f") -> str:
    return format(value, form) if is_number(value) else NONE


def metric(value: Any) -> str:
    """Three decimals, so that a column lines up; four figures where that would show too little or too much."""
    return shown(value, ".3f" if is_number(value) and (value == 0 or 0.01 <= abs(value) < 1000) else ".4g")


def of(used: float | None, target: float | None) -> str:
    return shown(used) + ("" if target is None else f" of {shown(target)}")


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 600:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def memory(run: Run) -> str:
    peak = run.number("peak_memory_bytes")
    return NONE if peak is None else f"{peak / 2**20:,.0f} MiB"


def measured(run: Run) -> dict[str, float | None]:
    """The metric before, after and best."""
    values = run.column(run.get("metric", "name"))
    before = values[0] if values and run.metrics[0]["step"] == 0 else None
    so_far = {"before": before, "after": values[-1] if values else None, "best": None}
    return {key: run.number("metric", key, otherwise=value) for key, value in so_far.items()}


def live(run: Run) -> dict[str, float | None]:
    """Adapter parameters at peak and on average."""
    found = run.column("parameters")
    so_far = {"peak": max(found, default=None), "average": sum(found) / len(found) if found else None}
    return {key: run.number("budget", f"parameters_{key}", otherwise=value) for key, value in so_far.items()}


def used(run: Run, name: str) -> float | None:
    """Ranks or parameters at the last step."""
    values = run.column(name)
    return values[-1] if values and run.get("status") != "finished" else run.number("budget", f"{name}_used")


def tiles(run: Run) -> list[Mapping[str, str]]:
    """The figures to see first: {"name", "value", "more"}."""
    found, parameters = measured(run), live(run)
    time = run.number("seconds", "train", otherwise=max(run.column("seconds"), default=0 if run.metrics else None))
    ranks = [end for _, _, end in module_rows(run)]
    spread = f"{min(ranks)} to {max(ranks)} per module, {len(ranks)} modules" if ranks else ""
    return [
        {"name": str(run.get("metric", "name") or "metric"),
         "value": f"{metric(found['before'])} → {metric(found['after'])}", "more": judged(run)},
        {"name": "active ranks", "value": of(used(run, "ranks"), run.number("budget", "ranks_target")),
         "more": spread},
        {"name": "adapter parameters", "value": shown(used(run, "parameters")),
         "more": f"{shown(parameters['average'])} on average, {shown(parameters['peak'])} at peak"},
        {"name": "time of training", "value": seconds(time), "more": f"{run.steps} steps"},
        {"name": "memory at peak", "value": memory(run), "more": str(run.get("environment", "device") or "")},
    ]  # fmt: skip


def judged(run: Run) -> str:
    """What the metric compares with."""
    best, baseline = measured(run)["best"], run.number("metric", "baseline")
    words = [f"best {metric(best)}"] if best is not None else []
    words += [f"baseline {metric(baseline)}"] if baseline is not None else []
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
    """A run in a table of several."""
    return {
        "run": run.label,
        **{name: NONE if run.get(name) is None else str(run.get(name)) for name in SETTINGS},
        "metric": str(run.get("metric", "name") or NONE),
        **{name: metric(value) for name, value in measured(run).items()},
        "ranks": of(used(run, "ranks"), run.number("budget", "ranks_target")),
        "parameters": shown(used(run, "parameters")),
        "on average": shown(live(run)["average"]),
        "at peak": shown(live(run)["peak"]),
        "time": seconds(run.number("seconds", "train")),
        "memory": memory(run),
    }
