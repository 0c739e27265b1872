"""Ranks along a ramp: P1 of the specification, exact sums within limits and bounds, and where a layer stands."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from increlora.decide.budget import Budget
from increlora.decide.ramps import depths, first_of, nearest, ramp_ranks
from increlora.errors import BudgetError

REPEATABLE = settings(derandomize=True, deadline=None)  # a run never fails by chance
BLOCK = {"attention.q": (768, 768), "attention.k": (768, 768), "attention.v": (768, 768), "attention.o": (768, 768),
         "f1": (768, 3072), "f2": (3072, 768)}  # one layer of DeBERTaV3-base  # fmt: skip
PUBLISHED = [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]


def ranks(shapes: dict[str, tuple[int, int]], r: int, *, first: float | None = None, bound: bool = True, **options):
    """Rank by module for an average of r."""
    cost = r * sum(map(sum, shapes.values()))
    places = depths(list(shapes), restart=options.get("restart", True))
    total = options.get("total", r * len(shapes))
    budget = Budget(total, cost if bound else None)
    given = first_of(Fraction(total, len(shapes)), first)
    return dict(zip(shapes, ramp_ranks(places, first=given, budget=budget, shapes=list(shapes.values())), strict=True))


def layers(count: int, block: dict[str, tuple[int, int]] = BLOCK, stack: str = "h.layer") -> dict[str, tuple[int, int]]:
    return {f"{stack}.{i}.{kind}": shape for i in range(count) for kind, shape in block.items()}


def by_layer(found: dict[str, int], stack: str = "h.layer.") -> list[set[int]]:
    """The ranks that occur in each layer."""
    kinds: dict[int, set[int]] = {}
    for name, rank in found.items():
        if name.startswith(stack):
            kinds.setdefault(int(name.removeprefix(stack).split(".")[0]), set()).add(rank)
    return [kinds[i] for i in sorted(kinds)]


# -- the published case ------------------------------------------------------------------------------------------------


def test_p1_four_to_twelve_over_twelve_layers() -> None:
    found = ranks(layers(12), 8)
    assert by_layer(found) == [{rank} for rank in PUBLISHED]
    assert sum(found.values()) == 576 and sum(PUBLISHED) == 96
    assert sum(rank * sum(BLOCK[name.split(".", 3)[3]]) for name, rank in found.items()) == 1_327_104
    values = [4 + Fraction(8 * i, 11) for i in range(12)]
    assert [round(float(v), 3) for v in values[:3]] == [4, 4.727, 5.455]
    assert nearest(values, limits=[99] * 12, total=96) == PUBLISHED
    assert sum(map(int, values)) == 91 and sum(-(-v // 1) for v in values) == 101


@pytest.mark.parametrize(("r", "first", "expected"), [
    (8, 8.0, [8, 8, 8, 8]), (8, 12.0, [12, 9, 7, 4]), (2, None, [1, 2, 2, 3]), (1, None, [1, 1, 1, 1]),
    (8, 1.0, [1, 6, 10, 15]), (8, 6.5, [7, 8, 8, 9]),
])  # fmt: skip
def test_other_slopes(r: int, first: float | None, expected: list[int]) -> None:
    assert by_layer(ranks(layers(4), r, first=first)) == [{rank} for rank in expected]


# -- places ------------------------------------------------------------------------------------------------------------


def test_a_layer_stands_where_its_number_puts_it_among_those_that_occur() -> None:
    names = ["pooler.dense", "h.10.q", "h.2.q", "h.2.ff.3.w", "h.7.q"]
    assert depths(names, restart=True) == [Fraction(1, 2), 1, 0, 0, Fraction(1, 2)]
    assert depths(["h.3.q", "h.3.k", "lm_head"], restart=True) == [Fraction(1, 2)] * 3


def test_each_stack_has_a_ramp_of_its_own_or_all_share_one() -> None:
    names = [f"encoder.block.{i}.q" for i in range(2)] + [f"decoder.block.{i}.q" for i in range(3)]
    assert depths(names, restart=True) == [0, 1, 0, Fraction(1, 2), 1]
    assert depths(names, restart=False) == [Fraction(i, 4) for i in range(5)]


def test_modules_outside_layers_get_the_mean() -> None:
    found = ranks({"pooler": (768, 768)} | layers(12), 8)
    assert found["pooler"] == 8 and by_layer(found) == [{rank} for rank in PUBLISHED]


# -- what has to fit ---------------------------------------------------------------------------------------------------


def test_wider_later_layers_flatten_the_ramp_until_lora_pays_for_it() -> None:
    rising = {f"h.{i}.q": (20, 20 + 4 * i) for i in range(8)}
    assert list(ranks(rising, 8).values()) == [8] * 8  # any rise costs more than uniform ranks
    assert list(ranks(rising, 8, bound=False).values()) == [4, 5, 6, 7, 9, 10, 11, 12]
    falling = {f"h.{i}.q": (20, 60 - 4 * i) for i in range(8)}
    assert list(ranks(falling, 8).values()) == [4, 5, 6, 7, 9, 10, 11, 12]


def test_as_much_slope_is_kept_as_the_parameters_allow() -> None:
    shapes = {f"h.{i}.q": (20, 20) for i in range(8)} | {"head": (20, 30)}
    places, first = depths(list(shapes), restart=True), Fraction(4)
    uneven = [(20, 20)] * 7 + [(20, 21), (20, 30)]
    found = [
        ramp_ranks(places, first=first, budget=Budget(72, 72 * 40 + extra), shapes=uneven) for extra in (88, 90, 92)
    ]
    assert [row[7] for row in found] == [8, 10, 12] and all(sum(row) == 72 for row in found)


def test_no_rank_is_larger_than_its_module() -> None:
    shapes = layers(4, {"q": (30, 30), "small": (30, 5)})
    found = ranks(shapes, 6, bound=False)
    assert sum(found.values()) == 48
    assert max(rank for name, rank in found.items() if "small" in name) == 5


@pytest.mark.parametrize(("shapes", "r", "options", "message"), [
    (layers(2), 8, {"total": 11}, "11 ranks does not fit 12 modules, which hold 12 to"),
    ({"a": (3, 9), "b": (4, 9)}, 4, {}, "8 ranks does not fit 2 modules, which hold 2 to 7"),
    ({"a": (3, 9), "b": (40, 90)}, 4, {}, r"8 ranks cost more than 568 parameters here.*`total_ranks`"),
])  # fmt: skip
def test_what_cannot_be_met_is_refused(shapes: dict, r: int, options: dict, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        ranks(shapes, r, **options)


@pytest.mark.parametrize("first", [0.5, 15.5, -3.0])
def test_a_first_rank_whose_counterpart_is_no_rank_is_refused(first: float) -> None:
    with pytest.raises(BudgetError, match=rf"first_r={first}.*give a rank from 1 to 15"):
        first_of(Fraction(8), first)


# -- properties --------------------------------------------------------------------------------------------------------


@given(st.lists(st.fractions(-3, 12, max_denominator=9), min_size=1, max_size=8), st.data())
@REPEATABLE
def test_nearest_is_rounding_by_largest_remainder_after_a_common_shift(wanted: list[Fraction], data) -> None:
    limits = [data.draw(st.integers(1, 9)) for _ in wanted]
    total = data.draw(st.integers(len(wanted), sum(limits)))
    found = nearest(wanted, limits=limits, total=total)
    assert sum(found) == total and all(1 <= n <= most for n, most in zip(found, limits, strict=True))
    # one rank moved from i to j never brings both nearer to what they want
    for i, n in enumerate(found):
        for j, m in enumerate(found):
            if i != j and n > 1 and m < limits[j]:
                assert wanted[j] - m <= wanted[i] - (n - 1)
                if wanted[j] - m == wanted[i] - (n - 1):
                    assert i < j  # ties to the earlier


@given(st.lists(st.fractions(1, 12, max_denominator=9), max_size=8), st.integers(1, 9))
@REPEATABLE
def test_nearest_equals_its_twin(wanted: list[Fraction], more: int) -> None:
    total = math.ceil(sum(wanted)) + more
    wanted = [*wanted, total - sum(wanted)]  # so that they add up
    floors = [int(w) for w in wanted]
    order = sorted(range(len(wanted)), key=lambda i: (floors[i] - wanted[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    assert nearest(wanted, limits=[99] * len(wanted), total=total) == floors


blocks = st.dictionaries(
    st.sampled_from(["q", "k", "up", "down"]), st.tuples(st.integers(7, 9), st.integers(7, 20)), min_size=1
)


@given(blocks, st.integers(1, 7), st.integers(1, 4), st.booleans())
@REPEATABLE
def test_the_sum_is_exact_and_equal_layers_share_their_ranks(block, count: int, r: int, restart: bool) -> None:
    shapes = layers(count, block) | layers(count, block, "decoder")
    found = ranks(shapes, r, restart=restart)
    assert sum(found.values()) == r * len(shapes)
    assert sum(found[n] * sum(shapes[n]) for n in shapes) == r * sum(map(sum, shapes.values()))
    assert all(len(kinds) == 1 for kinds in by_layer(found))
    order = [kinds.pop() for kinds in by_layer(found)]
    assert order == sorted(order)


@given(st.lists(st.tuples(st.integers(4, 9), st.integers(4, 20)), min_size=1, max_size=9), st.integers(1, 4))
@REPEATABLE
def test_r_never_costs_more_than_lora(shapes: list[tuple[int, int]], r: int) -> None:
    found = ranks({f"h.{i}.q": shape for i, shape in enumerate(shapes)}, r)
    assert sum(found.values()) == r * len(shapes)
    assert sum(rank * sum(shape) for rank, shape in zip(found.values(), shapes, strict=True)) <= r * sum(
        map(sum, shapes)
    )
