"""Cuts: start with more ranks than may stay, and keep those that matter most (AdaLoRA).

    every step     I ← β₁ I + (1−β₁) |w ∘ g|    U ← β₂ U + (1−β₂) | |w ∘ g| − I |       for every entry w of A, e and B
    cut due?       S_i = s(e_i) + mean_j s(A_ij) + mean_j s(B_ji), s = I · U → what stays; e of the rest becomes 0
    settled        e of what was dropped is set to 0 again after every step; nothing is scored any more

One call of a `torch._foreach_` function serves all tensors; only a cut waits for the device.
Statistics of a module: I, then U, of A, e and B.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..decide.allocation import Holding
from ..decide.budget import Budget
from ..decide.feasibility import check_pruning
from ..decide.schedules import CubicDecay, Run
from ..decide.scores import entry_sensitivity, smooth_entries, triplet_scores
from ..ops.parallel import full, mean_over_processes
from .base import Change, Deltas, Forecast, Step, dtype_of, finished
from .pruner import Pruner


@dataclass(frozen=True)
class Keep:
    """Keep the ranks that matter, by the sensitivity of each entry of their parameters.

    Attributes:
        schedule: (run, ranks at the start, ranks at the end) → how many may stay at each step.
        keep: (scores of the ranks by module, parameters of one rank by module, budget now) → which stay.
        observe: entries are scored as |w_t · g_t|, `before_step`, or as |w_{t+1} · g_t|, `after_step` (published code).
        beta, beta_uncertainty: moving averages, see `scores.smooth_entries`.
    """

    nonnegative = True

    schedule: Callable[[Run, int, int], CubicDecay]
    keep: Callable[[Sequence[Sequence[float]], Sequence[int], Budget], list[list[bool]]]
    observe: Literal["before_step", "after_step"] = "before_step"
    beta: float = 0.85
    beta_uncertainty: float = 0.85

    def check(self, holdings: Sequence[Holding], budget: Budget) -> None:
        check_pruning(holdings, budget)

    def bind(self, deltas: Deltas, budget: Budget, slot: int) -> "Keeper":
        return Keeper(self, deltas, budget, slot)


class Keeper(Pruner):
    """Runner of `Keep`."""

    def __init__(self, rule: Keep, deltas: Deltas, budget: Budget, slot: int) -> None:
        super().__init__(deltas, budget, slot)
        self.rule = rule
        self.seen: tuple[list[int], list[Tensor]] = [], []  # which tensors have a gradient in this step, and |w ∘ g|

    def sizes(self) -> list[int]:
        return [2 * sum(p.numel() for p in delta.block(0).values()) for delta in self.deltas]

    def forecast(self, holdings: Sequence[Holding], run: Run, first: int = 0) -> Forecast:
        if self.done:
            return Forecast((), tuple(holdings))
        return self.forecast_cuts(self.rule.schedule(run, *self.span), holdings, first)

    def start(self, run: Run, first: int) -> None:
        if not self.done:
            self.schedule = self.rule.schedule(run, *self.span)
            self._lay_out()
        self.follow_kept()

    def _lay_out(self) -> None:
        """Views of each module's flat statistics: sensitivity, then uncertainty, of A, E and B."""
        self.check_statistics(self.sizes())
        self.parameters: list[nn.Parameter] = []
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []
        for delta in self.deltas:
            parameters = list(delta.block(0).values())
            flat = delta.statistics[self.slot] = delta.statistics[self.slot].to(parameters[0].device, dtype_of(delta))
            parts = flat.split([p.numel() for p in parameters] * 2)
            views = [part.view(p.shape) for part, p in zip(parts, parameters * 2, strict=True)]
            self.parameters += parameters
            self.sensitivity += views[: len(parameters)]
            self.uncertainty += views[len(parameters) :]

    def before_step(self, step: Step) -> None:
        if self.rule.observe == "before_step":
            self._observe(step.number, step.gradient_scale)

    @torch.no_grad()
    def after_step(self, step: int) -> list[Change]:
        if self.done:
            self.project()
            return []
        if self.rule.observe == "after_step":
            self._observe(step, 1.0)  # fused optimizers leave gradients unscaled behind
        self._smooth()
        return self._cut(step) if self.schedule.due(step) else []

    @torch.no_grad()
    def _observe(self, step: int, scale: float) -> None:
        """Take the sensitivity of every tensor that has a gradient."""
        self.seen = [], []
        if self.done or not self.schedule.observed(step):
            return
        there = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not there:  # a step that was judged bad
            return
        dtype = self.sensitivity[0].dtype
        gradients = [full(self.parameters[i].grad).to(dtype) for i in there]  # type: ignore[arg-type]
        if scale != 1.0:
            gradients = list(torch._foreach_div(gradients, scale))
        weights = [full(self.parameters[i].detach()).to(dtype) for i in there]
        self.seen = there, entry_sensitivity(weights, gradients)

    def _smooth(self) -> None:
        """Update the averages of what was seen, once the step is done; of the others they stay as they are."""
        (there, score), self.seen = self.seen, ([], [])
        if there:
            averages = [self.sensitivity[i] for i in there], [self.uncertainty[i] for i in there]
            smooth_entries(*averages, score, beta=self.rule.beta, beta_uncertainty=self.rule.beta_uncertainty)

    def _cut(self, step: int) -> list[Change]:
        """Keep as many ranks as the budget pays for now, and say which modules that changed."""
        scores = self.scores()
        changes = self.decide(self.rule.keep(scores, self.costs, self.budget(step)), scores, step)
        return changes + (finished(self.deltas) if self.done else [])

    def scores(self) -> list[list[float]]:
        """Score of every rank, module by module, the same on every process."""
        importance = torch._foreach_mul(self.sensitivity, self.uncertainty)
        triplets = [importance[i : i + 3] for i in range(0, len(importance), 3)]
        by_shape: dict[object, list[int]] = {}
        for i, (A, _, B) in enumerate(triplets):
            by_shape.setdefault((A.shape, B.shape, A.device), []).append(i)
        found: dict[int, Tensor] = {}
        for members in by_shape.values():
            A, e, B = (torch.stack(parts) for parts in zip(*(triplets[i] for i in members), strict=True))
            found |= dict(zip(members, triplet_scores(A, e, B).unbind(), strict=True))
        device = found[0].device
        flat = mean_over_processes(torch.cat([found[i].to(device) for i in range(len(self.deltas))]))
        return [part.tolist() for part in flat.cpu().split([len(d.state.kept) for d in self.deltas])]
