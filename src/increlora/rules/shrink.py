"""Gates that are pulled to zero after every step; a rank whose gate is zero does not count (SoRA).

    before the step   what weight decay is about to take from the gates is noted
    after the step    that is given back · e ← shrink(e, ξ) · cut due? which gates are left → what counts
    settled           nothing shrinks any more; gates of what does not count stay zero, and are not computed

At a budget ξ is chosen at each cut: |e| of the largest gate that has to go by the next one / steps until then.
One pass serves all gates; only a cut waits for the device.
Statistics of a module: at how many cuts in a row each rank did not count, and the threshold in force.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ..decide.allocation import Holding
from ..decide.budget import Budget
from ..decide.feasibility import check_pruning
from ..decide.projections import Projection, shrink_together
from ..decide.schedules import CubicDecay, Levels, Run
from ..errors import BudgetError
from ..ops.parallel import full, local
from .base import Change, Deltas, Forecast, Step, dtype_of, finished
from .pruner import Pruner, e_of


@dataclass(frozen=True)
class Shrink:
    """Shrink the gates, and count the ranks whose gate is left.

    Attributes:
        shrink: (gates, threshold) → gates; see `projections`.
        schedule: (run, ranks at the start, ranks at the end) → when ranks are counted, how many may stay, and when that
            is final.
        thresholds: run → threshold of every step; None: chosen at each cut so that as many gates as must go reach zero
            by the next one, and the budget is met exactly.
        keep: as in `Keep`, of |gate|; for budgets.
        by_rate: the threshold is a multiple of the gates' learning rate.
        close_after: a rank that did not count at so many cuts in a row is not computed any more; None: only what does
            not count at the last cut.
    """

    nonnegative = True

    shrink: Projection
    schedule: Callable[[Run, int, int], CubicDecay]
    thresholds: Callable[[Run], Levels] | None
    keep: Callable[[Sequence[Sequence[float]], Sequence[int], Budget], list[list[bool]]]
    by_rate: bool = False
    close_after: int | None = None

    def target(self, budget: Budget) -> Budget:
        """What will be left: the budget; a given threshold leaves what it leaves."""
        return budget if self.thresholds is None else Budget(0)

    def check(self, holdings: Sequence[Holding], budget: Budget) -> None:
        check_pruning(holdings, self.target(budget))

    def bind(self, deltas: Deltas, budget: Budget, slot: int) -> "Shrinker":
        return Shrinker(self, deltas, budget, slot)


class Shrinker(Pruner):
    """Runner of `Shrink`; e are the gates."""

    levels: Levels | None

    def __init__(self, rule: Shrink, deltas: Deltas, budget: Budget, slot: int) -> None:
        super().__init__(deltas, rule.target(budget), slot)
        self.rule = rule
        self.gates: set[int] = set()  # ids of their parameters
        self.moved: list[tuple[list[Tensor], float | Tensor]] = []  # gates that this step moves, and at what rate
        self.open: list[Tensor] = []  # 0 for what is not computed; empty where all is
        self.decayed: list[tuple[list[Tensor], list[Tensor]]] = []

    def sizes(self) -> list[int]:
        return [len(delta.state.kept) + 1 for delta in self.deltas]

    # -- one run -------------------------------------------------------------------------------------------------

    def forecast(self, holdings: Sequence[Holding], run: Run, first: int = 0) -> Forecast:
        if self.done:
            return Forecast((), tuple(holdings))
        cubic, levels = self._plan(run)
        self._check_not_all_at_once(levels)
        if levels is not None:
            return Forecast((), tuple(holdings), exact=False)
        return self.forecast_cuts(cubic, holdings, first)

    def _plan(self, run: Run) -> tuple[CubicDecay, Levels | None]:
        schedule = self.rule.schedule(run, *self.span)
        levels = self.rule.thresholds(run) if self.rule.thresholds is not None else None
        return schedule, levels

    def _check_not_all_at_once(self, levels: Levels | None) -> None:
        if levels is None or self.rule.by_rate or e_of(self.deltas[0]).is_meta:  # a dry run has shapes alone
            return
        threshold, largest = max(levels.values), max(max(of_module) for of_module in self._gate_sizes())
        if self.rule.shrink(torch.tensor(largest), threshold) == 0:
            raise BudgetError(
                f"threshold={threshold} is not below the largest gate of the model ({largest:.3g}): one step would "
                f"remove every rank; lower `threshold`, or leave it out to meet a budget"
            )

    def start(self, run: Run, first: int) -> None:
        self.gates = {id(e_of(delta)) for delta in self.deltas}  # sharding has put others in their place
        if not self.done:
            self.schedule, self.levels = self._plan(run)
            if first == 0:  # what an unfinished run before this one has taken may come back
                self._check_not_all_at_once(self.levels)
                for delta in self.deltas:
                    delta.assign(kept=[True] * len(delta.state.kept), closed=[])
                    delta.statistics[self.slot] = torch.zeros(len(delta.state.kept) + 1, dtype=dtype_of(delta))
            self.check_statistics(self.sizes())
            self.idle = [[int(count) for count in values[:-1].tolist()] for values in self.statistics()]
            self.threshold = float(self.statistics()[0][-1])
            self._lay_out_open()
        self.follow_kept()

    # -- one step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        self.moved, self.decayed = [], []
        for group in step.optimizer.param_groups:
            gates = [local(p.detach()) for p in group["params"] if id(p) in self.gates and p.grad is not None]
            if gates:
                self.moved.append((gates, group["lr"]))
                if share := decoupled_decay(group):
                    self.decayed.append((gates, list(torch._foreach_mul(gates, share))))

    @torch.no_grad()
    def after_step(self, step: int) -> list[Change]:
        for gates, decay in self.decayed:
            torch._foreach_add_(gates, decay)
        if self.done:
            self.project()
            return []
        if self.moved:  # not in a step that was judged bad
            self._shrink(step)
        if self.schedule.due(step):
            return self._cut(step)
        if step == self.schedule.warmup:
            self._choose_threshold(step, self._gate_sizes())
        return []

    def _shrink(self, step: int) -> None:
        threshold = self.threshold if self.levels is None else self.levels.at(step)
        if self.rule.by_rate:
            for gates, rate in self.moved:
                shrink_together(gates, self.rule.shrink, threshold * float(rate))
        elif threshold > 0:
            shrink_together(self.values(), self.rule.shrink, threshold)
        if self.open:  # momentum still moves gates whose ranks are not computed
            torch._foreach_mul_(self.values(), self.open)

    def _cut(self, step: int) -> list[Change]:
        """Say which ranks count: those whose gate is left, or as many of the largest as the budget pays for now."""
        sizes = self._gate_sizes()
        if self.levels is not None:
            kept = [[size > 0 for size in of_module] for of_module in sizes]
            if not any(map(any, kept)):
                raise BudgetError(
                    f"step {step}: the threshold has set every gate of the whole model to zero, no rank is left to "
                    f"train: lower `threshold` (or `gate_penalty`), or leave `threshold` out to meet a budget"
                )
        else:
            kept = self.rule.keep(sizes, self.costs, self.budget(step))
        scores = [[max(0.0, size) for size in of_module] for of_module in sizes]
        changes = self.decide(kept, scores, step)
        self._close()
        self._choose_threshold(step, sizes)
        return changes + (finished(self.deltas) if self.done else [])

    def _gate_sizes(self) -> list[list[float]]:
        """|gate| of every rank, module by module, the same on every process; −1 for what is not computed."""
        parts = [full(e_of(delta).detach()).flatten() for delta in self.deltas]
        flat = torch.cat([part.to(parts[0].device) for part in parts]).cpu().double().abs().tolist()
        closed = [c for delta in self.deltas for c in delta.state.closed_flags]
        sizes = iter(-1.0 if c else size for size, c in zip(flat, closed, strict=True))
        return [list(islice(sizes, len(delta.state.kept))) for delta in self.deltas]

    def _close(self) -> None:
        """Take ranks out of the forward pass that have not counted for long, or never will again."""
        for delta, idle in zip(self.deltas, self.idle, strict=True):
            idle[:] = [0 if kept else count + 1 for kept, count in zip(delta.state.kept, idle, strict=True)]
            limit = 1 if delta.state.settled else self.rule.close_after or math.inf
            closed = [count >= limit for count in idle]
            delta.assign(closed=closed if any(closed) else [])
        self._lay_out_open()

    def _lay_out_open(self) -> None:
        closed = [delta.state.closed_flags for delta in self.deltas]
        some = any(map(any, closed))
        self.open = self.flags_of([[not c for c in of_module] for of_module in closed]) if some else []

    def _choose_threshold(self, step: int, sizes: Sequence[Sequence[float]]) -> None:
        """ξ = |largest gate that must go by the next cut| / steps until then: without gradients it just vanishes."""
        going, schedule = 0, self.schedule
        if self.levels is None and step < schedule.last_cut:
            going = schedule.ranks(step) - schedule.ranks(schedule.next(step))
        flags = (kept for delta in self.deltas for kept in delta.state.kept)
        left = sorted(size for kept, size in zip(flags, chain.from_iterable(sizes), strict=True) if kept)
        going = min(going, len(left))
        self.threshold = left[going - 1] / (schedule.next(step) - step) if going else 0.0
        for delta, idle in zip(self.deltas, self.idle, strict=True):
            values = [*map(float, idle), self.threshold]
            delta.statistics[self.slot] = torch.tensor(values, dtype=dtype_of(delta))


def decoupled_decay(group: Mapping[str, Any]) -> float:
    """Share of a parameter that decoupled weight decay takes in one step."""
    if not (group.get("weight_decay") and group.get("decoupled_weight_decay")):
        return 0.0
    return float(group["lr"]) * float(group["weight_decay"])
