"""AdaLoRA's published code, quirk by quirk; each is a switch, so that each can be turned off.

    ΔW = s · B diag(e) A,   s = α / (init_r + 1e-5)      A, B ~ N(0, 0.02²), e = 0 at the start
    |w ∘ ∂L/∂w|                                          w after the optimizer's step, its gradient from before
    e_i ← 0 for all at or below the (n − b)-th smallest S_i of n ranks, at most one step late

Source: AdaLoRA (arXiv 2303.10512), its published code.   Differs: docs/methods/adalora.md
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from ..decide.budget import Budget
from ..decide.selection import keep_published, keep_top
from ..deltas import TripletDelta
from ..rules import Keep
from .adalora import AdaLoraOptions
from .base import Method, Penalty, Site, budget_of
from .falling import cubic_of, first_rank, pruned
from .initial import gaussian, lora_start, ones, zeros
from .scaling import fixed, scale_of


@dataclass(frozen=True)
class AdaLoraPaper(AdaLoraOptions):
    """AdaLoRA as published: the options of AdaLoRA, and the switches that only its published code has.

    Switches of the published code
        selection: `published` (ties at the threshold all go; no parameter bound; `init_r` whatever the shape; the
            last cut waits for one step more unless it falls on a multiple of `interval_steps`), or `exact`.
        observe: entries are scored with the weights `after_step` (code), or `before_step` (as the paper states).
        scaling: α / (init_r + scale_epsilon) (`initial_rank`; α ≤ 0 stands for init_r), or α / average rank at the
            end (`constant`).   scale_epsilon: see `scaling`.
        start: initial values `published` (A, B ~ N(0, 0.02²), e = 0) or `lora` (A Kaiming, B = 0, e = 1).
        orthogonality_form: `trainer` (norms, code) or `squared` (paper).
        penalty_place: whether gradient clipping sees the penalty.
    """

    selection: Literal["exact", "published"] = "published"
    observe: Literal["before_step", "after_step"] = "after_step"
    scaling: Literal["constant", "initial_rank"] = "initial_rank"
    scale_epsilon: float = 1e-5
    start: Literal["lora", "published"] = "published"
    orthogonality_form: Literal["trainer", "squared"] = "trainer"
    penalty_place: Literal["after_clipping", "before_clipping"] = "before_clipping"

    @classmethod
    def paper(cls, r: int = 2, **overrides: Any) -> Self:
        """The published code, step by step; `overrides` are further options by name.

        Unless given, init_r is that of the paper's tables (1 → 2, 2 → 4, 4 → 6, 8 → 12), and warmup_steps = 600,
        settle_steps = 1800, interval_steps = 1, lora_alpha = 32 (its RTE script)."""
        script = {
            "r": r, "init_r": {1: 2, 2: 4}.get(r, first_rank(r)), "lora_alpha": 32, "warmup_steps": 600,
            "settle_steps": 1800, "interval_steps": 1, "orthogonality": 0.1,
        }  # fmt: skip
        return cls(**script | overrides)

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget, exact = budget_of(self, sites, uniform_parameters), self.selection == "exact"
        if not exact:
            budget = Budget(budget.ranks, exact=False)  # it knows no parameter bound
        schedule = partial(cubic_of, self, late=not exact)
        keep = keep_top if exact else keep_published
        rule = Keep(schedule, keep, self.observe, self.beta, self.beta_uncertainty)
        penalty = Penalty(self.orthogonality, self.orthogonality_form, self.penalty_place)
        return Method(
            "adalora", partial(self._delta, mean_rank=(budget.ranks or 0) / sites), budget, (rule,),
            penalty if self.orthogonality else None, total_steps=self.total_steps,
        )  # fmt: skip

    def _delta(self, site: Site, *, mean_rank: float) -> TripletDelta:
        wanted = self.init_r or first_rank(mean_rank)
        rank = wanted if self.selection == "published" else min(wanted, site.in_features, site.out_features)
        published = {"A": gaussian, "E": zeros, "B": gaussian}
        lora = lora_start(site.inputs, random=not self.init_lora_weights) | {"E": ones}
        constant = self.scaling == "constant"
        alpha = self.lora_alpha if constant or self.lora_alpha > 0 else wanted
        over = mean_rank if constant else wanted + self.scale_epsilon
        scale = partial(fixed, scale_of(alpha, over, rslora=self.use_rslora))
        return pruned(self, site, rank, init=published if self.start == "published" else lora, scale=scale)
