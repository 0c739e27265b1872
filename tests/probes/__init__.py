"""What every method can do, probed on tiny models: a row per capability, an outcome per method.

`python -m tests.probes --write` probes everything and writes the table that `increlora methods` prints.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from . import adapters, bases, loading, processes, running, weights
from .outcome import Outcome, Table, outcome_of
from .subjects import Subject, subject_of

PROBES: dict[str, Callable[[Subject], str | None]] = {
    "merge": weights.merge,
    "export": weights.export,
    "hotswap of exports": weights.hotswap,
    "quantised base": bases.quantised,
    "Conv1D": bases.conv1d,
    "Embedding": bases.embedding,
    "Conv2d": bases.conv2d,
    "several adapters": adapters.several,
    "mixed batch": adapters.mixed_batch,
    "weighted adapters": adapters.weighted,
    "resume": running.resume,
    "checkpointing, reentrant": running.checkpointing_reentrant,
    "checkpointing, other": running.checkpointing_not_reentrant,
    "compile": running.compiled,
    "autocast bf16": running.autocast,
    "low_cpu_mem_usage": loading.low_memory,
    "inject_adapter_in_model": loading.injected,
    "model.add_adapter": loading.added,
    "device_map": loading.device_map,
}
MEANINGS = {name: str(probe.__doc__) for name, probe in (PROBES | processes.PROBES).items()}
PACKAGES = ("torch", "peft", "transformers")


def probe_methods(methods: Sequence[str], report: Callable[[str], None] = lambda text: None) -> Table:
    """Run every probe for these methods; `report` is called with what comes next."""
    table: Table = {name: {} for name in MEANINGS}
    for method in methods:
        subject = subject_of(method)
        for name, probe in PROBES.items():
            report(f"{method}: {name}")
            table[name][method] = outcome_of(probe, subject)
    report(f"{' and '.join(processes.PROBES)}, all methods")
    for (name, method), outcome in processes.in_processes(methods).items():
        table[name][method] = outcome
    return table


def as_data(table: Table) -> dict[str, Any]:
    """The table for JSON, with the versions it holds for and the meaning of every row."""
    cells = {name: {method: asdict(cell) for method, cell in row.items()} for name, row in table.items()}
    versions = {name: version(name).partition("+")[0] for name in PACKAGES}
    return {"versions": versions, "meanings": MEANINGS, "capabilities": cells}


def table_of(data: dict[str, Any]) -> Table:
    """The table again."""
    cells = data["capabilities"]
    return {name: {method: Outcome(**cell) for method, cell in row.items()} for name, row in cells.items()}


def not_yes_or_no(table: Table) -> Iterator[tuple[str, str]]:
    """(capability, method) of every cell that is broken or could not be probed here."""
    return ((name, m) for name, row in table.items() for m, cell in row.items() if cell.verdict not in ("yes", "no"))
