"""Which ranks of one-block deltas count, and that e of the others is zero: what the rules that prune ranks share.

The ranks fall from what there is at the start to the budget, and the bound on parameters falls in proportion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..decide.allocation import Holding, ranks_used
from ..decide.budget import Budget, falling
from ..decide.projections import zero_dropped
from ..decide.schedules import CubicDecay
from ..deltas import BlockDelta
from ..errors import CheckpointError
from ..ops.parallel import laid_out_like, local
from .base import Change, Deltas, Expected, Forecast, Runner


class KeptRanks:
    """The ranks of all modules, between those at the start (`first`) and the budget (`last`)."""

    def __init__(self, budget: Budget, deltas: Sequence[BlockDelta]) -> None:
        self.deltas, self.last = deltas, budget
        self.costs = [d.in_features + d.out_features for d in deltas]
        counts = [len(delta.kept) for delta in deltas]
        self.first = Budget(sum(counts), sum(n * cost for n, cost in zip(counts, self.costs, strict=True)))

    @property
    def span(self) -> tuple[int, int]:
        """Ranks at the start and at the end."""
        assert self.first.ranks is not None and self.last.ranks is not None
        return self.first.ranks, self.last.ranks

    def budget(self, ranks: int) -> Budget:
        """What may stay when the schedule allows `ranks` ranks."""
        return falling(self.first, self.last, ranks)

    @property
    def settled(self) -> bool:
        return all(delta.settled for delta in self.deltas)

    def lay_out(self) -> None:
        """Have `project` follow `kept`."""
        self.flags = self.flags_of([delta.kept for delta in self.deltas])

    def flags_of(self, true: Sequence[Sequence[bool]]) -> list[Tensor]:
        """A flag for each rank, module by module: 1.0 or 0.0, where e is, in its dtype and sharded as it is."""
        flags = torch.tensor([float(flag) for of_module in true for flag in of_module])
        columns = flags.split([len(of_module) for of_module in true])
        return [
            local(laid_out_like(column.unsqueeze(1).to(e.device, e.dtype), e))
            for column, e in zip(columns, map(e_of, self.deltas), strict=True)
        ]

    def project(self) -> None:
        """e ← 0 for all ranks that do not count."""
        zero_dropped(self.values(), self.flags)

    def values(self) -> list[Tensor]:
        """e of every module, this process's part of it."""
        return [local(e_of(delta).detach()) for delta in self.deltas]

    def decide(self, kept: Sequence[list[bool]], scores: Sequence[Sequence[float]], *, settled: bool) -> list[Change]:
        """From now on these ranks count; says which modules that changed."""
        before = [delta.rank for delta in self.deltas]
        for delta, flags in zip(self.deltas, kept, strict=True):
            delta.kept, delta.settled = flags, settled
        self.lay_out()
        return [
            Change(i, delta.rank - rank, sum(scores[i]) / len(scores[i]))
            for i, (delta, rank) in enumerate(zip(self.deltas, before, strict=True))
            if delta.rank != rank
        ]


def forecast_cuts(cubic: CubicDecay, ranks: KeptRanks, holdings: Sequence[Holding], first: int) -> Forecast:
    """Every cut from step `first` on that leaves fewer ranks; parameters assume even cuts."""
    begin, target = ranks.span
    even = (ranks.first.parameters or 0) * target // max(1, begin)
    end = Budget(target, ranks.last.parameters or even)
    events, left = list[Expected](), ranks_used(holdings)
    for step in cubic.cuts(first):
        now = falling(ranks.first, end, cubic.ranks(step))
        if now.ranks != left:
            left = now.ranks or 0
            events.append(Expected(step, 0, left, now.parameters or 0))
    return Forecast(tuple(events), tuple(holdings))


def start_of(deltas: Deltas) -> list[Holding]:
    """What the modules hold before anything is pruned."""
    return [Holding(name, len(d.kept), (), d.in_features + d.out_features) for name, d in deltas.items()]


def check_statistics(runner: Runner, sizes: Sequence[int]) -> None:
    """Raise CheckpointError for statistics of another length than `sizes` says."""
    for name, found, size in zip(runner.names, runner.statistics(), sizes, strict=True):
        if len(found) != size:
            raise CheckpointError(
                f"{name}: {len(found)} statistics were loaded, {size} are needed: the adapter file is damaged"
            )


def e_of(delta: BlockDelta) -> nn.Parameter:
    return delta.block(0)["E"]
