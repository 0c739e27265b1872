"""`--dry-run`: what a run would do, from shapes and schedules alone; no weights are loaded, nothing is written."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from torch import nn

from ...decide.allocation import Holding, Plan, parameters_used, ranks_used
from ...decide.budget import Budget, falling
from ...decide.schedules import Run
from ...deltas import BlockDelta
from ...hosts.peft import rank_summary
from ...methods import GateShrinking, Method, RankPruning
from ...runtime import controllers_of
from ..tasks import model_name, sketch, train_size
from .build import adapted, check_schedule
from .display import of
from .run import total_steps
from .settings import TrainSettings

FLOAT_BYTES = 4
ADAM_STATES = 2
ROWS = 12  # of the table of events


@dataclass(frozen=True)
class Forecast:
    """One event, or the start (step −1): ranks and parameters afterwards.

    Which modules will change is not known; parameters are those of even growth, or of even cuts."""

    step: int
    modules: int
    ranks: int
    parameters: int


def show_plan(settings: TrainSettings, console: Console) -> None:
    """Print modules, budget, events and their steps, parameters and memory of a run.

    Raises: what training would raise before its first step, as far as no weights are needed for it."""
    examples = train_size(settings.task, settings.model, settings.task_options())
    steps = total_steps(settings, examples)
    model = adapted(settings, sketch(settings.task, settings.model))
    check_schedule(model, steps)
    summary, forecasts = rank_summary(model), forecast_events(model, steps)
    last = forecasts[-1] if forecasts else Forecast(-1, 0, summary.active, summary.parameters)
    modules = kinds([m.module for m in summary.modules])
    console.print(f"{settings.method} on {settings.task}: {model_name(settings.task, settings.model)}", highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "steps", f"{steps:,}: {examples:,} examples, {settings.batch_size} a step, {settings.epochs:g} epochs"
    )
    table.add_row("modules", f"{len(summary.modules)}: {modules}")
    if any(found_in_training(controller.method) for controller in controllers_of(model)):
        table.add_row("ranks", f"{summary.active} at the start; how many are left is found in training")
        table.add_row("parameters", f"{summary.parameters:,} at the start, at most so many at the end")
    else:
        table.add_row("ranks", f"{summary.active} at the start, {last.ranks} at the end, {summary.capacity:,} possible")
        forecast = parameters_forecast(forecasts, steps, summary.parameters, summary.budget_parameters)
        table.add_row("parameters", forecast)
    table.add_row("memory", memory_forecast(model, max((f.parameters for f in forecasts), default=last.parameters)))
    console.print(table, soft_wrap=True)
    if forecasts:
        console.print(events_table(forecasts))


def kinds(names: Sequence[str]) -> str:
    """`12 × attention.self.query, …`: how many modules of each kind."""
    counts = Counter(re.sub(r"^.*?\.\d+\.", "", name) for name in names)
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def forecast_events(model: nn.Module, steps: int) -> list[Forecast]:
    """The start and every event until the budget is met; nothing for a method whose ranks are fixed."""
    for controller in controllers_of(model):
        method, holdings = controller.method, controller.holdings()
        if method.events is not None and method.allocate is not None:
            return simulated(method, holdings, steps)
        if isinstance(method.prune, RankPruning | GateShrinking) and not found_in_training(method):
            return cuts(method, holdings, steps)
    return []


def found_in_training(method: Method) -> bool:
    """Does no budget say how many ranks there will be?"""
    return isinstance(method.prune, GateShrinking) and method.prune.thresholds is not None


def cuts(method: Method, holdings: Sequence[Holding], steps: int) -> list[Forecast]:
    """The start and every cut that leaves fewer ranks than there were."""
    begin, cost, target = ranks_used(holdings), parameters_used(holdings), method.budget.ranks
    assert isinstance(method.prune, RankPruning | GateShrinking) and target is not None
    start, end = Budget(begin, cost), Budget(target, method.budget.parameters or cost * target // begin)
    schedule = method.prune.schedule(Run(steps, len(holdings)), begin, target)
    found = [Forecast(-1, 0, begin, cost)]
    for step in schedule.cuts():
        now = falling(start, end, schedule.ranks(step))
        if now.ranks != found[-1].ranks:
            found.append(Forecast(step, 0, now.ranks or 0, now.parameters or 0))
    return found


def simulated(method: Method, holdings: list[Holding], steps: int) -> list[Forecast]:
    assert method.events is not None and method.allocate is not None
    growth = method.events(Run(steps, len(holdings)), holdings, 0)
    found = [Forecast(-1, 0, ranks_used(holdings), parameters_used(holdings))]
    step = growth.next(0)
    while step < steps:
        plan = method.allocate([1 / (1 + h.rank + i / len(holdings)) for i, h in enumerate(holdings)], holdings)
        holdings = grown(holdings, plan)
        if plan.grants:
            found.append(Forecast(step, len(plan.grants), ranks_used(holdings), parameters_used(holdings)))
        if plan.spent or not plan.grants:
            break
        step = growth.next(step + 1)
    return found


def grown(holdings: Sequence[Holding], plan: Plan) -> list[Holding]:
    """Holdings after a plan was carried out."""
    after = list(holdings)
    for grant in plan.grants:
        old = after[grant.module]
        free = tuple(size for i, size in enumerate(old.free) if i not in grant.blocks)
        after[grant.module] = replace(old, rank=old.rank + grant.ranks, free=free)
    return after


def parameters_forecast(forecasts: Sequence[Forecast], steps: int, now: int, budget: int | None) -> str:
    """Adapter parameters: at the end, and their average over the steps."""
    if not forecasts:
        return f"{now:,} throughout"
    begins = [max(0, f.step + 1) for f in forecasts] + [steps]
    spans = [later - first for first, later in pairwise(begins)]
    average = sum(f.parameters * span for f, span in zip(forecasts, spans, strict=True)) / steps
    last = forecasts[-1].parameters
    what = "growth is" if last > forecasts[0].parameters else "cuts are"
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
        "statistics": sum(m.statistics.nbytes for m in model.modules() if isinstance(m, BlockDelta)),
    }
    parts = {name: size for name, size in parts.items() if size}
    listed = " + ".join(f"{size / 2**20:,.1f} MiB {name}" for name, size in parts.items())
    return f"{listed} = {sum(parts.values()) / 2**20:,.1f} MiB, activations not counted"


def events_table(forecasts: Sequence[Forecast]) -> Table:
    """The start, and the events; of many some, the first and the last among them."""
    events = len(forecasts) - 1
    grows = any(f.modules for f in forecasts)
    shown = forecasts if grows or events <= ROWS else [forecasts[round(i * events / ROWS)] for i in range(ROWS + 1)]
    title = "growth events" if grows else "cuts" + (f" ({ROWS} of {events:,})" if len(shown) <= events else "")
    table = Table(title=title, title_justify="left")
    for column in ("step", *(["modules that grow"] if grows else []), "ranks", "parameters"):
        table.add_column(column, justify="right")
    for f in shown:
        step = "start" if f.step < 0 else f"{f.step:,}"
        table.add_row(step, *([str(f.modules or "")] if grows else []), str(f.ranks), f"{f.parameters:,}")
    return table
