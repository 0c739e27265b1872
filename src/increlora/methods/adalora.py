"""AdaLoRA: every module starts with more ranks than it may keep; the triplets that matter least go, a few at a time.

    ΔW = s · B diag(e) A                                     one triplet (column of B, entry of e, row of A) per rank
    I ← β₁ I + (1−β₁) |w ∘ ∂L/∂w|    U ← β₂ U + (1−β₂) | |w ∘ ∂L/∂w| − I |          for every entry w of A, e and B
    S_i = s(e_i) + mean_j s(A_ij) + mean_j s(B_ji)           with s = I · U
    after each `interval_steps`: e_i ← 0 for all but the b(t) ranks with the largest S_i over all modules

b(t) falls from the initial ranks to the target along a cubic; a dropped triplet may come back until it has fallen.

Source: AdaLoRA (arXiv 2303.10512), algorithm 1; published code: `adalora_paper`.   Differs: docs/methods/adalora.md
"""

from dataclasses import dataclass
from functools import partial

from ..decide.schedules import Time
from ..decide.selection import keep_top
from ..deltas import TripletDelta
from ..rules import Keep
from .base import Method, Penalty, Site, budget_of
from .falling import check_start, cubic_of, first_rank, pruned
from .initial import lora_start, ones
from .options import Count, LoraOptions, Share, Weight
from .scaling import fixed, scale_of


@dataclass(frozen=True)
class AdaLoraOptions(LoraOptions):
    """Every option of AdaLoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
    Pruning
        init_r: rank of every module at the start, at most what its shape can use; default 1.5 times the average at the
            end, rounded up.
        warmup_steps: no cut at or before this step.   settle_steps: at the end, with the ranks that are left; ≥ 1.
        interval_steps: cuts at its multiples; between them dropped ranks may come back.
        beta, beta_uncertainty: moving averages of |w · ∂L/∂w|, in [0, 1).
    Form
        lora_alpha: numerator α of the scale α / average rank at the end.   use_rslora: α over the root of that.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
        orthogonality: weight of the penalty, ≥ 0; 0 turns it off.
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    """

    use_rslora: bool = False
    total_ranks: Count | None = None
    init_r: Count | None = None
    warmup_steps: Time = 0.1
    settle_steps: Time = 0.4
    interval_steps: Time = 0.01
    beta: Share = 0.85
    beta_uncertainty: Share = 0.85
    orthogonality: Weight = 0.0
    total_steps: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self)


@dataclass(frozen=True)
class AdaLora(AdaLoraOptions):
    """The method for a model with `sites` adapted modules; its options are those of `AdaLoraOptions`."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget = budget_of(self, sites, uniform_parameters)
        rule = Keep(partial(cubic_of, self), keep_top, "before_step", self.beta, self.beta_uncertainty)
        penalty = Penalty(self.orthogonality) if self.orthogonality else None
        delta = partial(self._delta, mean_rank=(budget.ranks or 0) / sites)
        return Method("adalora", delta, budget, (rule,), penalty, total_steps=self.total_steps)

    def _delta(self, site: Site, *, mean_rank: float) -> TripletDelta:
        rank = min(self.init_r or first_rank(mean_rank), site.in_features, site.out_features)
        init = lora_start(site.inputs, random=not self.init_lora_weights) | {"E": ones}
        scale = partial(fixed, scale_of(self.lora_alpha, mean_rank, rslora=self.use_rslora))
        return pruned(self, site, rank, init=init, scale=scale)
