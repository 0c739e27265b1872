"""The parts of a method that the runtime gives effect to, as data: how to score, what to penalise, what to prune."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..decide.budget import Budget
from ..decide.penalties import PenaltyForm
from ..decide.projections import Group
from ..decide.schedules import CubicDecay, Levels, PruneSteps, RestartSteps, Run
from ..decide.scores import Norm


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
        close_after: a rank that did not count at so many cuts in a row is not computed any more; None: only what does
            not count at the last cut.
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


@dataclass(frozen=True)
class Restarts:
    """What was learnt is put aside and stays part of the function; learning begins anew at zero, in other directions.

    Attributes:
        schedule: run → when.
    """

    schedule: Callable[[Run], RestartSteps]
