"""Allocators: invariants over random holdings, parity with brute force, and the hand-computed case T6."""

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from increlora.decide.allocation import Grant, Holding, Plan, parameters_used, ranks_used
from increlora.decide.budget import Budget, block_sizes
from increlora.decide.selection import can_finish, cheapest_cover, grow_published, grow_top, parameters_left, spent
from tests.reference import naive

REPEATABLE = settings(derandomize=True, deadline=None)  # a run never fails by chance
COSTS = st.sampled_from([4, 7, 10, 10, 25])


def holding(rank: int, free: tuple[int, ...], cost: int = 10) -> Holding:
    return Holding(rank, free, cost)


def modules(count: int, free: tuple[int, ...], rank: int = 1, cost: int = 10) -> list[Holding]:
    return [holding(rank, free, cost)] * count


def granted(holdings: list[Holding], plan: Plan) -> list[Holding]:
    """What the modules hold afterwards."""
    after = list(holdings)
    for grant in plan.grants:
        h = after[grant.module]
        assert h.free[grant.block] == grant.ranks
        free = tuple(size for i, size in enumerate(h.free) if i != grant.block)
        after[grant.module] = Holding(h.rank + grant.ranks, free, h.cost)
    return after


def totals(holdings: list[Holding], importance: list[float], grow, budget: Budget, top_h: int) -> list[int]:
    """Total rank after each event, until the budget is spent or nothing more can be had."""
    seen = []
    for _ in range(50):
        plan = grow(importance, holdings, top_h=top_h, budget=budget)
        if not plan.grants:
            break
        holdings = granted(holdings, plan)
        seen.append(ranks_used(holdings))
    return seen


@st.composite
def situations(draw, max_modules: int = 5, max_free: int = 6):
    """Modules as a method builds them (one block size and one-rank tails), with costs of their own."""
    grow_by = draw(st.sampled_from([1, 2, 3, 4]))
    tails = draw(st.integers(0, 2))
    result = []
    for _ in range(draw(st.integers(1, max_modules))):
        capacity = 1 + draw(st.integers(0, max_free))
        sizes = block_sizes(start=1, grow_by=grow_by, capacity=capacity, tails=tails)
        result.append(Holding(1, tuple(sizes[1:]), draw(COSTS)))
    importance = draw(st.lists(st.integers(0, 3).map(float), min_size=len(result), max_size=len(result)))
    return result, importance


@st.composite
def budgets(draw, holdings: list[Holding]):
    used, cost = ranks_used(holdings), parameters_used(holdings)
    ranks = used + draw(st.integers(0, sum(sum(h.free) for h in holdings)))
    bound = draw(st.none() | st.integers(cost, 2 * cost + 60))
    return Budget(ranks, bound) if draw(st.booleans()) else Budget(None, bound if bound is not None else cost + 30)


# ---- T6


def test_t6_strict_budget_is_met_by_a_smaller_last_event() -> None:
    importance = [1.0, 2, 3, 4, 5, 6]
    for grow in (grow_top, grow_published):
        assert totals(modules(6, (1,) * 9), importance, grow, Budget(18), 5) == [11, 16, 18]


def test_t6_two_ranks_per_grant_strict_and_published() -> None:
    """Target 15 from 6 in grants of 2: the published code overshoots to 16, the strict one fills up with one rank."""
    importance, budget = [1.0, 2, 3, 4, 5, 6], Budget(15)
    assert totals(modules(6, (2, 2, 2, 2)), importance, grow_published, budget, 2) == [10, 14, 16]
    assert totals(modules(6, (2, 2, 2, 1, 1)), importance, grow_top, budget, 2) == [10, 14, 15]


def test_t6_published_overshoot_is_never_spent_strict_is() -> None:
    full, importance = modules(2, (2, 2), rank=2), [1.0, 2.0]
    plan = grow_published(importance, full, top_h=2, budget=Budget(5))
    assert (sum(g.ranks for g in plan.grants), plan.spent) == (2, False)  # 6 of 5
    assert grow_published(importance, granted(full, plan), top_h=2, budget=Budget(5)) == Plan((), (), False)
    assert grow_published(importance, full, top_h=1, budget=Budget(6)).spent
    assert grow_published(importance, full, top_h=1, budget=Budget(4)) == Plan((), (), True)


# ---- the strict allocator


