"""What users call on a model: attach it to an optimizer, and see where its ranks are."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...errors import ConfigError
from ...runtime import Controller, attach_controller, controllers_of
from .layer import AdapterLayer, adapter_layers, adapters_of
from .live import drive, shared_parameters


def attach(
    model: nn.Module, optimizer: Optimizer, *, total_steps: int | None = None, record: bool = False
) -> Controller:
    """Follow `optimizer` from its next step on, and return the controller.

    Needed only where nothing else can tell the length of the run, or to read `controller.events` and, with
    `record=True`, `controller.records`. Any training loop is followed without this call.

    Args:
        model: a PeftModel, or a model with injected adapters, with one trainable adaptive adapter.
        optimizer: torch optimizer (or accelerate's wrapper) that holds the adapter's parameters.
        total_steps: optimizer steps of this run; schedules given as shares of the run need it.
        record: keep one entry per step in `controller.records`.
    Raises: DriveError (no or several adapters; LBFGS; not all parameters held), ScheduleError, BudgetError.
    """
    if not controllers_of(model):
        _drive_copies(model)
    return attach_controller(model, optimizer, total_steps=total_steps, record=record)


def _drive_copies(model: nn.Module) -> None:
    """Copied or unpickled models have adapters without controllers: give them new ones."""
    configs = getattr(model, "peft_config", {})
    for adapter, config in configs.items():
        layers = adapter_layers(model, adapter)
        if not layers or config.inference_mode:
            continue
        totals = [(layer.in_features + layer.out_features) for layer in layers.values()]
        drive(model, adapter, config, config.settings().method(len(totals), sum(totals)))


@dataclass(frozen=True)
class ModuleRanks:
    """Ranks of one module: in use, learning in reserve, and the most it can hold; own parameters of one rank."""

    module: str
    active: int
    reserve: int
    capacity: int
    cost: int


@dataclass(frozen=True)
class RankSummary:
    """Ranks of an adapter: per module, in total, and against the budget (None: counted in the other unit).

    Parameters are those that count: what merging absorbs (e) is left out. shared: those that all modules have together.
    """

    modules: tuple[ModuleRanks, ...]
    budget_ranks: int | None
    budget_parameters: int | None
    shared: int = 0

    @property
    def active(self) -> int:
        return sum(m.active for m in self.modules)

    @property
    def reserve(self) -> int:
        return sum(m.reserve for m in self.modules)

    @property
    def capacity(self) -> int:
        return sum(m.capacity for m in self.modules)

    @property
    def parameters(self) -> int:
        """Of the active ranks."""
        return self.shared + sum(m.active * m.cost for m in self.modules)

    @property
    def live_parameters(self) -> int:
        """Of all that is computed: active ranks and the reserve."""
        return self.shared + sum((m.active + m.reserve) * m.cost for m in self.modules)

    @property
    def most_parameters(self) -> int:
        """At full capacity."""
        return self.shared + sum(m.capacity * m.cost for m in self.modules)

    @property
    def total(self) -> str:
        """One line: active and reserve ranks against budget and capacity, and their parameters."""
        ranks = f" of {self.budget_ranks}" if self.budget_ranks is not None else ""
        parameters = f" of {self.budget_parameters:,}" if self.budget_parameters is not None else ""
        return (
            f"active: {self.active}{ranks} ranks, {self.parameters:,}{parameters} parameters | reserve: {self.reserve} "
            f"ranks | capacity: {self.capacity} ranks, {self.most_parameters:,} parameters"
        )

    def __str__(self) -> str:
        rows = [f"{m.module}: {m.active} active, {m.reserve} reserve, {m.capacity} capacity" for m in self.modules]
        return "\n".join([*rows, self.total])


def rank_summary(model: nn.Module, adapter_name: str | None = None) -> RankSummary:
    """Where the rank is now. `adapter_name`: default the active one. Raises ConfigError if there is no such adapter."""
    chosen = chosen_adapter(model, adapter_name)
    deltas = [layer.delta(chosen) for layer in adapter_layers(model, chosen).values()]
    uniform = sum(d.in_features + d.out_features for d in deltas)
    budget = _config(model, chosen).settings().method(len(deltas), uniform).budget
    modules = [ModuleRanks(d.name, d.rank, d.reserve, d.capacity, d.cost) for d in deltas]
    return RankSummary(tuple(modules), budget.ranks, budget.parameters, shared_parameters(model, chosen))


def chosen_adapter(model: nn.Module, adapter_name: str | None) -> str:
    """`adapter_name`, or the active adapter of ours. Raises ConfigError if there is no such adapter."""
    names = adapters_of(model)
    active = [n for m in model.modules() if isinstance(m, AdapterLayer) for n in m.active_adapters if n in names]
    chosen = adapter_name or (active[0] if active else None)
    if chosen is None or chosen not in names:
        raise ConfigError(f"no increlora adapter named {chosen!r} in this model; it has {sorted(names) or 'none'}")
    return chosen


def _config(model: nn.Module, adapter_name: str) -> Any:
    return model.peft_config[adapter_name]  # type: ignore[index]
