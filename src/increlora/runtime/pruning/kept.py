"""Which ranks of one-block deltas count (`BlockDelta.kept`), and that e of the others is zero: what the rules that
prune ranks have in common."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...decide.budget import Budget, falling
from ...decide.projections import zero_dropped
from ...deltas import BlockDelta
from ...errors import BudgetError
from ...ops.parallel import laid_out_like, local
from .base import Change


class KeptRanks:
    """The ranks of all modules, between what there is at the start (`first`) and the budget (`last`).

    Raises: BudgetError for a budget above the start, or one that no choice of ranks meets within its bound."""

    def __init__(self, budget: Budget, deltas: Mapping[str, BlockDelta]) -> None:
        self.names, self.deltas, self.last = list(deltas), list(deltas.values()), budget
        self.costs = [d.in_features + d.out_features for d in self.deltas]
        counts = [len(delta.kept) for delta in self.deltas]
        self.first = Budget(sum(counts), sum(n * cost for n, cost in zip(counts, self.costs, strict=True)))
        self._check_budget()

    def _check_budget(self) -> None:
        start, target = self.span
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


def e_of(delta: BlockDelta) -> nn.Parameter:
    return delta.block(0)["E"]


def dtype_of(delta: BlockDelta) -> torch.dtype:
    """Of statistics: products of two averages underflow in half precision."""
    return torch.float64 if next(delta.parameters()).dtype == torch.float64 else torch.float32