def test_the_most_important_grow_in_order_and_ties_go_to_the_earlier_module() -> None:
    plan = grow_top([2.0, 5.0, 2.0, 7.0, 2.0], modules(5, (2, 1)), top_h=4, budget=Budget(20))
    assert [g.module for g in plan.grants] == [3, 1, 0, 2]
    assert all(g == Grant(g.module, 0, 2) for g in plan.grants)


def test_a_saturated_module_is_reported_and_the_next_best_gets_the_rank() -> None:
    holdings = [holding(3, ()), holding(1, (1,)), holding(3, ()), holding(1, (1,))]
    plan = grow_top([9.0, 1.0, 8.0, 5.0], holdings, top_h=1, budget=Budget(9))
    assert plan == Plan((Grant(3, 0, 1),), (0, 2), True)


def test_only_modules_that_would_have_grown_are_reported_saturated() -> None:
    plan = grow_top([1.0, 9.0], [holding(3, ()), holding(1, (1, 1))], top_h=1, budget=Budget(6))
    assert plan == Plan((Grant(1, 0, 1),), (), False)


def test_one_rank_blocks_fill_what_is_less_than_a_block() -> None:
    plan = grow_top([1.0, 2.0], modules(2, (4, 1)), top_h=2, budget=Budget(4))
    assert plan == Plan((Grant(1, 1, 1), Grant(0, 1, 1)), (), True)


def test_a_block_is_refused_if_the_rest_could_then_not_be_met() -> None:
    """5 missing, blocks of 4 and a single tail: the tail must not go first where no second one is left."""
    holdings = [holding(1, (4, 1)), holding(1, (4,))]
    first = grow_top([2.0, 1.0], holdings, top_h=1, budget=Budget(7))
    assert first.grants == (Grant(0, 0, 4),)
    assert grow_top([1.0, 2.0], granted(holdings, first), top_h=1, budget=Budget(7)).grants == (Grant(0, 0, 1),)


def test_a_parameter_bound_moves_rank_to_cheaper_modules() -> None:
    holdings = [holding(1, (1, 1), cost=100), holding(1, (1, 1), cost=10)]
    assert grow_top([9.0, 1.0], holdings, top_h=1, budget=Budget(4, 140)).grants == (Grant(1, 0, 1),)
    assert grow_top([9.0, 1.0], holdings, top_h=1, budget=Budget(4, 220)).grants == (Grant(0, 0, 1),)


def test_a_parameter_budget_is_short_by_less_than_the_smallest_grant() -> None:
    holdings = [holding(1, (2, 1), cost=30), holding(1, (2, 1), cost=10)]
    budget = Budget(None, 40 + 60 + 19)
    plan = grow_top([9.0, 1.0], holdings, top_h=2, budget=budget)
    assert plan.grants == (Grant(0, 0, 2), Grant(1, 1, 1))  # a block of two would cost 20
    assert plan.spent
    assert parameters_left(granted(holdings, plan), budget) == 9


@given(st.data())
@settings(REPEATABLE, max_examples=150)
def test_strict_invariants(data) -> None:
    holdings, importance = data.draw(situations())
    budget, top_h = data.draw(budgets(holdings)), data.draw(st.integers(1, 6))
    assume(can_finish(holdings, budget))
    shuffler = random.Random(data.draw(st.integers(0, 9)))
    for _ in range(40):
        if spent(holdings, budget):
            break
        plan = grow_top(importance, holdings, top_h=top_h, budget=budget)
        assert plan == grow_top(importance, holdings, top_h=top_h, budget=budget)
        assert 1 <= len(plan.grants) <= top_h, "no progress although the budget is not spent"
        order = [g.module for g in plan.grants]
        assert order == sorted(order, key=lambda i: (-importance[i], i))
        assert len(set(order)) == len(order)
        assert all(not holdings[i].free for i in plan.saturated)
        worst = (-importance[order[-1]], order[-1])
        if len(order) == top_h:
            assert all((-importance[i], i) < worst for i in plan.saturated)
        holdings = granted(holdings, plan)
        assert budget.ranks is None or ranks_used(holdings) <= budget.ranks
        assert budget.parameters is None or parameters_used(holdings) <= budget.parameters
        assert can_finish(holdings, budget)
        assert plan.spent == spent(holdings, budget)
        shuffler.shuffle(importance)
    assert spent(holdings, budget)
    if budget.ranks is not None:
        assert ranks_used(holdings) == budget.ranks
    else:
        left = budget.parameters - parameters_used(holdings)
        assert all(left < min(h.free) * h.cost for h in holdings if h.free)


