"""MoRA's settings: what they refuse, budget and parameters, the published preset, and the maps of each round."""

import re

import pytest

from increlora import MoraConfig
from increlora.errors import ConfigError
from increlora.structural.mora.method import Mora
from tests.reference.naive_mora import TYPES
from tests.unit.structural.test_mora import batch, delta_of


@pytest.mark.parametrize(("options", "message"), [
    *(({"mora_type": n}, f"mora_type={n}: the published code computes 1, 2, 3, 4, 6") for n in (0, 5, 7, -1, True)),
    ({"mora_type": "rope"}, "mora_type='rope'"),
    ({"operator": "rope"}, "operator='rope': give one of truncation, sharing, decoupling, rotation"),
    ({"mora_type": 6, "operator": "rotation"}, "operator='rotation': mora_type=6 says so already"),
    ({"mora_type": 1, "compress": "block"}, "compress='block': mora_type=1 says so already"),
    ({"operator": "rotation", "compress": "block"}, "compress='block' means nothing for operator='rotation'"),
    ({"pairing": "adjacent"}, "pairing='adjacent' means nothing for operator='sharing', only for rotation"),
    ({"dead_inputs": "fold"}, "dead_inputs='fold' means nothing for operator='sharing'"),
    ({"operator": "truncation", "pad": "zero"}, "pad='zero' means nothing for operator='truncation'"),
    ({"side": "ceil"}, "side='ceil': give 'floor', 'round' or an int"),
    ({"side": 0}, "side=0"), ({"side": 2.5}, "side=2.5"), ({"side": True}, "side=True"),
    ({"r": 0}, "r=0"), ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"lora_alpha": 16}, "lora_alpha=16: MoRA has no scale"),  # trap 12: backends of the published code disagree on it
    ({"restart_steps": 0}, "restart_steps=0"), ({"restart_steps": -1}, "restart_steps=-1"),
    ({"restart_steps": 1.5}, "restart_steps=1.5"), ({"restart_warmup": -2}, "restart_warmup=-2"),
    ({"restart_steps": 9, "restart_maps": "cycle", "mora_type": 6}, "restart_maps='cycle' .* a start at 6"),
    ({"restart_steps": 9, "restart_maps": "alternate", "mora_type": 3}, r"types \[1, 2\], and a start at 3"),
    ({"restart_steps": 9, "restart_maps": "cycle", "operator": "truncation"}, "a start at 'truncation'"),
    ({"restart_maps": "random"}, "restart_maps='random'"),
    ({"use_dora": True}, "use_dora=True is not supported"),  # trap 14
    ({"use_mora": True}, "unexpected keyword argument 'use_mora'"),
])  # fmt: skip
def test_c13_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message if ".*" in message or "\\" in message else re.escape(message)):
        MoraConfig(**options)


@pytest.mark.parametrize("options", [
    {}, {"mora_type": 4}, {"operator": "decoupling"}, {"operator": "rotation"},
    {"restart_steps": 5, "restart_maps": "cycle", "mora_type": 2},  # a later round pads
])  # fmt: skip
def test_c13_no_wrapping_further_than_there_are_inputs(options: dict) -> None:
    """Trap 8: the published code crashes in the forward pass."""
    with pytest.raises(ConfigError, match=r"layer.3.value .*side 8 needs more than twice the inputs .* pad='zero'"):
        delta_of(3, 30, side=8, **options)
    assert delta_of(4, 30, side=8, **options).rank == 8
    zero = delta_of(3, 30, side=8, pad="zero", **options)
    assert zero(batch(2, 3)).shape == (2, 30)


@pytest.mark.parametrize(("shape", "options", "message"), [
    ((1, 1), {"r": 1}, r"layer.3.value \(in=1, out=1\): a matrix of side 0 is empty: raise `r`"),
    ((8, 8), {"side": 5}, "side 5 cannot be turned in pairs: give an even `side`"),
])  # fmt: skip
def test_a_side_that_cannot_be_is_refused(shape: tuple[int, int], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        delta_of(*shape, operator="rotation", **options)


@pytest.mark.parametrize(("settings", "budget"), [
    (Mora(r=3), 3 * 40), (Mora(r=3, mora_type=6), 3 * 40), (Mora(side=5), 25 * 2), (Mora(r=3, side="round"), None),
])  # fmt: skip
def test_the_budget_is_that_of_lora(settings: Mora, budget: int | None) -> None:
    found = settings.method(2, 40).budget
    assert (found.ranks, found.parameters) == (None, budget)


def test_the_parameters_are_counted_as_ranks_times_their_cost() -> None:
    delta = delta_of(30, 12, r=2)
    assert delta.rank * delta.cost == sum(p.numel() for p in delta.parameters()) == 81 <= 2 * 42


def test_the_preset_is_the_published_code() -> None:
    paper = MoraConfig.paper(8)
    assert (paper.mora_type, paper.side, paper.lora_dropout, paper.pad) == (1, "round", 0.05, "wrap")
    rotated = MoraConfig.paper(8, mora_type=6)
    assert (rotated.dead_inputs, rotated.pairing) == ("ignore", "half")
    assert rotated.settings() == Mora.paper(8, mora_type=6)
    assert MoraConfig.paper(8, mora_type=6, dead_inputs="fold").dead_inputs == "fold"


@pytest.mark.parametrize(("maps", "start", "expected"), [
    ("cycle", 1, [1, 2, 3, 4, 1, 2]), ("cycle", 3, [3, 4, 1, 2, 3, 4]), ("alternate", 1, [1, 2, 1, 2, 1, 2]),
    ("alternate", 2, [2, 1, 2, 1, 2, 1]), ("same", 4, [4] * 6),
])  # fmt: skip
def test_maps_of_the_rounds(maps: str, start: int, expected: list[int]) -> None:
    settings = Mora(mora_type=start, restart_steps=5, restart_maps=maps, pad="zero")
    for turn, number in enumerate(expected):
        found = settings.round_maps(turn, 8, 8, 4)
        assert (found.compress, found.expand) == TYPES[number] and not found.wrap and not found.shuffle
    permuted = Mora(mora_type=start, restart_steps=5)
    assert [permuted.round_maps(turn, 8, 8, 4).shuffle for turn in range(3)] == ["", "0/1", "0/2"]
