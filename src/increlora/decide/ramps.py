"""Ranks that change linearly with depth, as whole numbers that add up to the budget exactly.

    r(u) = mean + (last − first)(u − 1/2)        u = 0 at the first adapted layer, 1 at the last

All arithmetic is exact, so every process and machine gets the same ranks.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby

from ..errors import BudgetError
from ..naming import grid
from .budget import Budget

MIDDLE = Fraction(1, 2)
SLOPES = 64  # if the full slope is too expensive, multiples of 1/64 of it are tried


def depths(names: Sequence[str], *, restart: bool) -> list[Fraction]:
    """Position u of each module's layer among the layers that occur, from 0 to 1.

    Layers are ordered by their number within a stack ("encoder.block", "decoder.block"). With `restart`, each stack
    runs from 0 to 1; otherwise all stacks together do, in the order in which they appear. Modules outside numbered
    layers, and a single layer, are in the middle.
    """
    cells, order, _ = grid(names)
    layers = [layer for layer in order if layer != "–"]
    ramps = [list(ramp) for _, ramp in groupby(layers, lambda layer: layer.rpartition(".")[0])] if restart else [layers]
    found = {layer: Fraction(i, len(ramp) - 1) for ramp in ramps for i, layer in enumerate(ramp) if len(ramp) > 1}
    return [found.get(cells[name].layer, MIDDLE) for name in names]


def first_of(mean: Fraction, first: float | None) -> Fraction:
    """Rank at the first layer: the given one, or half the mean, at least 1.

    Raises: BudgetError if it, or the rank at the last layer that follows from it, is below 1."""
    if first is None:
        return max(Fraction(1), mean / 2)
    if not 1 <= first <= 2 * mean - 1:
        raise BudgetError(
            f"first_r={first}: with {float(mean):g} ranks per module on average the last layer would get "
            f"{float(2 * mean) - first:g}; give a rank from 1 to {float(2 * mean - 1):g}"
        )
    return Fraction(first)


def ramp_ranks(
    places: Sequence[Fraction], *, first: Fraction, budget: Budget, shapes: Sequence[tuple[int, int]]
) -> list[int]:
    """Integer ranks along the ramp that add up to `budget.ranks` and cost at most `budget.parameters`.

    If the full slope costs too much (later layers are wider), it is flattened until it fits; a flat ramp gives every
    module the mean. Modules at the same position get the same rank as far as the sum permits.

    Args: places: u of each module, in model order.   first: rank at u = 0.   shapes: (in, out); a rank lies between 1
        and the smaller of the two.
    Returns: one rank per module.
    Raises: BudgetError if the sum cannot be met within these limits, or costs too much even with a flat ramp.
    Source: PRILoRA, linear increase with depth.   Differs: the published rounding is not known; exact sum, limits and
        bound are ours. 4 → 12 over 12 equal layers: 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12.
    """
    assert budget.ranks is not None
    limits = [min(shape) for shape in shapes]
    if not len(places) <= budget.ranks <= sum(limits):
        raise BudgetError(
            f"the budget of {budget.ranks} ranks does not fit {len(places)} modules, which hold {len(places)} to "
            f"{sum(limits)} (at least 1 each, at most what the shape can use): change `r` or `total_ranks`"
        )
    mean = Fraction(budget.ranks, len(places))
    rise = 2 * (mean - first)

    def sloped(slope: int) -> list[int]:
        wanted = [mean + rise * (u - MIDDLE) * slope / SLOPES for u in places]
        return nearest(wanted, limits=limits, total=budget.ranks or 0)

    def too_expensive(slope: int) -> bool:
        cost = sum(rank * sum(shape) for rank, shape in zip(sloped(slope), shapes, strict=True))
        return budget.parameters is not None and cost > budget.parameters

    if not too_expensive(SLOPES):
        return sloped(SLOPES)
    if too_expensive(0):
        raise BudgetError(
            f"{budget.ranks} ranks cost more than {budget.parameters} parameters here, since some modules are too "
            f"small for the average: lower `r`, or give the budget as `total_ranks`"
        )
    return sloped(bisect_left(range(SLOPES), True, 1, key=too_expensive) - 1)


def nearest(wanted: Sequence[Fraction], *, limits: Sequence[int], total: int) -> list[int]:
    """Integers from 1 to `limits` that add up to `total`: each unit goes to the entry furthest below its wanted value.

    If the wanted values add up to `total` and lie within the limits, this is rounding by largest remainder. Otherwise
    it is the same after shifting all of them by one number. Ties go to the earlier entry.
    """
    counts = [1] * len(wanted)
    waiting = [(1 - value, i) for i, value in enumerate(wanted) if limits[i] > 1]
    heapq.heapify(waiting)
    for _ in range(total - len(counts)):
        above, i = waiting[0]
        counts[i] += 1
        if counts[i] < limits[i]:
            heapq.heapreplace(waiting, (above + 1, i))
        else:
            heapq.heappop(waiting)
    return counts
