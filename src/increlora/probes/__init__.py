"""What every method can do, probed on tiny models: a row per capability, an outcome per method (`outcome.Outcome`)."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from . import adapters, bases, loading, processes, running, weights
from .outcome import Outcome, outcome_of
from .subjects import Subject, subject_of

Table = dict[str, dict[str, Outcome]]  # capability → method → outcome

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


def probe_methods(methods: Sequence[str], tell: Callable[[str], None] = lambda news: None) -> Table:
    """Run every probe for these methods; `tell` hears what comes next."""
    table: Table = {name: {} for name in MEANINGS}
    for method in methods:
        subject = subject_of(method)
        for name, probe in PROBES.items():
            tell(f"{method}: {name}")
            table[name][method] = outcome_of(probe, subject)
    tell(f"{' and '.join(processes.PROBES)}, all methods")
    for (name, method), outcome in processes.in_processes(methods).items():
        table[name][method] = outcome
    return table


def as_data(table: Table) -> dict[str, Any]:
    """The table as JSON can say it, with the versions it holds for."""
    cells = {name: {method: asdict(cell) for method, cell in row.items()} for name, row in table.items()}
    return {"versions": {name: version(name).partition("+")[0] for name in PACKAGES}, "capabilities": cells}


def from_data(data: dict[str, Any]) -> Table:
    """The inverse."""
    return {
        name: {method: Outcome(**cell) for method, cell in row.items()} for name, row in data["capabilities"].items()
    }


def footnotes(table: Table) -> dict[str, int]:
    """Every reason that is given, numbered in the order of the table."""
    reasons = dict.fromkeys(told(*cell) for row in table.values() for cell in row.items() if cell[1].reason)
    return {reason: number for number, reason in enumerate(reasons, 1)}


def told(method: str, outcome: Outcome) -> str:
    """The reason in words that hold for every method it is given for."""
    return re.sub(rf"\b{method}\b", "the method", outcome.reason)


def broken(table: Table) -> Iterator[tuple[str, str]]:
    """(capability, method) of every cell that is broken."""
    return ((name, m) for name, row in table.items() for m, cell in row.items() if cell.verdict == "broken")


__all__ = [
    "MEANINGS", "PROBES", "Outcome", "Table", "as_data", "broken", "footnotes", "from_data", "probe_methods", "told",
]  # fmt: skip
