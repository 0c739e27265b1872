"""Pruning: what happens to the parameters after the host's step. Deciding is left to `schedules` and `selection`.

    before the step   entry sensitivities |w_t · g_t|, if the rule looks then
    after the step    … |w_{t+1} · g_t| otherwise · cut due? scores → what stays → e of the rest becomes 0
    settled           e of what was dropped is set to 0 again after every step; nothing is scored any more

One call of a `torch._foreach_` function serves all tensors; only a cut waits for the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..budget import Budget, falling
from ..deltas import BlockDelta
from ..errors import BudgetError, CheckpointError
from ..methods import Method, RankPruning
from ..projections import zero_dropped
from ..schedules import CubicDecay, Run
from ..scores import smooth_entries, triplet_scores
from .distributed import full, laid_out_like, local, mean_over_processes


@dataclass(frozen=True)
class Change:
    """A module whose rank a cut changed: its index, the new rank minus the old, and its mean score."""

    module: int
    ranks: int
    score: float


class Pruner(Protocol):
    """The runtime side of a pruning rule; the controller calls it around every real step of the optimizer."""

    @property
    def settled(self) -> bool:
        """Has everything been decided?"""
        ...

    def check(self, run: Run) -> None:
        """Raise ScheduleError if the schedule does not fit this run."""
        ...

    def start(self, run: Run) -> None:
        """A run begins, or goes on from a checkpoint. Raises ScheduleError."""
        ...

    def before_step(self, step: int, *, scale: float) -> None:
        """Gradients are there, `scale` times too large."""
        ...

    def after_step(self, step: int) -> Sequence[Change]:
        """The optimizer has moved the parameters; its gradients are still there."""
        ...


def pruner_of(method: Method, deltas: Mapping[str, BlockDelta]) -> Pruner | None:
    """The runtime side of the method's pruning rule; None without one."""
    return None if method.prune is None else RankPruner(method.prune, method.budget, deltas)


