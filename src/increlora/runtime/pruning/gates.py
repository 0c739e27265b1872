"""Pruning by gates that are pulled to zero (SoRA).

    before the step   what weight decay is about to take from the gates is noted
    after the step    that is given back · e ← shrink(e, ξ) · cut due? which gates are left → what counts
    settled           nothing shrinks any more; gates of what does not count stay zero, and are not computed

One pass serves all gates; only a cut waits for the device.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...decide.budget import Budget
from ...decide.projections import shrink_together, zero_dropped
from ...decide.schedules import CubicDecay, Levels, Run
from ...deltas import BlockDelta
from ...errors import BudgetError, CheckpointError
from ...methods import GateShrinking
from ...ops.parallel import full, local
from .base import Change
from .kept import KeptRanks, dtype_of, e_of


class GatePruner:
    """Shrinks the gates e of one-block deltas, and counts the ranks whose gate is left. See `GateShrinking`.

    Statistics of a module: at how many cuts in a row each rank did not count, and the threshold in force.
    """

    reads_inputs = False

    def __init__(self, rule: GateShrinking, budget: Budget, deltas: Mapping[str, BlockDelta]) -> None:
        target = budget if rule.thresholds is None else Budget(0)  # a given threshold leaves what it leaves
        self.rule, self.ranks = rule, KeptRanks(target, deltas)
        self.names, self.deltas = list(deltas), list(deltas.values())
        self.gates: set[int] = set()  # ids of their parameters
        self.schedule: CubicDecay | None = None
        self.levels: Levels | None = None
        self.moved: list[tuple[list[Tensor], float | Tensor]] = []  # gates that this step moves, and at what rate
        self.open: list[Tensor] = []  # 0 for what is not computed; empty where all is
        self.decayed: list[tuple[list[Tensor], list[Tensor]]] = []
        for delta in self.deltas:
            if len(delta.statistics) != len(delta.kept) + 1:
                delta.statistics = torch.zeros(len(delta.kept) + 1, dtype=dtype_of(delta))

    @property
    def settled(self) -> bool:
        return self.ranks.settled

    # -- one run -------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        if not self.settled:
            _, levels = self._plan(run)
            self._check_not_all_at_once(levels)

    def _plan(self, run: Run) -> tuple[CubicDecay, Levels | None]:
        schedule = self.rule.schedule(run, *self.ranks.span)
        levels = self.rule.thresholds(run) if self.rule.thresholds is not None else None
        return schedule, levels

    def _check_not_all_at_once(self, levels: Levels | None) -> None:
        if levels is None or self.rule.by_rate or e_of(self.deltas[0]).is_meta:  # a dry run has shapes alone
            return
        threshold, largest = max(levels.values), max(max(of_module) for of_module in self._sizes())
        if self.rule.shrink(torch.tensor(largest), threshold) == 0:
            raise BudgetError(
                f"threshold={threshold} is not below the largest gate of the model ({largest:.3g}): one step would "
                f"remove every rank; lower `threshold`, or leave it out to meet a budget"
            )

    def start(self, run: Run, *, first: int) -> None:
        self.gates = {id(e_of(delta)) for delta in self.deltas}  # sharding has put others in their place
        if not self.settled:
            self.schedule, self.levels = self._plan(run)
            if first == 0:
                self._begin()
            self._read_statistics()
        self.ranks.lay_out()

    def _begin(self) -> None:
        """A new run: what an unfinished one before it has taken may come back."""
        self._check_not_all_at_once(self.levels)
        for delta in self.deltas:
            delta.kept, delta.closed = [True] * len(delta.kept), []
            delta.statistics = torch.zeros(len(delta.kept) + 1, dtype=dtype_of(delta))

    def _read_statistics(self) -> None:
        """They are read and written on the host, at cuts only."""
        self.idle: list[list[int]] = []
        for name, delta in zip(self.names, self.deltas, strict=True):
            if len(delta.statistics) != len(delta.kept) + 1:
                raise CheckpointError(
                    f"{name}: {len(delta.statistics)} statistics were loaded, {len(delta.kept) + 1} are needed: the "
                    f"adapter file is damaged"
                )
            delta.statistics = delta.statistics.to("cpu")
            self.idle.append([int(count) for count in delta.statistics[:-1]])
        self.threshold = float(self.deltas[0].statistics[-1])
        self._lay_out_open()

    # -- one step ------------------------------------------------------------------------------------------------

    def collect(self, module: int, x: Tensor) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        pass

    def restored(self) -> None:
        pass

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer, *, scale: float) -> None:
        self.moved, self.decayed = [], []
        for group in optimizer.param_groups:
            gates = [local(p.detach()) for p in group["params"] if id(p) in self.gates and p.grad is not None]
            if gates:
                self.moved.append((gates, group["lr"]))
                if share := decoupled_decay(group):
                    self.decayed.append((gates, list(torch._foreach_mul(gates, share))))

    @torch.no_grad()
    def after_step(self, step: int) -> Sequence[Change]:
        for gates, decay in self.decayed:
            torch._foreach_add_(gates, decay)
        if self.settled:
            self.ranks.project()
            return []
        assert self.schedule is not None
        if self.moved:  # not in a step that was judged bad
            self._shrink(step)
        if self.schedule.due(step):
            return self._cut(step, self.schedule)
        if step == self.schedule.warmup:
            self._choose_threshold(step, self.schedule, self._sizes())
        return []

    def _shrink(self, step: int) -> None:
        threshold = self.threshold if self.levels is None else self.levels.at(step)
        if self.rule.by_rate:
            for gates, rate in self.moved:
                shrink_together(gates, self.rule.shrink, threshold * float(rate))
        elif threshold > 0:
            shrink_together(self.ranks.values(), self.rule.shrink, threshold)
        if self.open:  # momentum still moves gates whose ranks are not computed
            zero_dropped(self.ranks.values(), self.open)

    def _cut(self, step: int, schedule: CubicDecay) -> list[Change]:
        """Say which ranks count: those whose gate is left, or as many of the largest as the budget pays for now."""
        sizes = self._sizes()
        if self.levels is not None:
            kept = [[size > 0 for size in of_module] for of_module in sizes]
            self._check_some_left(step, kept)
        else:
            kept = self.rule.keep(sizes, self.ranks.costs, self.ranks.budget(schedule.ranks(step)))
        scores = [[max(0.0, size) for size in of_module] for of_module in sizes]
        changes = self.ranks.decide(kept, scores, settled=step >= schedule.last_cut)
        self.ranks.project()
        self._close()
        self._choose_threshold(step, schedule, sizes)
        return changes

    def _sizes(self) -> list[list[float]]:
        """|gate| of every rank, module by module, the same on every process; −1 for what is not computed."""
        parts = [full(e_of(delta).detach()).flatten() for delta in self.deltas]
        flat = torch.cat([part.to(parts[0].device) for part in parts]).cpu().double().abs().tolist()
        closed = [c for delta in self.deltas for c in delta.closed or [False] * len(delta.kept)]
        sizes = iter(-1.0 if c else size for size, c in zip(flat, closed, strict=True))
        return [list(islice(sizes, len(delta.kept))) for delta in self.deltas]

    def _check_some_left(self, step: int, kept: Sequence[Sequence[bool]]) -> None:
        if not any(map(any, kept)):
            raise BudgetError(
                f"step {step}: the threshold has set every gate of the whole model to zero, no rank is left to train: "
                f"lower `threshold` (or `gate_penalty`), or leave `threshold` out to meet a budget"
            )

    def _close(self) -> None:
        """Take ranks out of the forward pass that have not counted for long, or never will again."""
        for delta, idle in zip(self.deltas, self.idle, strict=True):
            idle[:] = [0 if kept else count + 1 for kept, count in zip(delta.kept, idle, strict=True)]
            limit = 1 if delta.settled else self.rule.close_after or math.inf
            closed = [count >= limit for count in idle]
            delta.closed = closed if any(closed) else []
        self._lay_out_open()

    def _lay_out_open(self) -> None:
        closed = [delta.closed or [False] * len(delta.kept) for delta in self.deltas]
        some = any(map(any, closed))
        self.open = self.ranks.flags_of([[not c for c in of_module] for of_module in closed]) if some else []

    def _choose_threshold(self, step: int, schedule: CubicDecay, sizes: Sequence[Sequence[float]]) -> None:
        """ξ = |largest gate that must go by the next cut| / steps until then: without gradients it just vanishes."""
        going = 0
        if self.levels is None and step < schedule.last_cut:
            going = schedule.ranks(step) - schedule.ranks(schedule.next(step))
        pairs = (zip(delta.kept, of_module, strict=True) for delta, of_module in zip(self.deltas, sizes, strict=True))
        left = sorted(size for of_module in pairs for kept, size in of_module if kept)
        going = min(going, len(left))
        self.threshold = left[going - 1] / (schedule.next(step) - step) if going else 0.0
        for delta, idle in zip(self.deltas, self.idle, strict=True):
            delta.statistics = torch.tensor([*map(float, idle), self.threshold], dtype=dtype_of(delta))


def decoupled_decay(group: Mapping[str, Any]) -> float:
    """Share of a parameter that torch's optimizer takes by decoupled weight decay in one step."""
    if not (group.get("weight_decay") and group.get("decoupled_weight_decay")):
        return 0.0
    return float(group["lr"]) * float(group["weight_decay"])
