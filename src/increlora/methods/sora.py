"""SoRA: a gate per rank, pulled towards zero by a proximal step; a rank whose gate is zero is gone.

    ΔW = s · B diag(e) A                                  e: the gates, one per rank
    e ← T_ξ( host's step on e ),    T_ξ(v) = sign(v) · max(|v| − ξ, 0)               after each optimizer step
    the rank of a module is the number of its gates that are not zero

At a budget (default) ξ is chosen: at each cut the b(t) ranks with the largest |e| over all modules stay, and until the
next cut ξ = |e| of the largest gate that has to go by then / steps until then. b(t) falls as AdaLoRA's does.

Source: SoRA (arXiv 2311.11696), proximal gradient step and algorithm 1, and its published code; the budget is ours.
Differs: docs/methods/sora.md
"""

from functools import partial

from ..decide.budget import Budget, resolve
from ..decide.projections import published_shrink, soft_threshold
from ..decide.schedules import Levels, Run, in_steps
from ..decide.selection import keep_top
from ..deltas import Status, TripletDelta
from ..rules import Shrink
from .base import Method, Penalty, Site
from .falling import cubic_of, first_rank
from .initial import lora_start, normal, ones
from .scaling import fixed, scale_of
from .sora_settings import SoraSettings


class Sora(SoraSettings):
    """Settings (see `SoraSettings`) and how they become a method for a model with `sites` adapted modules."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget = resolve(
            r=self.r, total_ranks=self.total_ranks, total_parameters=None, uniform_parameters=uniform_parameters,
            modules=sites,
        )  # fmt: skip
        if self.threshold is not None:
            budget = Budget(budget.ranks, budget.parameters, exact=False)  # the most there can be
        return Method(
            name="sora",
            make_delta=partial(self._delta, mean_rank=(budget.ranks or 0) / sites),
            budget=budget,
            rules=(
                Shrink(
                    {"exact": soft_threshold, "published": published_shrink}[self.operator],
                    partial(cubic_of, self),
                    self._levels if self.threshold is not None else None,
                    keep_top,
                    by_rate=self.threshold_unit == "learning_rate",
                    close_after=self.close_after,
                ),
            ),
            penalty=Penalty(self.gate_penalty, "l1", self.penalty_place) if self.gate_penalty else None,
            total_steps=self.total_steps,
        )

    def _delta(self, site: Site, *, mean_rank: float) -> TripletDelta:
        wanted = self.r if self.threshold is not None else self.init_r or first_rank(mean_rank)
        rank = min(wanted, site.in_features, site.out_features)
        over = mean_rank if self.scaling == "constant" else wanted
        scale = scale_of(self.lora_alpha, over, rslora=self.use_rslora)
        delta = TripletDelta(
            site.in_features, site.out_features, [rank],
            init={
                **lora_start(site.inputs, random=not self.init_lora_weights),
                "E": {"ones": ones, "normal": normal}[self.gate_init],
            },
            scale=partial(fixed, scale),
            name=site.name, seed=self.seed, dropout=self.lora_dropout, dtype=site.dtype,
            inputs=site.inputs,
        )  # fmt: skip
        delta.status[0], delta.kept = Status.ACTIVE, [True] * rank
        return delta

    def _levels(self, run: Run) -> Levels:
        warmup = in_steps(self.warmup_steps, run, name="warmup_steps")
        settle = in_steps(self.settle_steps, run, name="settle_steps", least=1)
        return Levels(tuple(self.thresholds()), warmup, (run.steps or 0) - settle + 1)
