"""Which ranks of one-block deltas count, and that e of the others is zero: what the rules that prune ranks share.

The ranks fall from what there is at the start to the budget, and the bound on parameters falls in proportion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..decide.allocation import Holding, parameters_used, ranks_used
from ..decide.budget import Budget, falling
from ..decide.feasibility import check_pruning
from ..decide.schedules import CubicDecay
from ..deltas import BlockDelta
from ..ops.parallel import laid_out_like, local
from .base import Change, Deltas, Expected, Forecast, Runner


class Pruner(Runner):
    """Abstract runner for one-block deltas with parameters A, E and B.

    Attributes:
        first, last: what may be active at the start and at the end.   costs: parameters of one rank, by module.
        schedule: of the run, unless all was settled before.
    """

    forgets = True
    schedule: CubicDecay

    def __init__(self, deltas: Deltas, target: Budget, slot: int) -> None:
        super().__init__(deltas, slot)
        start = [Holding(len(d.state.kept), (), d.in_features + d.out_features) for d in self.deltas]
        check_pruning(start, target)
        self.first, self.last = Budget(ranks_used(start), parameters_used(start)), target
        self.costs = [holding.cost for holding in start]
        self.reserve_statistics(self.sizes())

    def sizes(self) -> list[int]:
        """How many numbers it remembers of each module."""
        raise NotImplementedError

    @property
    def span(self) -> tuple[int, int]:
        """Ranks at the start and at the end."""
        assert self.first.ranks is not None and self.last.ranks is not None
        return self.first.ranks, self.last.ranks

    def budget(self, step: int) -> Budget:
        """What may stay after this step."""
        return falling(self.first, self.last, self.schedule.ranks(step))

    def forecast_cuts(self, cubic: CubicDecay, holdings: Sequence[Holding], first: int) -> Forecast:
        """Every cut from step `first` on that leaves fewer ranks; parameters assume even cuts."""
        begin, target = self.span
        even = (self.first.parameters or 0) * target // max(1, begin)
        end = Budget(target, self.last.parameters or even)
        events, left = list[Expected](), ranks_used(holdings)
        for step in cubic.cuts(first):
            now = falling(self.first, end, cubic.ranks(step))
            if now.ranks != left:
                left = now.ranks or 0
                events.append(Expected(step, 0, left, now.parameters or 0))
        return Forecast(tuple(events), tuple(holdings))

    def follow_kept(self) -> None:
        """Have `project` follow `kept`."""
        self.flags = self.flags_of([delta.state.kept for delta in self.deltas])

    def flags_of(self, true: Sequence[Sequence[bool]]) -> list[Tensor]:
        """A flag for each rank, module by module: 1.0 or 0.0, where e is, in its dtype and sharded as it is."""
        flags = torch.tensor([float(flag) for of_module in true for flag in of_module])
        columns = flags.split([len(of_module) for of_module in true])
        return [
            local(laid_out_like(column.unsqueeze(1).to(e.device, e.dtype), e))
            for column, e in zip(columns, map(e_of, self.deltas), strict=True)
        ]

    def project(self) -> None:
        """e ← 0 for all ranks that do not count; the optimizer may move it again at the next step."""
        torch._foreach_mul_(self.values(), self.flags)

    def values(self) -> list[Tensor]:
        """e of every module, this process's part of it."""
        return [local(e_of(delta).detach()) for delta in self.deltas]

    def pruned(self) -> list[Tensor]:
        return self.values()

    def decide(self, kept: Sequence[list[bool]], scores: Sequence[Sequence[float]], step: int) -> list[Change]:
        """From this step on these ranks count; says which modules that changed."""
        before = [delta.rank for delta in self.deltas]
        for delta, flags in zip(self.deltas, kept, strict=True):
            delta.assign(kept=flags, settled=step >= self.schedule.last_cut)
        self.follow_kept()
        self.project()
        return [
            Change(i, delta.rank - rank, sum(scores[i]) / len(scores[i]))
            for i, (delta, rank) in enumerate(zip(self.deltas, before, strict=True))
            if delta.rank != rank
        ]


def e_of(delta: BlockDelta) -> nn.Parameter:
    return delta.block(0)["E"]
