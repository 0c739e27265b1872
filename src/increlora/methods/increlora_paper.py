"""IncreLoRA's published code, quirk by quirk; each is a switch, so that each can be turned off.

    ΔW = s · B diag(e) A,   s = α / (active rank + 1e-5)        growth makes what was learnt smaller
    A, B ~ N(0, 0.02²), e = 0                                   a reserve block more, its e fixed at 1e-5, learns
    all modules at or above the k-th largest Ŝ grow             k = min(top_h, ranks left)
    new tensors restart the linear schedule of the host

Source: IncreLoRA (arXiv 2308.12043), its published code.   Differs: docs/methods/increlora.md
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..decide.budget import Budget, block_sizes
from ..decide.schedules import Run, in_steps, linear_clock, ramp_clock
from ..decide.selection import grow_published, grow_top
from ..deltas import Init, TripletDelta
from ..errors import ConfigError
from ..rules import Grow, Score
from .base import Method, Penalty, Site, in_blocks, matching
from .increlora import IncreLoraOptions
from .initial import Shape, gaussian, lora_start, ones
from .scaling import scale_of

RESERVE_E = 1e-5  # e of a block that learns in reserve


@dataclass(frozen=True)
class IncreLoraPaper(IncreLoraOptions):
    """IncreLoRA as published: the options of IncreLoRA, and the switches that only its published code has.

    Switches of the published code
        selection: `published` (ties and overshoot; no parameter bound), or `exact`.
        reserve: blocks next in line are `trained` in advance, `frozen` (published code without advance learning:
            they count in the penalty only), or there are `none`.
        finish: when the budget is spent, `keep` training the reserve without effect, or `retire` it.
        score_norm: of the score, over `sqrt_numel` (code) or `mean` (paper).
        score_accumulation: over micro-batches: the `last` decides, or `mean`, `exact`.
        scaling: α / (active rank + scale_epsilon) (`active_rank`; α ≤ 0 stands for init_r), or α / average rank of
            the budget (`constant`).   scale_epsilon: see `scaling`.
        start, newborn: initial values of the first and of later blocks: `published` (A, B ~ N(0, 0.02²); e = 0, in
            reserve 1e-5) or `lora` (A Kaiming, B = 0, e = 1).
        clock: newborn tensors follow the `published` restart of the host's linear schedule, whose warm-up is
            birth_warmup, or a `ramp` to its learning rate.
        orthogonality_form: `trainer` (norms, code) or `squared` (paper).
        penalty_place: whether gradient clipping sees the penalty.
    """

    selection: Literal["exact", "published"] = "published"
    reserve: Literal["trained", "frozen", "none"] = "trained"
    finish: Literal["retire", "keep"] = "keep"
    score_norm: Literal["sqrt_numel", "mean"] = "sqrt_numel"
    score_accumulation: Literal["mean", "last", "exact"] = "last"
    scaling: Literal["constant", "active_rank"] = "active_rank"
    scale_epsilon: float = 1e-5
    start: Literal["lora", "published"] = "published"
    newborn: Literal["lora", "published"] = "published"
    clock: Literal["ramp", "published"] = "published"
    orthogonality_form: Literal["trainer", "squared"] = "trainer"
    penalty_place: Literal["after_clipping", "before_clipping"] = "before_clipping"

    @classmethod
    def paper(cls, r: int = 2, **overrides: Any) -> Self:
        """The published code, step by step, its quirks included; `overrides` are further options by name.

        Unless given, warmup_steps = interval_steps = birth_warmup = 100 and top_h = 5 (its RTE script)."""
        script = {
            "r": r, "lora_alpha": 16, "warmup_steps": 100, "interval_steps": 100, "top_h": 5, "score_window": None,
            "birth_warmup": overrides.get("warmup_steps", 100), "orthogonality": 0.1,
        }  # fmt: skip
        return cls(**script | overrides)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reserve == "trained" and self.newborn != "published":
            raise ConfigError("reserve='trained' learns with e fixed at 1e-5: set newborn='published' beside it")
        if self.selection == "published" and self.total_parameters is not None:
            raise ConfigError("selection='published' counts ranks: use `r` or `total_ranks`, or selection='exact'")

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget, mean_rank, top_h = self.spending(sites, uniform_parameters)
        exact = self.selection == "exact"
        if not exact:
            budget = Budget(budget.ranks, exact=False)  # it knows no parameter bound
        rule = Grow(
            schedule=partial(self.events, top_h=top_h, budget=budget, strict=exact),
            allocate=partial(grow_top if exact else grow_published, top_h=top_h, budget=budget),
            score=Score(
                self.score, self.score_norm, self.beta, self.beta_uncertainty, self.score_window,
                self.score_accumulation,
            ),
            reserve=self.reserve,
            on_finish=self.finish,
        )  # fmt: skip
        penalty = Penalty(self.orthogonality, self.orthogonality_form, self.penalty_place)
        return Method(
            "increlora", partial(self._delta, mean_rank=mean_rank, top_h=top_h), budget, (rule,),
            penalty if self.orthogonality else None, self._clock, self.total_steps,
        )  # fmt: skip

    def _delta(self, site: Site, *, mean_rank: float, top_h: int) -> TripletDelta:
        lora = lora_start(site.inputs, random=not self.init_lora_weights) | {"E": ones}
        exact = self.selection == "exact"
        sizes = self.blocks(site, mean_rank) if exact else self._published_blocks(site, mean_rank, top_h)
        init = {letter: partial(self._initial, own, letter == "E") for letter, own in lora.items()}
        scale = partial(self._scale, mean_rank=mean_rank)
        delta = in_blocks(TripletDelta, self, site, sizes, init=init, scale=scale)
        delta.reserve_learns = self.reserve == "trained"
        return delta

    def _published_blocks(self, site: Site, mean_rank: float, top_h: int) -> list[int]:
        events = math.ceil((mean_rank - self.init_r) * site.sites / (top_h * self.step_ranks))
        bound = self.init_r + self.step_ranks * (events + 1)  # the published one, and the reserve behind it
        capacity = matching(self.capacity_pattern, site.name) or self.capacity or bound
        return block_sizes(start=self.init_r, grow_by=self.step_ranks, capacity=capacity, tails=0)

    def _scale(self, rank: int, *, mean_rank: float) -> float:
        if self.scaling == "constant":
            return scale_of(self.lora_alpha, mean_rank, rslora=self.use_rslora)
        alpha = self.lora_alpha if self.lora_alpha > 0 else self.init_r
        return scale_of(alpha, rank + self.scale_epsilon, rslora=self.use_rslora)

    def _initial(self, lora: Init, e: bool, shape: Shape, generator: torch.Generator, block: int) -> Tensor:
        if (self.start if block == 0 else self.newborn) != "published":
            return lora(shape, generator, block)
        if not e:
            return gaussian(shape, generator, block)
        return torch.full(shape, RESERVE_E if block > 0 and self.reserve == "trained" else 0.0, dtype=torch.float64)

    def _clock(self, step: int, created: int, run: Run) -> tuple[float, float | None]:
        warmup = in_steps(self.birth_warmup, run, name="birth_warmup")
        if self.clock == "ramp":
            return ramp_clock(step, created, warmup=warmup), None
        if run.steps is None:
            in_steps(1.0, run, name="clock='published'")
        clock = partial(linear_clock, step, warmup=warmup, total=run.steps or 0)
        return clock(created), clock(-1)