class RankPruner:
    """Keeps the most important ranks of one-block deltas with parameters A, E and B. See `RankPruning`."""

    def __init__(self, rule: RankPruning, budget: Budget, deltas: Mapping[str, BlockDelta]) -> None:
        self.rule, self.last = rule, budget
        self.names, self.deltas = list(deltas), list(deltas.values())
        self.costs = [d.in_features + d.out_features for d in self.deltas]
        self.schedule: CubicDecay | None = None
        self.check_budget()
        for delta in self.deltas:
            if len(delta.statistics) != statistics_of(delta):
                delta.statistics = torch.zeros(statistics_of(delta), dtype=dtype_of(delta))

    @property
    def first(self) -> Budget:
        """What there is at the start."""
        held = [len(delta.kept) for delta in self.deltas]
        return Budget(sum(held), sum(n * cost for n, cost in zip(held, self.costs, strict=True)))

    def check_budget(self) -> None:
        """Raise BudgetError for a target above the start, or one that no choice of ranks meets within its bound."""
        start, target = self.first.ranks, self.last.ranks
        assert start is not None and target is not None
        if target > start:
            raise BudgetError(
                f"the budget of {target} ranks is above the start of {start} over {len(self.deltas)} modules (`init_r` "
                f"each, at most what its shape can use): raise `init_r` or lower the budget"
            )
        cheapest = sorted(cost for delta, cost in zip(self.deltas, self.costs, strict=True) for _ in delta.kept)
        least = sum(cheapest[:target])
        if self.last.parameters is not None and least > self.last.parameters:
            raise BudgetError(
                f"{target} ranks cost at least {least} parameters, the budget allows {self.last.parameters}: raise "
                f"`init_r`, or give the budget as `total_ranks`"
            )

    @property
    def settled(self) -> bool:
        return all(delta.settled for delta in self.deltas)

    # -- one run -------------------------------------------------------------------------------------------------

    def schedule_of(self, run: Run) -> CubicDecay:
        """How many ranks may stay at each step of a run."""
        start, target = self.first.ranks, self.last.ranks
        assert start is not None and target is not None
        return self.rule.schedule(run, start, target)

    def check(self, run: Run) -> None:
        if not self.settled:
            self.schedule_of(run)

    def start(self, run: Run) -> None:
        if not self.settled:
            self.schedule = self.schedule_of(run)
            self._lay_out_statistics()
        self._lay_out_kept()

    def _lay_out_statistics(self) -> None:
        """Views of each module's flat statistics: sensitivity, then uncertainty, of A, E and B."""
        self.parameters: list[nn.Parameter] = []
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []
        for name, delta in zip(self.names, self.deltas, strict=True):
            parameters = list(delta.block(0).values())
            if len(delta.statistics) != statistics_of(delta):
                raise CheckpointError(
                    f"{name}: {len(delta.statistics)} statistics were loaded, {statistics_of(delta)} are needed: the "
                    f"adapter file is damaged"
                )
            delta.statistics = delta.statistics.to(parameters[0].device, dtype_of(delta))
            parts = delta.statistics.split([p.numel() for p in parameters] * 2)
            views = [part.view(p.shape) for part, p in zip(parts, parameters * 2, strict=True)]
            self.parameters += parameters
            self.sensitivity += views[: len(parameters)]
            self.uncertainty += views[len(parameters) :]

    def _lay_out_kept(self) -> None:
        flags = torch.tensor([float(k) for d in self.deltas for k in d.kept])
        columns = flags.split([len(d.kept) for d in self.deltas])
        self.kept = [
            local(laid_out_like(column.unsqueeze(1).to(e.device, e.dtype), e))
            for column, e in zip(columns, map(e_of, self.deltas), strict=True)
        ]

    def _project(self) -> None:
        zero_dropped([local(e_of(delta).detach()) for delta in self.deltas], self.kept)

    # -- one step ------------------------------------------------------------------------------------------------

    def before_step(self, step: int, *, scale: float) -> None:
        if self.rule.observe == "before_step":
            self._observe(step, scale)

    @torch.no_grad()
    def after_step(self, step: int) -> Sequence[Change]:
        if self.settled:
            self._project()
            return []
        if self.rule.observe == "after_step":
            self._observe(step, 1.0)  # fused optimizers leave gradients unscaled behind
        assert self.schedule is not None
        return self._cut(step, self.schedule) if self.schedule.due(step) else []

    @torch.no_grad()
    def _observe(self, step: int, scale: float) -> None:
        """Update the averages of every tensor that has a gradient; of the others they stay as they are."""
        if self.settled or self.schedule is None or not self.schedule.observed(step):
            return
        there = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not there:  # a step that was judged bad
            return
        dtype = self.sensitivity[0].dtype
        gradients = [full(self.parameters[i].grad).to(dtype) for i in there]  # type: ignore[arg-type]
        if scale != 1.0:
            gradients = list(torch._foreach_div(gradients, scale))
        smooth_entries(
            [self.sensitivity[i] for i in there],
            [self.uncertainty[i] for i in there],
            [full(self.parameters[i].detach()).to(dtype) for i in there],
            gradients,
            beta=self.rule.beta,
            beta_uncertainty=self.rule.beta_uncertainty,
        )

    def _cut(self, step: int, schedule: CubicDecay) -> list[Change]:
        """Keep as many ranks as the budget pays for now, and say which modules that changed."""
        budget = falling(self.first, self.last, schedule.ranks(step))
        scores = self.scores()
        before = [delta.rank for delta in self.deltas]
        for delta, kept in zip(self.deltas, self.rule.keep(scores, self.costs, budget), strict=True):
            delta.kept, delta.settled = kept, step >= schedule.last_cut
        self._lay_out_kept()
        self._project()
        return [
            Change(i, delta.rank - rank, sum(scores[i]) / len(scores[i]))
            for i, (delta, rank) in enumerate(zip(self.deltas, before, strict=True))
            if delta.rank != rank
        ]

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
        return [part.tolist() for part in flat.cpu().split([len(d.kept) for d in self.deltas])]


def e_of(delta: BlockDelta) -> nn.Parameter:
    return delta.block(0)["E"]


def statistics_of(delta: BlockDelta) -> int:
    """How many there are: two averages of every entry."""
    return 2 * sum(p.numel() for p in delta.block(0).values())


def dtype_of(delta: BlockDelta) -> torch.dtype:
    """Of the statistics: products of two averages underflow in half precision."""
    return torch.float64 if e_of(delta).dtype == torch.float64 else torch.float32
