"""SoRA: a gate per rank, pulled towards zero by a proximal step; a rank whose gate is zero is gone.

    ΔW = s · B diag(e) A                                  e: the gates, one per rank
    e ← T_ξ( host's step on e ),    T_ξ(v) = sign(v) · max(|v| − ξ, 0)               after each optimizer step
    the rank of a module is the number of its gates that are not zero

At a budget (default) ξ is chosen: at each cut the b(t) ranks with the largest |e| over all modules stay, and until the
next cut ξ = |e| of the largest gate that has to go by then / steps until then. b(t) falls as AdaLoRA's does.

Source: SoRA (arXiv 2311.11696), proximal gradient step and algorithm 1; the budget is ours; its published code is
`sora_paper`.   Differs: docs/methods/sora.md
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..decide.budget import Budget
from ..decide.projections import Projection, soft_threshold
from ..decide.schedules import Levels, Run, Time, in_steps, rising
from ..decide.selection import keep_top
from ..deltas import TripletDelta
from ..errors import ConfigError
from ..rules import Shrink
from .base import Method, Penalty, Site, budget_of
from .falling import check_start, cubic_of, first_rank, pruned
from .initial import lora_start, normal, ones
from .options import Count, LoraOptions, Weight
from .scaling import fixed, scale_of


@dataclass(frozen=True)
class SoraOptions(LoraOptions):
    """Every option of SoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters. With
            a `threshold`: the rank of every module at the start; what is left at the end is found in training.
        total_ranks: ranks over all modules, met exactly; not with a `threshold`.
    Shrinking
        threshold: ξ > 0, taken from every |gate| after each step; None: chosen at each cut so that the budget is met.
        threshold_unit: `constant` (published code), or `learning_rate`: ξ = threshold · learning rate (paper's rule).
        levels: the threshold rises to its value in so many equal phases.   first_threshold: ξ during the warm-up, ≥ 0.
        spacing: of the levels, `linear`, `geometric` or `log_linear`.
        init_r: rank of every module at the start, at most what its shape can use; default 1.5 times the average at the
            end, rounded up; not with a `threshold`.
        warmup_steps: nothing shrinks and no cut yet, but for `first_threshold`.   settle_steps: at the end, with the
            ranks that are left; ≥ 1.   interval_steps: ranks are counted, and cut to the budget, at its multiples;
            between them a gate at zero may come back.
        close_after: a rank that did not count at so many counts in a row is not computed any more, and stays out unless
            the bound on parameters leaves no other choice; None: only once all is settled.
    Form
        lora_alpha: numerator α of the scale α / average rank at the end.   use_rslora: α over the root of that.
        gate_init: gates start at N(0, 1), `normal`, or at `ones`.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
        gate_penalty: weight λ ≥ 0 of mean |gate|, as a gradient; 0 turns it off.
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    """

    use_rslora: bool = False
    total_ranks: Count | None = None
    init_r: Count | None = None
    threshold: float | None = None
    threshold_unit: Literal["constant", "learning_rate"] = "constant"
    levels: Count = 1
    first_threshold: Weight = 0.0
    spacing: Literal["linear", "geometric", "log_linear"] = "linear"
    warmup_steps: Time = 0.1
    settle_steps: Time = 0.4
    interval_steps: Time = 0.01
    close_after: Count | None = 10
    gate_init: Literal["normal", "ones"] = "normal"
    gate_penalty: Weight = 0.0
    total_steps: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None:
            self._check_budget()
        elif not 0 < self.threshold < float("inf"):
            raise ConfigError(f"threshold={self.threshold!r}: give a number above 0, or leave it out to meet a budget")
        else:
            self._check_threshold(self.threshold)

    def _check_budget(self) -> None:
        check_start(self)
        for name in ("threshold_unit", "levels", "first_threshold", "spacing"):
            if getattr(self, name) != getattr(SoraOptions, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} needs a `threshold`: without one it is chosen")

    def _check_threshold(self, threshold: float) -> None:
        for name in ("total_ranks", "init_r"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: with a `threshold` ranks start at `r` and end where they end; "
                    f"leave out one of the two"
                )
        if self.first_threshold > threshold:
            raise ConfigError(f"first_threshold={self.first_threshold} is above threshold={threshold}: lower it")
        self._rising(threshold)

    def _rising(self, threshold: float) -> list[float]:
        return rising(self.first_threshold, threshold, self.levels + 1, self.spacing)

    def shrinking(
        self, sites: int, uniform_parameters: int, *, operator: Projection, penalty: Penalty, average: bool
    ) -> Method:
        """The method. average: is α divided by the average rank at the end, or by the rank wanted at the start?"""
        budget = budget_of(self, sites, uniform_parameters)
        mean_rank = (budget.ranks or 0) / sites
        wanted, levels = self.init_r or first_rank(mean_rank), None
        if self.threshold is not None:
            budget = Budget(budget.ranks, budget.parameters, exact=False)  # the most there can be
            wanted, levels = self.r, partial(self._levels, self.threshold)
        rule = Shrink(
            operator, partial(cubic_of, self), levels, keep_top, by_rate=self.threshold_unit == "learning_rate",
            close_after=self.close_after,
        )  # fmt: skip
        scale = scale_of(self.lora_alpha, mean_rank if average else wanted, rslora=self.use_rslora)
        delta, penalised = partial(self._delta, wanted, scale), penalty if self.gate_penalty else None
        return Method("sora", delta, budget, (rule,), penalised, total_steps=self.total_steps)

    def _delta(self, wanted: int, scale: float, site: Site) -> TripletDelta:
        rank = min(wanted, site.in_features, site.out_features)
        gates = {"ones": ones, "normal": normal}[self.gate_init]
        init = lora_start(site.inputs, random=not self.init_lora_weights) | {"E": gates}
        return pruned(self, site, rank, init=init, scale=partial(fixed, scale))

    def _levels(self, threshold: float, run: Run) -> Levels:
        warmup = in_steps(self.warmup_steps, run, name="warmup_steps")
        settle = in_steps(self.settle_steps, run, name="settle_steps", least=1)
        return Levels(tuple(self._rising(threshold)), warmup, (run.steps or 0) - settle + 1)


class Sora(SoraOptions):
    """The method for a model with `sites` adapted modules; its options are those of `SoraOptions`."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        penalty = Penalty(self.gate_penalty, "l1")
        return self.shrinking(sites, uniform_parameters, operator=soft_threshold, penalty=penalty, average=True)
