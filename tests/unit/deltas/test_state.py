"""The state vector: what was packed comes back, earlier formats are read, and nothing damaged passes."""

import pytest
import torch
from torch import Tensor

from increlora.deltas.state import ModuleState, unpack, without_statistics
from increlora.errors import CheckpointError

NAN = float("nan")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(one: ModuleState, other: ModuleState) -> bool:
    plain = [{k: v for k, v in vars(state).items() if k != "statistics"} for state in (one, other)]
    lists = [[values.tolist() for values in state.statistics] for state in (one, other)]
    return plain[0] == plain[1] and lists[0] == lists[1]


STATES = [
    ModuleState(0, [2], [-1], [-1]),
    ModuleState(7, [2, 1, 0], [-1, 3, -1], [-1, 2, -1], statistics=[vector(0.25, 1e-9)]),
    ModuleState(9, [2], [-1], [-1], [True, False, True], True, [False, True, False], [vector(1, 2, 3)]),
    ModuleState(9, [2], [-1], [-1], [True, False], False, [], [vector(), vector(0.1), vector(4, 5)]),
]


@pytest.mark.parametrize("state", STATES)
def test_what_is_packed_comes_back(state: ModuleState) -> None:
    packed = state.pack()
    assert packed.dtype == torch.float64 and same(unpack(packed), state)


def test_a_file_leaves_out_what_rules_need_no_more() -> None:
    left = unpack(without_statistics(STATES[3].pack(), {1}))
    assert [values.tolist() for values in left.statistics] == [[], [], [4, 5]] and left.kept == STATES[3].kept
    assert torch.equal(without_statistics(STATES[2].pack(), set()), STATES[2].pack())


def test_formats_of_earlier_versions_are_read() -> None:
    growing = unpack(vector(1, 21, 0.125, 3e-9, 2, 1, 0, -1, 12, -1, -1, 0, -1))
    assert same(growing, ModuleState(21, [2, 1, 0], [-1, 12, -1], [-1, 0, -1], statistics=[vector(0.125, 3e-9)]))
    fixed = unpack(vector(1, 21, 0, 0, 2, -1, -1))
    assert same(fixed, ModuleState(21, [2], [-1], [-1]))
    pruned = unpack(vector(2, 5, 0, 0, 1, 2, -1, -1, 0, 3, 1, 0, -1, 0.5, 0.75))
    closed = [False, False, True]
    expected = ModuleState(5, [2], [-1], [-1], [True, False, False], False, closed, [vector(0.5, 0.75)])
    assert same(pruned, expected)


@pytest.mark.parametrize("damage", [
    vector(), vector(3), vector(3, 1), vector(3, 1, 0, 0, 0, 0), vector(3, 0.5, 1, 2, -1, -1, 0, 0, 0),
    vector(3, NAN, 1, 2, -1, -1, 0, 0, 0), vector(3, 1, 1, 2, -1, -1, 0, 0, 1, 5, 0.5), vector(3, 1, -1, 0, 0, 0),
    vector(3, 1, 1, 2, -1, -1, 0, 0, 0, 9),
    vector(3, 1, 1, 9, -1, -1, 0, 0, 0), vector(1, 1, 0, 0, 2, -1), vector(1, 1, 0, 0), vector(2, 5, 0, 0, 1, 2, -1),
    vector(3, 1e300, 1, 2, -1, -1, 0, 0, 0)[:-2], vector(3, float("inf"), 1, 2, -1, -1, 0, 0, 0),
])  # fmt: skip
def test_damage_is_refused(damage: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"lora_state .* damaged"):
        unpack(damage)


def test_a_newer_format_names_the_remedy() -> None:
    with pytest.raises(CheckpointError, match="format 4, this version reads 3; upgrade increlora"):
        unpack(vector(4, 1, 2))
