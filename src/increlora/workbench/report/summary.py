"""The words and numbers of a report beside the figures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import vl_convert

from . import tables
from .reading import Run, is_number

NONE = "–"


def shown(value: Any, form: str = ",.0f") -> str:
    return format(value, form) if is_number(value) else NONE


def metric(value: Any) -> str:
    """Three decimals, for a column to line up; four figures where that would say too little or too much."""
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
    """The metric before, after and best: from run.json, or from the rows of a run that has not finished."""
    name = run.get("metric", "name")
    values = [row[name] for row in run.metrics if isinstance(name, str) and name in row]
    so_far = {"after": values[-1]} if values else {}
    if values and run.metrics[0]["step"] == 0:
        so_far["before"] = values[0]
    return {key: first(run.number("metric", key), so_far.get(key)) for key in ("before", "after", "best")}


def live(run: Run) -> dict[str, float | None]:
    """Adapter parameters at peak and on average: from run.json, or so far."""
    found = [row["parameters"] for row in run.metrics if "parameters" in row]
    so_far = {"peak": max(found), "average": sum(found) / len(found)} if found else {}
    return {key: first(run.number("budget", f"parameters_{key}"), so_far.get(key)) for key in ("peak", "average")}


def first(*values: float | None) -> float | None:
    """The first number there is."""
    return next((value for value in values if value is not None), None)


def used(run: Run, name: str) -> float | None:
    """Ranks or parameters at the last step."""
    rows = [row[name] for row in run.metrics if name in row]
    return rows[-1] if rows and run.get("status") != "finished" else run.number("budget", f"{name}_used")


# -- one run ---------------------------------------------------------------------------------------------------------


def tiles(run: Run) -> list[Mapping[str, str]]:
    """The figures to see first: {"name", "value", "more"}."""
    found, parameters = measured(run), live(run)
    time = first(run.number("seconds", "train"), max((row.get("seconds", 0) for row in run.metrics), default=None))
    ranks = tables.final_ranks(run).values()
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


def facts(run: Run) -> list[tuple[str, str]]:
    """How the run was made, beside its command: (what, value)."""
    own = {
        "method": run.get("method"),
        "task": run.get("task"),
        "data": run.get("source"),
        "model": run.get("meta_info", "model_info", "name"),
        "seed": run.get("seed"),
        "started": run.get("run_info", "created_at"),
        "folder": str(run.path),
    }
    environment = run.get("environment")
    own |= environment if isinstance(environment, Mapping) else {}
    return [(str(key), str(value)) for key, value in own.items() if value is not None]


def made_with(command: str) -> Mapping[str, str]:
    """How the report itself was made."""
    return {
        "command": command,
        "versions": f"increlora {version('increlora')}, altair {version('altair')}, "
        f"vl-convert {version('vl-convert-python')}, vega {vl_convert.get_vega_version()}",
    }


# -- several runs ----------------------------------------------------------------------------------------------------


def comparison_table(runs: Sequence[Run]) -> Mapping[str, Any]:
    """{"head", "rows", "shared"}: what differs between the runs as a table, what does not as (name, value) pairs."""
    columns = {name: [show(run) for run in runs] for name, show in COLUMNS.items()}
    shared = [(name, values[0]) for name, values in columns.items() if name in SETTINGS and len(set(values)) == 1]
    table = {"run": [run.label for run in runs]} | {n: v for n, v in columns.items() if n not in dict(shared)}
    return {"head": list(table), "rows": list(zip(*table.values(), strict=True)), "shared": shared}


def setting(run: Run, name: str) -> str:
    return NONE if run.get(name) is None else str(run.get(name))


SETTINGS = {"method", "task", "seed", "status", "metric"}
COLUMNS: Mapping[str, Callable[[Run], str]] = {
    **{name: partial(setting, name=name) for name in ("method", "task", "seed", "status")},
    "metric": lambda run: str(run.get("metric", "name") or NONE),
    "before": lambda run: metric(measured(run)["before"]),
    "after": lambda run: metric(measured(run)["after"]),
    "best": lambda run: metric(measured(run)["best"]),
    "ranks": lambda run: of(used(run, "ranks"), run.number("budget", "ranks_target")),
    "parameters": lambda run: shown(used(run, "parameters")),
    "on average": lambda run: shown(live(run)["average"]),
    "at peak": lambda run: shown(live(run)["peak"]),
    "time": lambda run: seconds(run.number("seconds", "train")),
    "memory": memory,
}
