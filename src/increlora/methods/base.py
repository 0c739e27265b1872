"""A method as data: which delta, which score, which schedule, which allocator. The runtime does the rest."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch

from ..allocation import Holding, Plan
from ..budget import Budget
from ..deltas import Delta
from ..penalties import PenaltyForm
from ..projections import Group
from ..schedules import CubicDecay, GrowthSteps, Levels, PruneSteps, Run
from ..scores import Norm

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Site:
    """One linear map that gets a delta: its full name, shape, and the totals over all sites of the model.

    peers: (name, in, out) of every site in model order, for methods that look at a module's place among them."""

    name: str
    in_features: int
    out_features: int
    sites: int  # adapted modules in the model
    uniform_parameters: int  # Σ over sites of (in + out): parameters of rank 1 everywhere
    dtype: torch.dtype | None = None  # of the adapter's parameters; default: torch's
    peers: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class ScoreRule:
    """How a module's importance is measured.

    Attributes:
        kind: `delta` (entry-wise |ΔW∘G|, needs the tap) or `signed` (|⟨B, ∂L/∂B⟩|, from gradients alone).
        norm: see `scores.normaliser`.   beta, beta_uncertainty: moving averages, see `scores.smooth`.
        window: only the last `window` steps before an event are scored; None: every step.
        accumulate: over micro-batches and repeated uses of a module: `mean` of their scores, `last` backward call (as
            published), or `exact` (inputs and output gradients are kept until the step: the score of the whole batch).
    """

    kind: Literal["delta", "signed"] = "delta"
    norm: Norm = "sqrt_numel"
    beta: float = 0.85
    beta_uncertainty: float = 0.85
    window: int | None = None
    accumulate: Literal["mean", "last", "exact"] = "mean"


@dataclass(frozen=True)
class PenaltyRule:
    """Orthogonality of the components, or size of the gates (`l1`); `place` says whether gradient clipping sees it."""

    weight: float
    form: PenaltyForm = "trainer"
    place: Literal["after_clipping", "before_clipping"] = "after_clipping"


@dataclass(frozen=True)
class RankPruning:
    """Start rich and keep the ranks that matter, by the sensitivity of each entry of their parameters.

    Attributes:
        schedule: (run, ranks at the start, ranks at the end) → how many may stay at each step.
        keep: (scores of the ranks by module, parameters of one rank by module, budget now) → which stay.
        observe: entries are scored as |w_t · g_t|, `before_step`, or as |w_{t+1} · g_t|, `after_step` (published code).
        beta, beta_uncertainty: moving averages, see `scores.smooth_entries`.
    """

    schedule: Callable[[Run, int, int], CubicDecay]
    keep: Callable[[Sequence[Sequence[float]], Sequence[int], Budget], list[list[bool]]]
    observe: Literal["before_step", "after_step"] = "before_step"
    beta: float = 0.85
    beta_uncertainty: float = 0.85


@dataclass(frozen=True)
class GateShrinking:
    """Gates (e, one per rank) are pulled towards zero after each step; a rank whose gate is zero does not count.

    Attributes:
        shrink: (gates, threshold) → gates; see `projections`.
        schedule: (run, ranks at the start, ranks at the end) → when ranks are counted, how many may stay, and when that
            is final.
        thresholds: run → threshold of every step; None: chosen at each cut so that as many gates as must go reach zero
            by the next one, and the budget is met exactly.
        keep: as in `RankPruning`, of |gate|; for budgets.
        by_rate: the threshold is a multiple of the gates' learning rate.
        close_after: a rank that did not count at so many cuts in a row is not computed any more; None: only once all is
            final, and never where `schedule` is over before.
    """

    shrink: Callable[[torch.Tensor, float], torch.Tensor]
    schedule: Callable[[Run, int, int], CubicDecay]
    thresholds: Callable[[Run], Levels] | None
    keep: Callable[[Sequence[Sequence[float]], Sequence[int], Budget], list[list[bool]]]
    by_rate: bool = False
    close_after: int | None = None


@dataclass(frozen=True)
class EntryPruning:
    """Set the entries of A to zero that matter least for the inputs there are, again and again; ranks stay.

    Attributes:
        schedule: run → when.   share: of the entries of each `group`, in [0, 1).
        beta: moving average of the input norms.   interval: of its updates, in steps.
        regrow: the optimizer may move a zero until the next pruning; otherwise zeros are held.
    """

    schedule: Callable[[Run], PruneSteps]
    share: float
    group: Group
    beta: float
    interval: int
    regrow: bool


class Clock(Protocol):
    """Learning rate of a tensor created at `created` (−1: with the model), as (own, host).

    host None: own is a share of the host's current rate. Otherwise both are in units of its peak rate: own is what the
    tensor gets, host what the schedule the clock was made for would give the model's own tensors."""

    def __call__(self, step: int, created: int, run: Run) -> tuple[float, float | None]: ...


@dataclass(frozen=True)
class Method:
    """Everything the runtime needs to know about a method. None: the method has no such part.

    Attributes:
        make_delta: site → delta.
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
    prune: RankPruning | GateShrinking | EntryPruning | None = None
    total_steps: int | None = None

    @property
    def adaptive(self) -> bool:
        """Does this method need the runtime to drive it?"""
        return self.allocate is not None or self.penalty is not None or self.prune is not None


def matching(patterns: Mapping[str, Value], name: str) -> Value | None:
    """Value of the first pattern that matches a full module name or its ending, as peft's `rank_pattern` does."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)
