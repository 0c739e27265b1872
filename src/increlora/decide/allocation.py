"""Decisions as data: the ranks a module has, and the events that change them. No tensors are used here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["birth", "retirement", "reserve", "saturation", "restart", "finish"]


@dataclass(frozen=True)
class Holding:
    """One module as an allocator sees it.

    Attributes:
        rank: active ranks.   free: sizes of the inactive blocks, in the order of birth.
        cost: parameters of one rank, in + out.
    """

    rank: int
    free: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class Grant:
    """Ranks given to one module: the position of the granted block in its `free` list."""

    module: int
    block: int
    ranks: int


@dataclass(frozen=True)
class Plan:
    """Result of one allocation: grants in order, modules skipped because they are full, whether the budget is spent."""

    grants: tuple[Grant, ...] = ()
    saturated: tuple[int, ...] = ()
    spent: bool = False


@dataclass(frozen=True)
class Event:
    """A change to a module at a step; one row of `events.jsonl`.

    ranks: change of the module's rank; negative for a retirement.   rank: active rank afterwards."""

    step: int
    kind: Kind
    module: str
    ranks: int
    rank: int
    importance: float | None = None


def with_block(holding: Holding, position: int) -> Holding:
    """The holding once the block at this position of `free` is active."""
    free = holding.free
    return replace(holding, rank=holding.rank + free[position], free=free[:position] + free[position + 1 :])


def granted(holdings: Sequence[Holding], plan: Plan) -> list[Holding]:
    """What the modules hold after a plan was carried out."""
    state = list(holdings)
    for grant in plan.grants:
        state[grant.module] = with_block(state[grant.module], grant.block)
    return state


def ranks_used(holdings: Sequence[Holding]) -> int:
    """Active ranks over all modules."""
    return sum(h.rank for h in holdings)


def parameters_used(holdings: Sequence[Holding]) -> int:
    """Active adapter parameters in LoRA form, Σ rank · (in + out)."""
    return sum(h.rank * h.cost for h in holdings)
