"""The language that all rules speak: what happens to ranks and parameters during a run.

A rule is a frozen record. `bind` gives it the modules of one adapter and returns its runner. The controller calls that:

    start          a run begins, or goes on from a checkpoint
    see_gradients  backward pass of a module: its input x and ∂L/∂y          if it wants "gradients"
    see_inputs     backward pass of a module: its input x, before dropout    if it wants "inputs"
    observe        the gradients of the loss are complete
    before_step    the gradients are as the optimizer will use them (penalty added, bad steps cleared)
    after_step     the optimizer has moved the parameters → changes, which the controller logs as events

An optimizer may raise and step again: then `before_step` comes once more in the same step, and what is remembered for
good is changed in `after_step` alone.
What a rule remembers lies in `delta.statistics[slot]` and in the states of the blocks: it travels in every state dict.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..decide.allocation import Holding, Kind
from ..decide.budget import Budget
from ..decide.schedules import Run
from ..deltas import BlockDelta
from ..errors import CheckpointError

Sight = Literal["gradients", "inputs"]
Deltas = Mapping[str, BlockDelta]


@dataclass(frozen=True)
class Change:
    """What a rule did to a module (its index): new rank − old, importance, kind of event; None: a birth if `ranks` > 0,
    else a retirement."""

    module: int
    ranks: int
    importance: float | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Step:
    """A step that the optimizer is about to take.

    Attributes:
        number: 0-based step of the run.   finite: 0-dim bool: is every gradient finite?
        gradient_scale: factor that loss scaling has left on `.grad`.
        loss_scale: () → factor on the gradients that backward passes have seen; reads a device scalar.
    """

    number: int
    optimizer: Optimizer
    finite: Tensor
    gradient_scale: float
    loss_scale: Callable[[], float]


@dataclass(frozen=True)
class Expected:
    """An event that is expected: how many modules change (0: not known), and what there is afterwards."""

    step: int
    modules: int
    ranks: int
    parameters: int


@dataclass(frozen=True)
class Forecast:
    """What a rule will do in a run, as far as shapes and schedules tell.

    Attributes:
        events: in the order of their steps; parameters assume even growth, or even cuts.
        holdings: what every module holds afterwards.   exact: False if the final ranks are only found in training.
    """

    events: tuple[Expected, ...]
    holdings: tuple[Holding, ...]
    exact: bool = True


class Rule(Protocol):
    """A rule as data. One that remembers no negative number may say so, `nonnegative = True`: then such a number is
    refused in a file."""

    def check(self, holdings: Sequence[Holding], budget: Budget) -> None:
        """Raise BudgetError if the budget cannot be met from these holdings. No model is needed."""
        return None  # as where ranks stay what they are

    def bind(self, deltas: Deltas, budget: Budget, slot: int) -> "Runner":
        """The runner for the modules of one adapter; `slot` is its place in `delta.statistics`."""
        ...


class Runner:
    """Abstract: a rule at work on the modules of one adapter.

    Attributes:
        names, deltas: the modules, in model order.   wants: what it has to see in the backward passes before the next
            step; all that it can want, before `start`.
    """

    wants: frozenset[Sight] = frozenset()
    forgets = False  # are its statistics of no use any more once it is done?

    def __init__(self, deltas: Deltas, slot: int) -> None:
        self.names, self.deltas, self.slot = list(deltas), list(deltas.values()), slot

    @property
    def may_want(self) -> frozenset[Sight]:
        """What it may still want in this run: compiled graphs hold taps for it, so it should change rarely."""
        return self.wants

    @property
    def done(self) -> bool:
        """Is nothing left to decide?"""
        return all(delta.state.settled for delta in self.deltas)

    def forecast(self, holdings: Sequence[Holding], run: Run, first: int = 0) -> Forecast:
        """What will happen in this run from step `first` on. Raises ScheduleError if the schedule does not fit it."""
        raise NotImplementedError

    def start(self, run: Run, first: int) -> None:
        """A run begins at step `first` > 0 if it goes on from a checkpoint. Raises ScheduleError, before any change."""
        raise NotImplementedError

    def see_gradients(self, module: int, x: Tensor, grad: Tensor) -> None:
        """One backward pass of a module, with its input x and the gradient ∂L/∂y of its output."""

    def see_inputs(self, module: int, x: Tensor) -> None:
        """One backward pass of a module, with its input x, before dropout."""

    def forget(self, module: int | None = None) -> None:
        """What was seen of a module (None: of all) since the last step led to no step."""

    def observe(self, step: Step) -> None:
        """The gradients of the loss are complete."""

    def before_step(self, step: Step) -> None:
        """The gradients are as the optimizer will use them; all None in a step that was judged bad."""

    def after_step(self, step: int) -> list[Change]:
        """The optimizer has moved the parameters; their gradients are still there."""
        return []

    def restored(self) -> None:
        """A checkpoint was loaded: another run will start from it."""

    def pruned(self) -> list[Tensor]:
        """Tensors in which a zero is a decision of the rule, this process's part of them."""
        return []

    def importance(self) -> list[float] | None:
        """Importance of every module now, where the rule knows one."""
        return None

    def details(self) -> dict[str, list[float] | list[None]]:
        """Further numbers of every module in the last step, by name, for `controller.records`."""
        return {}

    # -- statistics ----------------------------------------------------------------------------------------------

    def reserve_statistics(self, sizes: Sequence[int]) -> None:
        """Make room for so many numbers in each module, unless a checkpoint has filled it."""
        for delta, size in zip(self.deltas, sizes, strict=True):
            delta.reserve_statistics(self.slot, size, dtype_of(delta))

    def statistics(self) -> list[Tensor]:
        """The numbers this rule remembers of every module."""
        return [delta.statistics[self.slot] for delta in self.deltas]

    def check_statistics(self, sizes: Sequence[int]) -> None:
        """Raise CheckpointError for statistics of another length than `sizes` says."""
        for name, found, size in zip(self.names, self.statistics(), sizes, strict=True):
            if len(found) != size:
                raise CheckpointError(
                    f"{name}: {len(found)} statistics were loaded, {size} are needed: the adapter file is damaged"
                )


def holding_of(delta: BlockDelta) -> Holding:
    """What a module holds, as allocators see it."""
    free = tuple(delta.sizes[i] for i in delta.free)
    return Holding(delta.rank, free, delta.in_features + delta.out_features)


def finished(deltas: Sequence[BlockDelta]) -> list[Change]:
    """The events that say of every module that nothing will change any more."""
    return [Change(i, 0, kind="finish") for i in range(len(deltas))]


def dtype_of(delta: BlockDelta) -> torch.dtype:
    """Of statistics: products of two averages underflow in half precision."""
    return torch.float64 if next(delta.parameters()).dtype == torch.float64 else torch.float32
