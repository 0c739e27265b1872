"""`--dry-run`: what a run would do, from shapes and schedules alone; no weights are loaded, nothing is written."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from torch import nn

from ...deltas import BlockDelta
from ...hosts.peft import rank_summary
from ...rules import Expected, Forecast
from ...runtime import controllers_of
from ..tasks import model_name, sketch, train_size
from .build import adapted
from .display import of
from .run import total_steps
from .settings import TrainSettings

FLOAT_BYTES = 4
ADAM_STATES = 2
ROWS = 12  # of the table of events


def show_plan(settings: TrainSettings, console: Console) -> None:
    """Print modules, budget, events and their steps, parameters and memory of a run.

    Raises: what training would raise before its first step, as far as no weights are needed for it."""
    examples = train_size(settings.task, settings.model, settings.task_options())
    steps = total_steps(settings, examples)
    model = adapted(settings, sketch(settings.task, settings.model))
    summary, forecast = rank_summary(model), forecast_run(model, steps)
    start = Expected(-1, 0, summary.active, summary.parameters)
    events = [start, *forecast.events] if forecast.events else []
    last = events[-1] if events else start
    modules = kinds([m.module for m in summary.modules])
    console.print(f"{settings.method} on {settings.task}: {model_name(settings.task, settings.model)}", highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "steps", f"{steps:,}: {examples:,} examples, {settings.batch_size} a step, {settings.epochs:g} epochs"
    )
    table.add_row("modules", f"{len(summary.modules)}: {modules}")
    if not forecast.exact:
        table.add_row("ranks", f"{summary.active} at the start; how many are left is found in training")
        table.add_row("parameters", f"{summary.parameters:,} at the start, at most so many at the end")
    else:
        table.add_row("ranks", f"{summary.active} at the start, {last.ranks} at the end, {summary.capacity:,} possible")
        table.add_row("parameters", parameters_forecast(events, steps, summary.parameters, summary.budget_parameters))
    table.add_row("memory", memory_forecast(model, max((e.parameters for e in events), default=last.parameters)))
    console.print(table, soft_wrap=True)
    if events:
        console.print(events_table(events))


def kinds(names: Sequence[str]) -> str:
    """`12 × attention.self.query, …`: how many modules of each kind."""
    counts = Counter(re.sub(r"^.*?\.\d+\.", "", name) for name in names)
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def forecast_run(model: nn.Module, steps: int) -> Forecast:
    """What will happen to the ranks; nothing for a method whose ranks are fixed. Raises ScheduleError, BudgetError."""
    forecasts = [controller.forecast(steps) for controller in controllers_of(model)]
    return forecasts[0] if forecasts else Forecast((), ())


def parameters_forecast(events: Sequence[Expected], steps: int, now: int, budget: int | None) -> str:
    """Adapter parameters: at the end, and their average over the steps."""
    if not events:
        return f"{now:,} throughout"
    begins = [max(0, f.step + 1) for f in events] + [steps]
    spans = [later - first for first, later in pairwise(begins)]
    average = sum(f.parameters * span for f, span in zip(events, spans, strict=True)) / steps
    last = events[-1].parameters
    what = "growth is" if last > events[0].parameters else "cuts are"
    return f"about {last:,}{of(budget)} at the end, {average:,.0f} on average (if {what} even)"


def memory_forecast(model: nn.Module, adapter: int) -> str:
    """Weights, adapter at full capacity, gradients and two optimizer states of `adapter` active parameters, statistics
    of a pruning method; no activations."""
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    capacity = sum(p.numel() for n, p in model.named_parameters() if ".lora_delta." in n)
    frozen = sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if id(t) not in trained)
    heads = sum(trained.values()) - capacity
    moving = (adapter + heads) * FLOAT_BYTES * (1 + ADAM_STATES)
    parts = {
        "frozen weights": frozen,
        "adapter and head": sum(trained.values()) * FLOAT_BYTES,
        "gradients and Adam": moving,
        "statistics": sum(t.nbytes for m in model.modules() if isinstance(m, BlockDelta) for t in m.statistics),
    }
    parts = {name: size for name, size in parts.items() if size}
    listed = " + ".join(f"{size / 2**20:,.1f} MiB {name}" for name, size in parts.items())
    return f"{listed} = {sum(parts.values()) / 2**20:,.1f} MiB, activations not counted"


def events_table(events: Sequence[Expected]) -> Table:
    """The start, and the events; of many some, the first and the last among them."""
    count = len(events) - 1
    grows = any(f.modules for f in events)
    shown = events if grows or count <= ROWS else [events[round(i * count / ROWS)] for i in range(ROWS + 1)]
    title = "growth events" if grows else "cuts" + (f" ({ROWS} of {count:,})" if len(shown) <= count else "")
    table = Table(title=title, title_justify="left")
    for column in ("step", *(["modules that grow"] if grows else []), "ranks", "parameters"):
        table.add_column(column, justify="right")
    for f in shown:
        step = "start" if f.step < 0 else f"{f.step:,}"
        table.add_row(step, *([str(f.modules or "")] if grows else []), str(f.ranks), f"{f.parameters:,}")
    return table
