"""Budgets and block sizes; T12."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from increlora.decide.budget import Budget, block_sizes, default_capacity
from increlora.errors import BudgetError
from increlora.methods import IncreLora
from increlora.methods.base import budget_of

REPEATABLE = settings(derandomize=True, deadline=None)  # a run never fails by chance
DEBERTA = ([(768, 768)] * 4 + [(768, 3072), (3072, 768)]) * 12  # query, key, value, output, intermediate, output
BART = ([(1024, 1024)] * 4 + [(1024, 4096), (4096, 1024)]) * 12 + (
    [(1024, 1024)] * 8 + [(1024, 4096), (4096, 1024)]
) * 12


def cost_of_one_rank(shapes: list[tuple[int, int]]) -> int:
    return sum(m + n for m, n in shapes)


@pytest.mark.parametrize(("shapes", "modules", "with_e"), [(DEBERTA, 72, 165_960), (BART, 192, 540_864)])
def test_t12_parameters_of_one_rank_everywhere(shapes, modules: int, with_e: int) -> None:
    """The specification counts the λ of every rank too; budgets count LoRA's form, without them."""
    assert len(shapes) == modules
    uniform = cost_of_one_rank(shapes)
    budget = budget_of(IncreLora(r=1), modules, uniform)
    assert budget == Budget(modules, uniform)
    assert budget.parameters + budget.ranks == with_e


def test_t12_uniform_rank_two_and_the_head() -> None:
    uniform = cost_of_one_rank(DEBERTA)
    budget = budget_of(IncreLora(r=2), 72, uniform)
    assert budget == Budget(144, 331_776)
    assert budget.parameters + budget.ranks == 331_920
    pooler, classifier = 768 * 768 + 768, 2 * 768 + 2
    assert pooler + classifier == 592_130


def test_the_more_specific_budget_counts() -> None:
    assert budget_of(IncreLora(r=3), 6, 1000) == Budget(18, 3000)
    assert budget_of(IncreLora(r=3, total_ranks=11), 6, 1000) == Budget(11, None)
    assert budget_of(IncreLora(r=3, total_parameters=999), 6, 1000) == Budget(None, 999)
    with pytest.raises(BudgetError, match="total_ranks=11 and total_parameters=999: give one"):
        budget_of(IncreLora(r=3, total_ranks=11, total_parameters=999), 6, 1000)


@pytest.mark.parametrize(("start", "grow_by", "capacity", "tails", "expected"), [
    (1, 4, 12, 1, [1, 4, 4, 1, 1, 1]), (1, 4, 8, 1, [1, 4, 1, 1, 1]), (1, 1, 4, 0, [1, 1, 1, 1]), (2, 3, 2, 5, [2]),
    (1, 4, 9, 0, [1, 4, 4]), (1, 4, 9, 1, [1, 4, 1, 1, 1, 1]), (3, 5, 6, 0, [3, 1, 1, 1]),
])  # fmt: skip
def test_block_sizes(start: int, grow_by: int, capacity: int, tails: int, expected: list[int]) -> None:
    assert block_sizes(start=start, grow_by=grow_by, capacity=capacity, tails=tails) == expected


@given(start=st.integers(1, 5), grow_by=st.integers(1, 6), more=st.integers(0, 40), tails=st.integers(0, 6))
@settings(REPEATABLE)
def test_block_sizes_fill_the_capacity(start: int, grow_by: int, more: int, tails: int) -> None:
    sizes = block_sizes(start=start, grow_by=grow_by, capacity=start + more, tails=tails)
    assert sum(sizes) == start + more
    assert sizes[0] == start
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert set(sizes[1:]) <= {grow_by, 1}
    ones = sizes[1:].count(1) if grow_by > 1 else more
    assert ones >= min(tails, more)  # so many one-rank blocks make the budget exact,
    assert grow_by == 1 or ones < tails + grow_by  # and no more than that and an incomplete block


@pytest.mark.parametrize("start", [0, -1, 5])
def test_a_start_outside_the_capacity_is_refused(start: int) -> None:
    with pytest.raises(BudgetError, match=f"a start of {start} ranks does not fit a capacity of 4"):
        block_sizes(start=start, grow_by=1, capacity=4, tails=0)


@pytest.mark.parametrize(("r", "shape", "expected"), [
    (1, (64, 64), 8), (2, (64, 64), 8), (3, (64, 64), 12), (8, (64, 64), 32), (8, (20, 64), 20), (8, (64, 3), 3),
])  # fmt: skip
def test_default_capacity(r: int, shape: tuple[int, int], expected: int) -> None:
    assert default_capacity(r, *shape) == expected
