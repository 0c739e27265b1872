"""Small run folders as `increlora train` leaves them, written by hand."""

import json
from pathlib import Path
from typing import Any

LAYERS, TYPES, STEPS = 3, ("attention.query", "attention.value", "output.dense"), 40
EVENTS = {8: "attention.value", 16: "output.dense"}  # at these steps (from 0) every layer above 0 gains two ranks


def modules(layers: int = LAYERS, types: tuple[str, ...] = TYPES) -> list[str]:
    return [f"model.layer.{i}.{kind}" for i in range(layers) for kind in types]


def state(names: list[str], **more: Any) -> dict[str, Any]:
    """run.json of a finished run."""
    return {
        "format": "increlora-run/1", "status": "finished", "error": "", "method": "increlora", "task": "toy", "seed": 0,
        "source": "made up", "command": "increlora train --task toy --out runs/toy",
        "metric": {"name": "accuracy", "before": 0.5, "after": 0.75, "best": 0.8, "higher_is_better": True},
        "budget": {
            "ranks_target": 17, "ranks_used": 17, "parameters_target": 544, "parameters_used": 544,
            "parameters_peak": 544, "parameters_average": 430.5,
        },
        "ranks": {name: ranks_at(name, STEPS) for name in names},
        "seconds": {"train": 12.0, "total": 20.0}, "peak_memory_bytes": 2**28,
        "environment": {"python": "3.11.7", "device": "cpu"},
        "run_info": {"created_at": "2020-01-01T00:00:00+00:00", "train_config": {"model": "toy-model"}},
    } | more  # fmt: skip


def ranks_at(name: str, step: int) -> int:
    """Rank of a module when so many steps are done."""
    grown = [event for event, kind in EVENTS.items() if name.endswith(kind) and ".0." not in name and event < step]
    return 1 + 2 * len(grown)


def write_run(folder: Path, names: list[str] | None = None, **more: Any) -> Path:
    """A whole run; `more` goes into run.json."""
    names = modules() if names is None else names
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(state(names, **more)))
    (folder / "config.toml").write_text('# increlora train\nmethod = "increlora"\n')
    for name, rows in {"metrics": metrics(names), "events": events(names), "trace": trace(names),
                       "spectra": spectra(names)}.items():  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metrics(names: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "accuracy": 0.5, "f1": 0.4}]
    for step in range(1, STEPS + 1):
        ranks = sum(ranks_at(name, step) for name in names)
        row = {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "ranks": ranks, "parameters": 32 * ranks,
               "seconds": 0.3 * step}  # fmt: skip
        rows.append(row | ({"accuracy": 0.5 + step / 160, "f1": 0.4 + step / 160} if step % 10 == 0 else {}))
    return rows


def events(names: list[str]) -> list[dict[str, Any]]:
    births = [
        {"step": event, "kind": "birth", "module": name, "ranks": 2, "rank": 3, "importance": 1e-9 * (event + 1)}
        for event, kind in EVENTS.items()
        for name in names
        if name.endswith(kind) and ".0." not in name
    ]
    return [*births, {"step": 16, "kind": "finish", "module": names[0], "ranks": 0, "rank": 1, "importance": None}]


def trace(names: list[str]) -> list[dict[str, Any]]:
    steps = sorted({*range(0, STEPS + 1, 5), *(event + 1 for event in EVENTS)})
    return [
        {
            "step": step,
            "modules": {
                name: {"rank": ranks_at(name, step), "importance": 1e-9 * step * i} for i, name in enumerate(names, 1)
            },
            "lr_factor": {str(e): min(1.0, (step - e - 1) / 4) for e in EVENTS if e + 1 < step},
        }
        for step in steps
    ]  # fmt: skip


def spectra(names: list[str]) -> list[dict[str, Any]]:
    return [
        {"step": step, "modules": {n: [0.1 * step / (i + 1) for i in range(ranks_at(n, step))] for n in names}}
        for step in (10, 20, 40)
    ]
