"""AdaLoRA: every module starts with more ranks than it may keep; the triplets that matter least go, a few at a time.

    ΔW = s · B diag(e) A                                     one triplet (column of B, entry of e, row of A) per rank
    I ← β₁ I + (1−β₁) |w ∘ ∂L/∂w|    U ← β₂ U + (1−β₂) | |w ∘ ∂L/∂w| − I |          for every entry w of A, e and B
    S_i = s(e_i) + mean_j s(A_ij) + mean_j s(B_ji)           with s = I · U
    after each `interval_steps`: e_i ← 0 for all but the b(t) ranks with the largest S_i over all modules

b(t) falls from the initial ranks to the target along a cubic; a dropped triplet may come back until it has fallen.

Source: AdaLoRA (arXiv 2303.10512), algorithm 1, and its published code.   Differs: docs/methods/adalora.md
"""

from functools import partial

from ..decide.budget import Budget, resolve
from ..decide.selection import keep_published, keep_top
from ..deltas import Status, TripletDelta
from ..rules import Keep
from .adalora_settings import AdaLoraSettings
from .base import Method, Penalty, Site
from .falling import cubic_of, first_rank
from .initial import gaussian, lora_start, ones, zeros
from .scaling import fixed, scale_of


class AdaLora(AdaLoraSettings):
    """Settings (see `AdaLoraSettings`) and how they become a method for a model with `sites` adapted modules."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget = resolve(
            r=self.r, total_ranks=self.total_ranks, total_parameters=None, uniform_parameters=uniform_parameters,
            modules=sites,
        )  # fmt: skip
        if self.selection == "published":
            budget = Budget(budget.ranks, exact=False)  # the published code knows no parameter bound
        mean_rank = (budget.ranks or 0) / sites
        keep = {"exact": keep_top, "published": keep_published}[self.selection]
        schedule = partial(cubic_of, self, late=self.selection == "published")
        return Method(
            name="adalora",
            make_delta=partial(self._delta, mean_rank=mean_rank),
            budget=budget,
            rules=(Keep(schedule, keep, self.observe, self.beta, self.beta_uncertainty),),
            penalty=Penalty(self.orthogonality, self.orthogonality_form, self.penalty_place)
            if self.orthogonality
            else None,
            total_steps=self.total_steps,
        )

    def _delta(self, site: Site, *, mean_rank: float) -> TripletDelta:
        wanted = self.init_r or first_rank(mean_rank)
        rank = wanted if self.selection == "published" else min(wanted, site.in_features, site.out_features)
        published = {"A": gaussian, "E": zeros, "B": gaussian}
        lora = {**lora_start(site.inputs, random=not self.init_lora_weights), "E": ones}
        delta = TripletDelta(
            site.in_features, site.out_features, [rank],
            init=published if self.start == "published" else lora,
            scale=partial(fixed, self._scale(wanted, mean_rank)),
            name=site.name, seed=self.seed, dropout=self.lora_dropout, dtype=site.dtype,
            inputs=site.inputs,
        )  # fmt: skip
        delta.status[0], delta.kept = Status.ACTIVE, [True] * rank
        return delta

    def _scale(self, start: int, mean_rank: float) -> float:
        if self.scaling == "constant":
            return scale_of(self.lora_alpha, mean_rank, rslora=self.use_rslora)
        alpha = self.lora_alpha if self.lora_alpha > 0 else start
        return scale_of(alpha, start + self.scale_epsilon, rslora=self.use_rslora)
