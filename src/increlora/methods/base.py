"""A method as data: which delta, which score, which schedule, which allocator. The runtime does the rest."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch

from ..decide.allocation import Holding, Plan
from ..decide.budget import Budget
from ..decide.schedules import GrowthSteps, Run
from ..deltas import Delta, Inputs, Patches, Stored, Tokens, Vectors
from ..deltas.inputs import VECTORS
from .rules import EntryPruning, GateShrinking, PenaltyRule, RankPruning, Restarts, ScoreRule

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Site:
    """One linear map, embedding or convolution that gets a delta: its full name, its shape as a matrix, and the totals
    over all sites of the model.

    peers: (name, in, out) of every site in model order, for methods that look at a module's place among them.
    shared: what `Method.make_shared` made, where the method has such.   inputs: what the module reads."""

    name: str
    in_features: int
    out_features: int
    sites: int  # adapted modules in the model
    uniform_parameters: int  # Σ over sites of (in + out): parameters of rank 1 everywhere
    dtype: torch.dtype | None = None  # of the adapter's parameters; default: torch's
    peers: tuple[tuple[str, int, int], ...] = ()
    shared: Stored | None = None
    inputs: Inputs = VECTORS


class Clock(Protocol):
    """Learning rate of a tensor created at `created` (−1: with the model), as (own, host).

    host None: own is a share of the host's current rate. Otherwise both are in units of its peak rate: own is what the
    tensor gets, host what the schedule the clock was made for would give the model's own tensors."""

    def __call__(self, step: int, created: int, run: Run) -> tuple[float, float | None]: ...


LOW_RANK_READS: tuple[type[Inputs], ...] = (Vectors, Tokens, Patches)  # whatever a low-rank product can meet


def anywhere(name: str) -> bool:
    """Most methods can adapt any linear map."""
    return True


@dataclass(frozen=True)
class Method:
    """Everything the runtime needs to know about a method. None: the method has no such part.

    Attributes:
        make_delta: site → delta.
        make_shared: sites (without it) → the parameters that all deltas of an adapter share; the model owns them.
        places: can the method adapt a module of this name? "all-linear" means those that it can.
        reads: the kinds of input that its deltas can meet.
        budget: what may be active at the end.
        score, events, allocate: who deserves rank, when it is handed out (run, holdings, first step → steps), to whom.
        reserve: the block next in line of every module is `trained` before it is born, or held `frozen` (it counts in
            the penalty alone), or there is `none`.
        on_finish: what happens to the reserve when the budget is spent: `retire` it, or keep training it with e = 0.
        penalty, clock: regulariser, and learning rate of newborn tensors.
        prune: what is done to the parameters after the host's step.
    """

    name: str
    make_delta: Callable[[Site], Delta]
    budget: Budget
    score: ScoreRule | None = None
    events: Callable[[Run, Sequence[Holding], int], GrowthSteps] | None = None
    allocate: Callable[[Sequence[float], Sequence[Holding]], Plan] | None = None
    reserve: Literal["trained", "frozen", "none"] = "none"
    on_finish: Literal["retire", "keep"] = "retire"
    penalty: PenaltyRule | None = None
    clock: Clock | None = None
    prune: RankPruning | GateShrinking | EntryPruning | Restarts | None = None
    total_steps: int | None = None
    make_shared: Callable[[Sequence[Site]], Stored] | None = None
    places: Callable[[str], bool] = anywhere
    reads: tuple[type[Inputs], ...] = (Vectors,)

    @property
    def adaptive(self) -> bool:
        """Does this method need the runtime to drive it?"""
        return self.allocate is not None or self.penalty is not None or self.prune is not None


def matching(patterns: Mapping[str, Value], name: str) -> Value | None:
    """Value of the first pattern that matches a full module name or its ending, as peft's `rank_pattern` does."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)
