"""IncreLoRA: every module starts at rank 1; rank is added where the loss is most sensitive, until a budget is spent.

    ΔW = s · B diag(e) A                              with a reserve block more, its e fixed at 1e-5, trained in advance
    S = Σ|ΔW ∘ ∂L/∂ΔW| / √(mn)                        score of a module, once per optimizer step
    I ← β₁ I + (1−β₁) S    U ← β₂ U + (1−β₂)|I − S|    importance Ŝ = I · U
    event at each multiple of `interval_steps` after `warmup_steps`: the `top_h` modules with the largest Ŝ grow

Source: IncreLoRA (arXiv 2308.12043), section 3, and its published code.   Differs: docs/methods/increlora.md
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..decide.allocation import Holding, ranks_used
from ..decide.budget import Budget, block_sizes, default_capacity, resolve
from ..decide.schedules import GrowthSteps, Run, in_steps, linear_clock, ramp_clock
from ..decide.selection import grow_published, grow_top
from ..deltas import Init, Status, TripletDelta
from ..rules import Grow, Score
from .base import Method, Penalty, Site, matching
from .increlora_settings import IncreLoraSettings, check_reachable
from .initial import Shape, gaussian, lora_start, ones
from .scaling import scale_of

RESERVE_E = 1e-5  # e of a block that learns in reserve
DEFAULT_EVENTS = 10  # growth events of a run whose `top_h` is not set


class IncreLora(IncreLoraSettings):
    """Settings (see `IncreLoraSettings`) and how they become a method for a model with `sites` adapted modules."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget = resolve(
            r=self.r, total_ranks=self.total_ranks, total_parameters=self.total_parameters,
            uniform_parameters=uniform_parameters, modules=sites,
        )  # fmt: skip
        if self.selection == "published":
            budget = Budget(budget.ranks, exact=False)  # the published code knows no parameter bound
        mean_rank = budget.ranks / sites if budget.ranks else (budget.parameters or 0) / uniform_parameters
        top_h = self.top_h or max(1, math.ceil((mean_rank - self.init_r) * sites / self.step_ranks / DEFAULT_EVENTS))
        grow = {"exact": grow_top, "published": grow_published}[self.selection]
        return Method(
            name="increlora",
            make_delta=partial(self._delta, mean_rank=mean_rank, top_h=top_h),
            budget=budget,
            rules=(Grow(
                schedule=partial(self._events, top_h=top_h, budget=budget),
                allocate=partial(grow, top_h=top_h, budget=budget),
                score=Score(
                    self.score, self.score_norm, self.beta, self.beta_uncertainty, self.score_window,
                    self.score_accumulation,
                ),
                reserve=self.reserve,
                on_finish=self.finish,
            ),),
            penalty=Penalty(self.orthogonality, self.orthogonality_form, self.penalty_place)
            if self.orthogonality
            else None,
            clock=self._clock,
            total_steps=self.total_steps,
        )  # fmt: skip

    def _delta(self, site: Site, *, mean_rank: float, top_h: int) -> TripletDelta:
        capacity = self._capacity(site, mean_rank, top_h)
        sizes = block_sizes(
            start=self.init_r, grow_by=self.step_ranks, capacity=capacity,
            tails=0 if self.selection == "published" else math.ceil((self.step_ranks - 1) / site.sites),
        )  # fmt: skip
        lora = lora_start(site.inputs, random=not self.init_lora_weights)
        delta = TripletDelta(
            site.in_features, site.out_features, sizes,
            init={"E": self._initial_e, **{letter: partial(self._initial_factor, own) for letter, own in lora.items()}},
            scale=partial(self._scale, mean_rank=mean_rank),
            name=site.name, seed=self.seed, dropout=self.lora_dropout, dtype=site.dtype,
            inputs=site.inputs,
        )  # fmt: skip
        delta.reserve_learns = self.reserve == "trained"
        delta.status[0] = Status.ACTIVE
        return delta

    def _capacity(self, site: Site, mean_rank: float, top_h: int) -> int:
        chosen = matching(self.capacity_pattern, site.name) or self.capacity
        if chosen is not None:
            return chosen
        if self.selection == "exact":
            return default_capacity(math.ceil(mean_rank), site.in_features, site.out_features)
        events = math.ceil((mean_rank - self.init_r) * site.sites / (top_h * self.step_ranks))
        return self.init_r + self.step_ranks * (events + 1)  # the published bound, and the reserve behind it

    def _scale(self, rank: int, *, mean_rank: float) -> float:
        if self.scaling == "constant":
            return scale_of(self.lora_alpha, mean_rank, rslora=self.use_rslora)
        alpha = self.lora_alpha if self.lora_alpha > 0 else self.init_r
        return scale_of(alpha, rank + self.scale_epsilon, rslora=self.use_rslora)

    def _initial_factor(self, lora: Init, shape: Shape, generator: torch.Generator, block: int) -> Tensor:
        return (gaussian if self._published_start(block) else lora)(shape, generator, block)

    def _initial_e(self, shape: Shape, generator: torch.Generator, block: int) -> Tensor:
        if not self._published_start(block):
            return ones(shape, generator, block)
        return torch.full(shape, RESERVE_E if block > 0 and self.reserve == "trained" else 0.0, dtype=torch.float64)

    def _published_start(self, block: int) -> bool:
        return (self.start if block == 0 else self.newborn) == "published"

    def _events(self, run: Run, holdings: Sequence[Holding], first: int, *, top_h: int, budget: Budget) -> GrowthSteps:
        steps = GrowthSteps(
            in_steps(self.warmup_steps, run, name="warmup_steps"),
            in_steps(self.interval_steps, run, name="interval_steps", least=1),
        )
        if budget.ranks is not None and run.steps is not None:
            check_reachable(
                steps, first, run.steps, missing=budget.ranks - ranks_used(holdings),
                per_event=top_h * self.step_ranks, strict=self.selection == "exact",
            )  # fmt: skip
        return steps

    def _clock(self, step: int, created: int, run: Run) -> tuple[float, float | None]:
        warmup = in_steps(self.birth_warmup, run, name="birth_warmup")
        if self.clock == "ramp":
            return ramp_clock(step, created, warmup=warmup), None
        if run.steps is None:
            in_steps(1.0, run, name="clock='published'")
        clock = partial(linear_clock, step, warmup=warmup, total=run.steps or 0)
        return clock(created), clock(-1)
