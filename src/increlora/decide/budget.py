"""The budget in ranks or parameters, and how the capacity of a module is divided into blocks."""

from dataclasses import dataclass

from ..errors import BudgetError

MOST_BLOCKS = 2**16  # of a module


@dataclass(frozen=True)
class Budget:
    """The most that may be active at the end.

    Attributes:
        ranks: total ranks over all modules, or None if counted in parameters only.
        parameters: upper bound on Σ rank · (in + out), the adapter parameters in LoRA form, or None.
        exact: raise for a budget in ranks that the blocks cannot add up to (the published code overshoots instead).
    With `ranks` the budget is met exactly. An additional parameter bound limits *where* ranks may go, never how many.
    """

    ranks: int | None
    parameters: int | None = None
    exact: bool = True


def block_sizes(*, start: int, grow_by: int, capacity: int, tails: int) -> list[int]:
    """Ranks per block: `start`, then blocks of `grow_by`, then `tails` one-rank blocks that make budgets exact.

        block_sizes(start=1, grow_by=4, capacity=12, tails=1) == [1, 4, 4, 1, 1]

    The sum is exactly `capacity`: ranks that do not fill a block of `grow_by` become one-rank blocks.
    """
    if not 1 <= start <= capacity:
        raise BudgetError(f"a start of {start} ranks does not fit a capacity of {capacity}: lower `init_r`")
    free = capacity - start
    full = max(0, free - tails) // grow_by
    if free - full * (grow_by - 1) > MOST_BLOCKS:
        raise BudgetError(f"a capacity of {capacity} ranks in blocks of {grow_by}: lower it, or raise `grow_by`")
    return [start] + [grow_by] * full + [1] * (free - full * grow_by)


def default_capacity(r: int, in_features: int, out_features: int) -> int:
    """max(8, 4 r), limited to the largest rank a matrix of this shape can have."""
    return min(max(8, 4 * r), in_features, out_features)


def falling(start: Budget, end: Budget, ranks: int) -> Budget:
    """The budget between `start` and `end` that allows `ranks` ranks: its parameter bound falls in proportion.

        P = P_end + ⌊(P_start − P_end) (ranks − r_end)/(r_start − r_end)⌋

    The cost of the cheapest `ranks` ranks is convex in `ranks`, so the bound holds at every step if it holds at both
    ends.
    """
    assert start.ranks is not None and end.ranks is not None
    if end.parameters is None or start.parameters is None or start.ranks == end.ranks:
        return Budget(ranks, end.parameters, end.exact)
    spread, span = start.parameters - end.parameters, start.ranks - end.ranks
    return Budget(ranks, end.parameters + spread * (ranks - end.ranks) // span, end.exact)
