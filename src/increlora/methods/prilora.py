"""PRILoRA: ranks that rise from the first layer to the last, and entries of A that are set to zero again and again.

    ΔW_l = s_l · B A,   A (r_l, in), B (out, r_l)       r_l from `first_r` to 2 · mean − `first_r`, linear in the layer
    n_j = ‖X_:j‖₂                                       over all tokens of the step: micro-batches, uses, processes
    N ← β N + (1 − β) n                                 N = n at first
    after each `interval_steps`: A_ij ← 0 for the ⌊p · in⌋ smallest |A_ij| · N_j of each row

Source: PRILoRA (arXiv 2401.11316), from its abstract and second-hand summaries: what could not be verified is an
option, see docs/methods/prilora.md.   Differs: ranks add up to the budget exactly and cost at most LoRA's parameters.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import Literal

from ..decide.budget import Budget
from ..decide.projections import Group
from ..decide.ramps import depths, first_of, ramp_ranks
from ..decide.schedules import Multiples, Run, Time, in_steps
from ..deltas import LowRankDelta
from ..errors import ScheduleError
from ..rules import Entries
from .base import Method, Site, budget_of, in_blocks
from .initial import lora_start
from .options import Count, LoraOptions, Share
from .scaling import scale_of

Peers = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class PriLora(LoraOptions):
    """Every option of PRILoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
    Ranks
        first_r: rank at the first layer, from 1 to 2 · mean − 1; the last layer gets 2 · mean − first_r. Default: half
            the mean.
        ramp: `per_stack` starts anew in each stack of layers (encoder, decoder); `whole` runs through all of them.
    Pruning
        prune_share: share p of the entries of A that a pruning sets to zero, in [0, 1); 0: nothing is pruned.
        group: p counts in each `row` of A, or in the `matrix`.
        interval_steps: prunings after so many steps, and at the multiples; default 40, in shorter runs half of the run.
        warmup_steps, settle_steps: no pruning in the first steps, and in the last.
        regrow: zeros may move again until the next pruning; False holds them at zero, from the first pruning of a run.
        beta: moving average of the input norms, in [0, 1).   statistic_interval: it is updated in each so many steps.
    Form
        lora_alpha: numerator α of the scale.   scaling: α / rank of the module (`per_rank`), or α / mean (`constant`).
        use_rslora: α over the root of that.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Run
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    """

    use_rslora: bool = False
    total_ranks: Count | None = None
    first_r: float | None = None
    ramp: Literal["per_stack", "whole"] = "per_stack"
    prune_share: Share = 0.5
    group: Group = "row"
    interval_steps: Time = 40
    warmup_steps: Time = 0
    settle_steps: Time = 0
    regrow: bool = True
    beta: Share = 0.9
    statistic_interval: Count = 1
    scaling: Literal["per_rank", "constant"] = "per_rank"
    total_steps: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_ranks is None:
            first_of(Fraction(self.r), self.first_r)

    def method(self, sites: int, uniform_parameters: int) -> Method:
        budget = budget_of(self, sites, uniform_parameters)
        mean = Fraction(budget.ranks or 0, sites)
        first = first_of(mean, self.first_r)
        rule = Entries(self._schedule, self.prune_share, self.group, self.beta, self.statistic_interval, self.regrow)
        delta = partial(self._delta, first=first, budget=budget, mean=mean)
        rules = (rule,) if self.prune_share else ()
        return Method("prilora", delta, budget, rules, total_steps=self.total_steps)

    def _delta(self, site: Site, *, first: Fraction, budget: Budget, mean: Fraction) -> LowRankDelta:
        # a site that is not among its peers is found by a checkpoint's keys; its tensors then say the rank
        known = ranks_of(site.peers, first, budget, restart=self.ramp == "per_stack") if site.peers else {}
        rank = known.get(site.name) or min(max(1, round(mean)), site.in_features, site.out_features)
        init = lora_start(site.inputs, random=not self.init_lora_weights)
        return in_blocks(LowRankDelta, self, site, [rank], init=init, scale=partial(self._scale, float(mean)))

    def _scale(self, mean: float, rank: int) -> float:
        return scale_of(self.lora_alpha, rank if self.scaling == "per_rank" else mean, rslora=self.use_rslora)

    def _schedule(self, run: Run) -> Multiples:
        if self.settle_steps and run.steps is None:
            in_steps(1.0, run, name="the end of the last pruning (settle_steps)")
        interval = in_steps(self.interval_steps, run, name="interval_steps", least=1)
        if run.steps is not None and run.steps < interval and self.interval_steps == PriLora.interval_steps:
            interval = max(1, run.steps // 2)  # the default fits any run
        steps = Multiples(
            interval=interval,
            warmup=in_steps(self.warmup_steps, run, name="warmup_steps"),
            settle=in_steps(self.settle_steps, run, name="settle_steps"),
            total=run.steps,
        )
        if steps.last is not None and steps.last < steps.first:
            raise ScheduleError(
                f"no pruning falls into a run of {run.steps} steps (interval_steps={steps.interval}, "
                f"warmup_steps={steps.warmup}, settle_steps={steps.settle}): lower `interval_steps`, a share such as "
                f"0.1 fits any run"
            )
        return steps


@lru_cache(maxsize=1)  # all modules of a model ask the same
def ranks_of(peers: Peers, first: Fraction, budget: Budget, *, restart: bool) -> dict[str, int]:
    """Rank of every module, by name."""
    names, shapes = [name for name, *_ in peers], [(m, n) for _, m, n in peers]
    ramp = ramp_ranks(depths(names, restart=restart), first=first, budget=budget, shapes=shapes)
    return dict(zip(names, ramp, strict=True))
