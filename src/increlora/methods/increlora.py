"""IncreLoRA: every module starts at rank 1; rank is added where the loss is most sensitive, until a budget is spent.

    ΔW = s · B diag(e) A                              a new block has B = 0 and e = 1: growth does not move ΔW
    S = Σ|ΔW ∘ ∂L/∂ΔW| / √(mn)                        score of a module, in the steps before an event
    I ← β₁ I + (1−β₁) S    U ← β₂ U + (1−β₂)|I − S|    importance Ŝ = I · U
    event at each multiple of `interval_steps` after `warmup_steps`: the `top_h` modules with the largest Ŝ grow

Source: IncreLoRA (arXiv 2308.12043), section 3; published code: `increlora_paper`.   Differs: docs/methods/increlora.md
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from ..decide.allocation import Holding, ranks_used
from ..decide.budget import Budget, block_sizes, default_capacity
from ..decide.feasibility import check_reachable
from ..decide.schedules import GrowthSteps, Run, Time, in_steps, ramp_clock
from ..decide.selection import grow_top
from ..deltas import TripletDelta
from ..errors import BudgetError
from ..rules import Grow, Score
from .base import Method, Penalty, Site, budget_of, in_blocks, matching
from .initial import lora_start, ones
from .options import Count, LoraOptions, Share, Weight
from .scaling import fixed, scale_of

DEFAULT_EVENTS = 10  # growth events of a run whose `top_h` is not set


@dataclass(frozen=True)
class IncreLoraOptions(LoraOptions):
    """Every option of IncreLoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
        total_parameters: bound on Σ rank · (in + out); short by less than one grant.
    Growth
        init_r: rank of every module at the start.   grow_by: ranks per grant; default max(1, r // 2).
        top_h: modules per event, more where the run's last events would not meet the budget; default: the budget is
            spent in 10 events, or in as many as a short run has.
        warmup_steps: no event at or before this step.   interval_steps: events at its multiples.
        capacity: most ranks a module can ever hold; default max(8, 4 r).   capacity_pattern: per module name (regex).
    Score
        score: `delta`, or the cheap `signed`.   beta, beta_uncertainty: moving averages, in [0, 1).
        score_window: steps scored before an event; None: all.
        score_accumulation: over micro-batches: `mean` of their scores, or `exact`, the score of the whole batch.
    Form
        lora_alpha: numerator α of the scale α / average rank of the budget.   use_rslora: α over the root of that.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
        birth_warmup: new ranks take so long to reach the host's learning rate.
        orthogonality: weight of the penalty, ≥ 0; 0 turns it off.
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    """

    use_rslora: bool = False
    total_ranks: Count | None = None
    total_parameters: Count | None = None
    init_r: Count = 1
    grow_by: Count | None = None
    top_h: Count | None = None
    warmup_steps: Time = 0.05
    interval_steps: Time = 0.03
    capacity: Count | None = None
    capacity_pattern: Mapping[str, int] = field(default_factory=dict)
    score: Literal["delta", "signed"] = "delta"
    beta: Share = 0.85
    beta_uncertainty: Share = 0.85
    score_window: int | None = 8
    birth_warmup: Time = 0.03
    orthogonality: Weight = 0.0
    total_steps: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_ranks is None and self.total_parameters is None and self.r < self.init_r:
            raise BudgetError(f"r={self.r} is below the start of init_r={self.init_r} ranks per module: lower `init_r`")

    @property
    def step_ranks(self) -> int:
        """Ranks per grant."""
        return self.grow_by or max(1, self.r // 2)

    def spending(self, sites: int, uniform_parameters: int) -> tuple[Budget, float, int]:
        """The budget, its average rank per module, and the number of modules that grow at an event."""
        budget = budget_of(self, sites, uniform_parameters)
        mean_rank = budget.ranks / sites if budget.ranks else (budget.parameters or 0) / uniform_parameters
        even = math.ceil((mean_rank - self.init_r) * sites / self.step_ranks / DEFAULT_EVENTS)
        return budget, mean_rank, self.top_h or max(1, even)

    def blocks(self, site: Site, mean_rank: float) -> list[int]:
        """Ranks of the blocks of a module."""
        usual = default_capacity(math.ceil(mean_rank), site.in_features, site.out_features)
        capacity = matching(self.capacity_pattern, site.name) or self.capacity or usual
        tails = math.ceil((self.step_ranks - 1) / site.sites)
        return block_sizes(start=self.init_r, grow_by=self.step_ranks, capacity=capacity, tails=tails)

    def events(
        self, run: Run, holdings: Sequence[Holding], first: int, *, top_h: int, budget: Budget, strict: bool = True
    ) -> GrowthSteps:
        """When modules grow in this run; see `check_reachable`."""
        warmup = in_steps(self.warmup_steps, run, name="warmup_steps")
        steps = GrowthSteps(warmup, in_steps(self.interval_steps, run, name="interval_steps", least=1))
        if budget.ranks is not None and run.steps is not None:
            missing, each = budget.ranks - ranks_used(holdings), top_h * self.step_ranks
            if strict and self.top_h is None:  # one event is enough: events grant what the rest of the run needs
                each = max(1, missing)
            check_reachable(steps, first, run.steps, missing=missing, per_event=each, strict=strict)
        return steps


@dataclass(frozen=True)
class IncreLora(IncreLoraOptions):
    """The method for a model with `sites` adapted modules; its options are those of `IncreLoraOptions`."""

    score_accumulation: Literal["mean", "exact"] = "mean"

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget, mean_rank, top_h = self.spending(sites, uniform_parameters)
        rule = Grow(
            schedule=partial(self.events, top_h=top_h, budget=budget),
            allocate=partial(grow_top, top_h=top_h, budget=budget),
            score=Score(
                self.score, beta=self.beta, beta_uncertainty=self.beta_uncertainty, window=self.score_window,
                accumulate=self.score_accumulation,
            ),
        )  # fmt: skip
        penalty = Penalty(self.orthogonality) if self.orthogonality else None
        delta = partial(self._delta, mean_rank=mean_rank)
        return Method("increlora", delta, budget, (rule,), penalty, self._clock, self.total_steps)

    def _delta(self, site: Site, *, mean_rank: float) -> TripletDelta:
        init = lora_start(site.inputs, random=not self.init_lora_weights) | {"E": ones}
        scale = partial(fixed, scale_of(self.lora_alpha, mean_rank, rslora=self.use_rslora))
        return in_blocks(TripletDelta, self, site, self.blocks(site, mean_rank), init=init, scale=scale)

    def _clock(self, step: int, created: int, run: Run) -> tuple[float, float | None]:
        return ramp_clock(step, created, warmup=in_steps(self.birth_warmup, run, name="birth_warmup")), None
