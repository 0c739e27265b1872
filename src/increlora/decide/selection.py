"""Allocators: from importance and holdings to grants, or from scores of ranks to the ranks that stay. They are pure,
deterministic, and give the same result on every process."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from .allocation import Grant, Holding, Plan, parameters_used, ranks_used, with_block
from .budget import Budget


def grow_top(importance: Sequence[float], holdings: Sequence[Holding], *, top_h: int, budget: Budget) -> Plan:
    """The `top_h` most important modules get their next block; ties go to the earlier module; never over budget.

    A block is granted only if the budget can still be met exactly afterwards (within the parameter bound, if there is
    one). If less than a block is left, one-rank blocks fill the rest. A saturated module is skipped and reported, and
    the next best one gets the rank.

    Args: importance: finite scores, one per holding.   top_h ≥ 1: modules per event.   budget: final budget.
    Returns: Plan with the grants in order of importance.   Raises: nothing; an empty plan means the budget is spent.
    Source: IncreLoRA, algorithm 1. Differs: strict top-h, exact budget (the published code overshoots, see
    `grow_published`).
    """
    state = list(holdings)
    grants: list[Grant] = []
    saturated: list[int] = []
    for i in sorted(range(len(state)), key=lambda i: (-importance[i], i)):
        if len(grants) == top_h or spent(state, budget):
            break
        if not state[i].free:
            saturated.append(i)
        elif (position := _first_that_fits(state, i, budget)) is not None:
            grants.append(Grant(i, position, state[i].free[position]))
            state[i] = with_block(state[i], position)
    return Plan(tuple(grants), tuple(saturated), spent(state, budget))


def grow_published(importance: Sequence[float], holdings: Sequence[Holding], *, top_h: int, budget: Budget) -> Plan:
    """The published rule: every module at or above the k-th largest score grows, k = min(top_h, ranks left).

    With ties, more than top_h modules grow. Ranks are counted as modules, so the budget can be exceeded; it counts as
    spent only on exact equality. Source: IncreLoRA, published code.
    """
    assert budget.ranks is not None
    used = ranks_used(holdings)
    if used >= budget.ranks:
        return Plan((), (), used == budget.ranks)
    threshold = sorted(importance, reverse=True)[min(top_h, budget.ranks - used, len(importance)) - 1]
    chosen = [i for i, value in enumerate(importance) if value >= threshold]
    grants = tuple(Grant(i, 0, holdings[i].free[0]) for i in chosen if holdings[i].free)
    saturated = tuple(i for i in chosen if not holdings[i].free)
    return Plan(grants, saturated, used + sum(g.ranks for g in grants) == budget.ranks)


def spent(holdings: Sequence[Holding], budget: Budget) -> bool:
    """Whether the budget allows no further block."""
    if budget.ranks is not None:
        return ranks_used(holdings) >= budget.ranks
    left = parameters_left(holdings, budget)
    return all(min(h.free) * h.cost > left for h in holdings if h.free)


def parameters_left(holdings: Sequence[Holding], budget: Budget) -> float:
    """Parameters the budget still allows (infinite without a bound)."""
    return math.inf if budget.parameters is None else budget.parameters - parameters_used(holdings)


def can_finish(holdings: Sequence[Holding], budget: Budget) -> bool:
    """Whether the free blocks can still meet the budget exactly, within its parameter bound."""
    left = parameters_left(holdings, budget)
    if budget.ranks is None:
        return left >= 0
    cost = cheapest_cover(holdings, budget.ranks - ranks_used(holdings))
    return cost is not None and cost <= left


def cheapest_cover(holdings: Sequence[Holding], ranks: int) -> int | None:
    """Fewest parameters that add exactly `ranks` ranks from the free blocks; None if no choice of blocks does.

    Block sizes are one common size and 1 (see `budget.block_sizes`). For every number of large blocks, this takes the
    cheapest large blocks, and the cheapest one-rank blocks for the rest: one-rank blocks of a cheap module may cost
    less than a large block of an expensive one.
    """
    large = max((size for h in holdings for size in h.free), default=1)
    whole = _sums_of_cheapest(h.cost * size for h in holdings for size in h.free if size == large)
    ones = _sums_of_cheapest(h.cost for h in holdings for size in h.free if size == 1 < large)
    rest = {count: ranks - count * large for count in range(len(whole))}
    return min((whole[count] + ones[left] for count, left in rest.items() if 0 <= left < len(ones)), default=None)


def _sums_of_cheapest(costs: Iterable[int]) -> list[int]:
    """[0, the cheapest, the two cheapest together, …]"""
    return list(accumulate(sorted(costs), initial=0))


def _first_that_fits(state: Sequence[Holding], i: int, budget: Budget) -> int | None:
    """Position of the first free block of module i that may be granted; of blocks of one size the first is tried."""
    for size in dict.fromkeys(state[i].free):
        position = state[i].free.index(size)
        if can_finish([*state[:i], with_block(state[i], position), *state[i + 1 :]], budget):
            return position
    return None


def keep_top(scores: Sequence[Sequence[float]], costs: Sequence[int], budget: Budget) -> list[list[bool]]:
    """The most important ranks stay, exactly `budget.ranks` of them, within `budget.parameters`.

    A rank stays if the rest of the budget can still be met exactly within the bound; ties go to the earlier module and
    rank; scores that are not finite come last.

    Args: scores: of each rank, module by module; at least `budget.ranks` in all.   costs: parameters of one rank, by
        module.   budget: its parameter bound, if any, must allow the cheapest `budget.ranks` ranks.
    Returns: of each rank, whether it stays.
    Source: AdaLoRA, algorithm 1. Differs: exact under ties (see `keep_published`), and the bound.
    """
    assert budget.ranks is not None
    kept = [[False] * len(of_module) for of_module in scores]
    undecided = Counter(dict.fromkeys(costs, 0))
    for of_module, cost in zip(scores, costs, strict=True):
        undecided[cost] += len(of_module)
    ranks, parameters = budget.ranks, math.inf if budget.parameters is None else budget.parameters
    best_first = sorted(
        (-score if math.isfinite(score) else math.inf, i, j)
        for i, of_module in enumerate(scores)
        for j, score in enumerate(of_module)
    )
    for _, i, j in best_first:
        undecided[costs[i]] -= 1
        if ranks and costs[i] + _cheapest(undecided, ranks - 1) <= parameters:
            kept[i][j] = True
            ranks, parameters = ranks - 1, parameters - costs[i]
    return kept


def keep_published(scores: Sequence[Sequence[float]], costs: Sequence[int], budget: Budget) -> list[list[bool]]:
    """The published rule: of n ranks, b of which may stay, all at or below the (n − b)-th smallest score are dropped.

    Ties at the threshold are dropped together: four equal scores and b = 2 leave nothing. Arguments as for `keep_top`;
    the parameter bound is ignored. Source: AdaLoRA, published code.
    """
    assert budget.ranks is not None
    flat = sorted(score for of_module in scores for score in of_module)
    gone = len(flat) - budget.ranks
    threshold = flat[gone - 1] if gone > 0 else -math.inf
    return [[score > threshold for score in of_module] for of_module in scores]


def _cheapest(undecided: Mapping[int, int], count: int) -> float:
    """Fewest parameters of `count` ranks out of `undecided` (cost → number); infinite if there are fewer."""
    total = 0
    for cost, there in sorted(undecided.items()):
        taken = min(there, count)
        total, count = total + taken * cost, count - taken
    return math.inf if count else total
