"""`--dry-run`: what a run would do, from shapes and schedules alone; no weights are loaded, nothing is written."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from ...deltas import BlockDelta
from ...hosts.peft import rank_summary
from ...rules import Expected, Forecast
from ...runtime import controllers_of
from ..tasks import model_name, sketch, train_size
from .build import adapted
from .display import grid, of
from .settings import TrainSettings

FLOAT_BYTES = 4
ADAM_STATES = 2
ROWS = 12  # of the table of events


def show_plan(settings: TrainSettings, console: Console) -> None:
    """Print modules, budget, events and their steps, parameters and memory of a run.

    Raises: what training would raise before its first step, as far as no weights are needed for it."""
    examples = train_size(settings.task, settings.model, settings.task_options())
    steps = settings.total_steps(examples)
    model = adapted(settings, sketch(settings.task, settings.model))
    summary = rank_summary(model)
    forecast = next((controller.forecast(steps) for controller in controllers_of(model)), Forecast((), ()))
    events = [Expected(-1, 0, summary.active, summary.parameters), *forecast.events]
    if forecast.exact:
        ranks = f"{summary.active} at the start, {events[-1].ranks} at the end, {summary.capacity:,} possible"
        parameters = parameters_forecast(events, steps, summary.budget_parameters)
    else:
        ranks = f"{summary.active} at the start; how many are left is found in training"
        parameters = f"{summary.parameters:,} at the start, at most so many at the end"
    table = grid([
        ("steps", f"{steps:,}: {examples:,} examples, {settings.batch_size} a step, {settings.epochs:g} epochs"),
        ("modules", f"{len(summary.modules)}: {kinds([m.module for m in summary.modules])}"),
        ("ranks", ranks),
        ("parameters", parameters),
        ("memory", memory_forecast(model, max(event.parameters for event in events))),
    ])  # fmt: skip
    console.print(f"{settings.method} on {settings.task}: {model_name(settings.task, settings.model)}", highlight=False)
    console.print(table, soft_wrap=True)
    if forecast.events:
        console.print(events_table(events))


def kinds(names: Sequence[str]) -> str:
    """`12 × attention.self.query, …`: how many modules of each kind."""
    counts = Counter(re.sub(r"^.*?\.\d+\.", "", name) for name in names)
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def parameters_forecast(events: Sequence[Expected], steps: int, budget: int | None) -> str:
    first, last = events[0].parameters, events[-1].parameters
    if len(events) == 1:
        return f"{first:,} throughout"
    spans = np.diff([*(event.step + 1 for event in events), steps])
    average = np.average([event.parameters for event in events], weights=spans)
    what = "growth is" if last > first else "cuts are"
    return f"about {last:,}{of(budget)} at the end, {average:,.0f} on average (if {what} even)"


def memory_forecast(model: nn.Module, adapter: int) -> str:
    """Weights, adapter at full capacity, gradients and two optimizer states of `adapter` active parameters, statistics
    of a pruning method; no activations."""
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    capacity = sum(p.numel() for n, p in model.named_parameters() if ".lora_delta." in n)
    heads = sum(trained.values()) - capacity
    parts = {
        "frozen weights": sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if id(t) not in trained),
        "adapter and head": sum(trained.values()) * FLOAT_BYTES,
        "gradients and Adam": (adapter + heads) * FLOAT_BYTES * (1 + ADAM_STATES),
        "statistics": sum(t.nbytes for m in model.modules() if isinstance(m, BlockDelta) for t in m.statistics),
    }
    listed = " + ".join(f"{size / 2**20:,.1f} MiB {name}" for name, size in parts.items() if size)
    return f"{listed} = {sum(parts.values()) / 2**20:,.1f} MiB, activations not counted"


def events_table(events: Sequence[Expected]) -> Table:
    """The start, and the events; of many some, the first and the last among them."""
    count = len(events) - 1
    grows = any(event.modules for event in events)
    shown = events if grows or count <= ROWS else [events[round(i * count / ROWS)] for i in range(ROWS + 1)]
    title = "growth events" if grows else "cuts" + (f" ({ROWS} of {count:,})" if len(shown) <= count else "")
    headers = ("step", *(["modules that grow"] if grows else []), "ranks", "parameters")
    table = Table(*(Column(header, justify="right") for header in headers), title=title, title_justify="left")
    for event in shown:
        step = "start" if event.step < 0 else f"{event.step:,}"
        grown = [str(event.modules or "")] if grows else []
        table.add_row(step, *grown, str(event.ranks), f"{event.parameters:,}")
    return table
