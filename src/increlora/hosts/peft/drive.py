"""What users call on a model: attach it to an optimizer, and read its ranks and blocks."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from ...deltas import BlockDelta, Status
from ...runtime import Controller, attach_controller, controllers_of
from .layer import adapters_of, handle_of


def attach(
    model: nn.Module, optimizer: Optimizer, *, total_steps: int | None = None, record: bool = False
) -> Controller:
    """Follow `optimizer` from its next step on, and return the controller.

    Needed only where the length of the run is not known otherwise, or to read `controller.events` and, with
    `record=True`, `controller.records`. Any training loop is followed without this call.

    Args:
        model: a PeftModel, or a model with injected adapters, with one trainable adaptive adapter.
        optimizer: torch optimizer (or accelerate's wrapper) that holds the adapter's parameters.
        total_steps: optimizer steps of this run; schedules given as shares of the run need it.
        record: keep one entry per step in `controller.records`.
    Raises: DriveError (no or several adapters; LBFGS; not all parameters in the optimizer), ScheduleError, BudgetError.
    """
    drive_copies(model)
    return attach_controller(model, optimizer, total_steps=total_steps, record=record)


def drive_copies(model: nn.Module) -> None:
    """Give the adapters of a copied or unpickled model, which has none, their controllers."""
    if not controllers_of(model):
        for handle in adapters_of(model).values():
            if not handle.config.inference_mode:
                handle.drive()


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
    parameters: of the active ranks.   live_parameters: of all that is computed, active ranks and the reserve.
    most_parameters: at full capacity.
    """

    modules: tuple[ModuleRanks, ...]
    budget_ranks: int | None
    budget_parameters: int | None
    shared: int
    active: int
    reserve: int
    capacity: int
    parameters: int
    live_parameters: int
    most_parameters: int

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
    handle = handle_of(model, adapter_name)
    budget, shared, deltas = handle.method.budget, handle.shared_parameters, handle.deltas.values()
    modules = tuple(ModuleRanks(d.name, d.rank, d.reserve, d.capacity, d.cost) for d in deltas)
    return RankSummary(
        modules=modules,
        budget_ranks=budget.ranks,
        budget_parameters=budget.parameters,
        shared=shared,
        active=sum(m.active for m in modules),
        reserve=sum(m.reserve for m in modules),
        capacity=sum(m.capacity for m in modules),
        parameters=handle.parameters,
        live_parameters=shared + sum((m.active + m.reserve) * m.cost for m in modules),
        most_parameters=shared + sum(m.capacity * m.cost for m in modules),
    )


@dataclass(frozen=True)
class BlockState:
    """One block of a module.

    Attributes:
        ranks: how many.   state: `dormant` (waits; does not move), `reserve` (next in line), `active`, or `retired`.
        counted: of its ranks, how many count against the budget; pruning leaves out the others.
        born: step after which it became active; −1: with the model, or not yet.
        parameters: names of its parameters in `model.named_parameters()`.
    """

    ranks: int
    state: str
    counted: int
    born: int
    parameters: tuple[str, ...]


def block_states(model: nn.Module, adapter_name: str | None = None) -> dict[str, tuple[BlockState, ...]]:
    """The blocks of every module, in the order of birth; methods without blocks (LoRTA) have none.

    `adapter_name`: default the active one. Raises ConfigError if there is no such adapter."""
    names = {id(p): name for name, p in model.named_parameters()}

    def state_of(delta: BlockDelta, index: int) -> BlockState:
        ranks, states = delta.sizes[index], delta.state
        state, kept = states.status[index], states.kept
        counted = 0 if state is not Status.ACTIVE else kept.count(True) if kept else ranks
        parameters = tuple(names[id(p)] for p in delta.block(index).values())
        return BlockState(ranks, state.name.lower(), counted, states.born[index], parameters)

    blocks = handle_of(model, adapter_name).blocks
    return {name: tuple(state_of(delta, i) for i in range(len(delta.sizes))) for name, delta in blocks.items()}
