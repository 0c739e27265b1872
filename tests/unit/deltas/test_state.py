"""The state of a module: what was packed comes back, earlier formats are read, nothing damaged or averaged passes."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from increlora.deltas import Status
from increlora.deltas.state import (
    FACTOR,
    ModuleState,
    checksum,
    decimal,
    is_old,
    pack_statistics,
    unpack,
    unpack_old,
    unpack_statistics,
)  # fmt: skip
from increlora.errors import CheckpointError

NAN, INF = float("nan"), float("inf")
ACTIVE, RESERVE, DORMANT = Status.ACTIVE, Status.RESERVE, Status.DORMANT
ONE, THREE = ((ACTIVE,), (-1,), (-1,)), ((ACTIVE, RESERVE, DORMANT), (-1, 3, -1), (-1, 2, -1))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


STATES = [
    ModuleState(0, *ONE, scale=1.0),
    ModuleState(7, *THREE, scale=3.125e-3),
    ModuleState(9, *ONE, (True, False, True), True, (False, True, False), scale=16.0),
    ModuleState(9, *ONE, (True, False), False, scale=-2.5),
    ModuleState(60_000_000, *ONE, rounds=4),
]


@pytest.mark.parametrize("state", STATES)
def test_what_is_packed_comes_back(state: ModuleState) -> None:
    packed = state.pack()
    assert packed.dtype == torch.int32 and packed.device.type == "cpu"
    assert unpack(packed) == replace(state, scale=state.scale and pytest.approx(state.scale, rel=1e-6))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("lost", [-1, 0, 1])
def test_averages_of_equal_states_are_that_state(dtype: torch.dtype, lost: int) -> None:
    for state in STATES[:4]:
        assert unpack(state.pack().to(dtype) + lost) == unpack(state.pack())


@pytest.mark.parametrize("share", [0.5, 0.25, 0.9])
def test_averages_of_different_states_are_refused(share: float) -> None:
    states = [replace(STATES[3], kept=flags, closed=closed) for flags, closed in product(
        [(True, False), (False, True), (True, True)], [(), (False, False)])][::2]  # fmt: skip
    states += [replace(STATES[2], kept=kept, closed=closed) for kept, closed in (
        ((True, True, True), ()), ((True, False, False), (False, True, True)))]  # fmt: skip
    grown = [replace(STATES[1], status=status) for status in ((ACTIVE, ACTIVE, DORMANT), (ACTIVE, DORMANT, DORMANT))]
    for one, other in [*pairwise(states[:3]), (states[3], states[4]), tuple(grown)]:
        averaged = share * one.pack() + (1 - share) * other.pack()
        for given in (averaged, averaged.to(torch.int32)):
            with pytest.raises(CheckpointError, match=r"lora_state \(.*average.*damaged"):
                unpack(given)


def test_an_average_that_gets_stuck_is_no_state_of_before() -> None:
    """Rounded towards zero, a slow average of integers never goes up."""
    for seed in (33, 176, 244, 283, 306, 323):  # of 400, those where three bytes alone would get stuck
        more = torch.randint(2, (12,), generator=torch.Generator().manual_seed(seed)).bool().tolist()
        old, new = (replace(STATES[3], kept=tuple(kept)) for kept in ([False] * 12, more))
        average = old.pack()
        for _ in range(60):
            average = (average * 0.999 + new.pack() * 0.001).to(torch.int32)
        with pytest.raises(CheckpointError):
            unpack(average)


def changed(state: ModuleState, place: int, number: int) -> Tensor:
    packed = state.pack()
    packed[place] = FACTOR * number
    return packed


def altered(**numbers: int) -> Tensor:
    """A state with other numbers at some places, and the checksum that belongs to them."""
    values = [value // FACTOR for value in STATES[3].pack().tolist()[:-6]]
    for place, value in numbers.items():
        values[int(place[1:])] = value
    return FACTOR * torch.tensor([*values, *checksum(values)])


@pytest.mark.parametrize("damage", [
    torch.empty(0), torch.zeros(3), torch.tensor(64), STATES[1].pack()[:-1], STATES[1].pack()[None], altered(_1=-5),
    altered(_1=10**9), altered(_6=0), altered(_6=-1), altered(_6=9), altered(_7=4), altered(_8=10), altered(_8=-2),
    altered(_10=7), altered(_11=2), STATES[1].pack() * 1.5, STATES[1].pack().double() * NAN,
    changed(STATES[1], 8, int(ACTIVE)), changed(STATES[2], 2, 0), torch.full((20,), INF), STATES[0].pack().flip(0),
])  # fmt: skip
def test_damage_is_refused(damage: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"lora_state"):
        unpack(damage)


def test_a_newer_format_names_the_remedy() -> None:
    with pytest.raises(CheckpointError, match="format 5, this version reads 4; upgrade increlora"):
        unpack(altered(_0=5))
    with pytest.raises(CheckpointError, match="format 0, this version reads 4; upgrade increlora"):
        unpack_old(vector(0, 1, 2))


@pytest.mark.parametrize("scale", [1.0, 2 / 3, 1e-7, 123456.7, -0.1])
def test_a_scale_is_two_integers(scale: float) -> None:
    mantissa, exponent = decimal(scale)
    assert abs(mantissa) < 10**6 and mantissa * 10.0**exponent == pytest.approx(scale, rel=1e-5)


# ---- statistics


@pytest.mark.parametrize("statistics", [[], [vector(0.25, 1e-9)], [vector(), vector(0.1), vector(4, 5)]])
def test_statistics_come_back(statistics: list[Tensor]) -> None:
    found = unpack_statistics(pack_statistics(statistics))
    assert [values.tolist() for values in found] == [values.tolist() for values in statistics]


def test_a_file_leaves_out_what_rules_need_no_more() -> None:
    left = unpack_statistics(pack_statistics([vector(1.0), vector(2.0), vector(4, 5)], {1}))
    assert [values.tolist() for values in left] == [[1], [], [4, 5]]


@pytest.mark.parametrize("damage", [
    vector(), vector(1), vector(1, 2, 0.5), vector(1, 1, NAN), vector(1, 1, INF), vector(-1), vector(0.5), vector(0, 1),
    vector(1, 1, 0.5)[None], vector(1, -1), vector(1e300, 1),
])  # fmt: skip
def test_damaged_statistics_are_refused(damage: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"lora_statistics .* damaged"):
        unpack_statistics(damage)


# ---- earlier versions


def test_formats_of_earlier_versions_are_read() -> None:
    def read(*values: float) -> tuple[ModuleState, list[list[float]]]:
        assert is_old(vector(*values))
        state, statistics = unpack_old(vector(*values))
        return state, [found.tolist() for found in statistics]

    growing = read(1, 21, 0.125, 3e-9, 2, 1, 0, -1, 12, -1, -1, 0, -1)
    assert growing == (ModuleState(21, (ACTIVE, RESERVE, DORMANT), (-1, 12, -1), (-1, 0, -1)), [[0.125, 3e-9]])
    assert read(1, 21, 0, 0, 2, -1, -1) == (ModuleState(21, *ONE), [])
    pruned = ModuleState(5, *ONE, (True, False, False), False, (False, False, True))
    assert read(2, 5, 0, 0, 1, 2, -1, -1, 0, 3, 1, 0, -1, 0.5, 0.75) == (pruned, [[0.5, 0.75]])
    settled = ModuleState(9, *ONE, (True, False), True)
    assert read(3, 9, 1, 2, -1, -1, 1, 2, 1, 0, 2, 0, 1, 0.5) == (settled, [[], [0.5]])
    assert not is_old(STATES[0].pack()) and not is_old(STATES[0].pack().double())


@pytest.mark.parametrize("damage", [
    vector(), vector(3), vector(3, 1), vector(3, 1, 0, 0, 0, 0), vector(3, 0.5, 1, 2, -1, -1, 0, 0, 0),
    vector(3, NAN, 1, 2, -1, -1, 0, 0, 0), vector(3, 1, 1, 2, -1, -1, 0, 0, 1, 5, 0.5), vector(3, 1, -1, 0, 0, 0),
    vector(3, 1, 1, 2, -1, -1, 0, 0, 0, 9),
    vector(3, 1, 1, 9, -1, -1, 0, 0, 0), vector(1, 1, 0, 0, 2, -1), vector(1, 1, 0, 0), vector(2, 5, 0, 0, 1, 2, -1),
    vector(3, 1e300, 1, 2, -1, -1, 0, 0, 0)[:-2], vector(3, INF, 1, 2, -1, -1, 0, 0, 0),
    vector(3, -5, 1, 2, -1, -1, 0, 0, 0), vector(3, 1e9, 1, 2, -1, -1, 0, 0, 0), vector(3, 1, 1, 2, 7, -1, 0, 0, 0),
    vector(3, 1, 1, 2, -1, -1, 0, 1, 2, 0),
])  # fmt: skip
def test_damage_of_earlier_formats_is_refused(damage: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"lora_state .* damaged"):
        unpack_old(damage)