@given(st.data())
@settings(REPEATABLE)
def test_permuting_the_modules_permutes_the_grants(data) -> None:
    holdings, _ = data.draw(situations())
    budget, top_h = data.draw(budgets(holdings)), data.draw(st.integers(1, 6))
    importance = [float(v) for v in data.draw(st.permutations(range(len(holdings))))]
    order = data.draw(st.permutations(range(len(holdings))))
    plan = grow_top(importance, holdings, top_h=top_h, budget=budget)
    moved = grow_top([importance[i] for i in order], [holdings[i] for i in order], top_h=top_h, budget=budget)
    assert [(order[g.module], g.block, g.ranks) for g in moved.grants] == [
        (g.module, g.block, g.ranks) for g in plan.grants
    ]
    assert [order[i] for i in moved.saturated] == list(plan.saturated)
    assert moved.spent == plan.spent


# ---- can the budget still be met?


@given(st.data())
@settings(REPEATABLE)
def test_cheapest_cover_equals_brute_force(data) -> None:
    holdings, _ = data.draw(situations(max_modules=4, max_free=5))
    assume(sum(len(h.free) for h in holdings) <= 12)
    ranks = data.draw(st.integers(-1, 1 + sum(sum(h.free) for h in holdings)))
    assert cheapest_cover(holdings, ranks) == naive.cheapest_cover(holdings, ranks)


def test_cheap_single_ranks_may_beat_an_expensive_block() -> None:
    holdings = [holding(1, (1, 1, 1, 1), cost=10), holding(1, (4,), cost=100)]
    assert cheapest_cover(holdings, 4) == 40
    assert can_finish(holdings, Budget(6, 110 + 40))
    assert not can_finish(holdings, Budget(6, 110 + 39))


@pytest.mark.parametrize(("budget", "possible"), [
    (Budget(2), True), (Budget(7), True), (Budget(8), False), (Budget(1), False), (Budget(4), False),
    (Budget(7, 70), True), (Budget(7, 69), False), (Budget(None, 20), True), (Budget(None, 19), False),
])  # fmt: skip
def test_can_finish(budget: Budget, possible: bool) -> None:
    assert can_finish([holding(1, (4, 1)), holding(1, ())], budget) == possible


def test_spent() -> None:
    assert [spent(modules(2, (2, 1)), Budget(ranks)) for ranks in (1, 2, 3)] == [True, True, False]
    assert [spent(modules(2, (2, 1)), Budget(None, limit)) for limit in (20, 29, 30)] == [True, True, False]
    assert spent(modules(2, ()), Budget(None, 1000))
    assert parameters_left(modules(2, ()), Budget(5)) == math.inf


# ---- the published rule


@given(importance=st.lists(st.integers(0, 4).map(float), min_size=1, max_size=7), top_h=st.integers(1, 8),
       missing=st.integers(1, 9), k=st.integers(1, 3))  # fmt: skip
@settings(REPEATABLE)
def test_published_rule_equals_its_twin(importance: list[float], top_h: int, missing: int, k: int) -> None:
    holdings = modules(len(importance), (k, k))
    used = ranks_used(holdings)
    plan = grow_published(importance, holdings, top_h=top_h, budget=Budget(used + missing))
    expected = naive.chosen_published(importance, used, used + missing, top_h)
    assert [g.module for g in plan.grants] == expected
    assert all(g == Grant(g.module, 0, k) for g in plan.grants)
    assert plan.spent == (len(expected) * k == missing)


def test_published_ties_all_grow() -> None:
    plan = grow_published([0.0] * 4, modules(4, (1,)), top_h=1, budget=Budget(9))
    assert [g.module for g in plan.grants] == [0, 1, 2, 3]


def test_published_saturation_is_reported() -> None:
    plan = grow_published([2.0, 1.0], [holding(3, ()), holding(1, (1,))], top_h=1, budget=Budget(9))
    assert plan == Plan((), (0,), False)


# ---- decisions as data


def test_what_is_used() -> None:
    holdings = [holding(2, (1,), cost=10), holding(3, (), cost=7)]
    assert (ranks_used(holdings), parameters_used(holdings)) == (5, 41)
