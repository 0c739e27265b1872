"""LoRA-Mini: how it starts, what the published file gets wrong, and what its settings refuse."""

import math
import warnings

import pytest
import torch
from torch import nn

from increlora.deltas import LowRankDelta, Status
from increlora.errors import ConfigError
from increlora.methods import PlainLora, Site
from increlora.registry import METHODS
from increlora.structural.lora_mini.delta import FourFactorDelta
from increlora.structural.lora_mini.method import LoraMini
from tests.reference.naive_lora_mini import PublishedMini, trainable_by_name
from tests.unit.structural.test_lora_mini import (
    PATHS,
    SHAPES,
    batch,
    delta_of,
    random,
    same,
    sizes_as_they_are,  # noqa: F401  a fixture for every test here
    twin_of,
)

# ---- the start (T9)


def started(init: str, **options) -> FourFactorDelta:
    """r = 32: enough numbers for statistics to 3 %."""
    return delta_of(LoraMini(r=32, inner_in=64, inner_out=64, init=init, **options), 768, 768)


def test_t9_matched_starts_as_lora_does() -> None:
    delta = started("matched")
    lora = PlainLora(r=32).method(1, 1536).make_delta(Site("x", 768, 768, 1, 1536, torch.float64))
    assert isinstance(lora, LowRankDelta)
    assert not delta.lora_B0.any() and not delta.weight().any()
    assert float(delta.lora_aux_A.std()) == pytest.approx(1 / 8, rel=0.03)
    assert float(delta.lora_aux_B.std()) == pytest.approx(1 / 8, rel=0.03)
    assert delta.lora_A0.abs().max() <= 1 / math.sqrt(768)
    assert float(delta.lora_A0.detach().std()) == pytest.approx(1 / math.sqrt(3 * 768), rel=0.03)
    effective = (delta.lora_A0 @ delta.lora_aux_A).detach()
    assert float(effective.std()) == pytest.approx(float(lora.lora_A0.detach().std()), rel=0.03)


@pytest.mark.parametrize(("init", "A_moves", "B_moves"), [
    ("matched", 1.0, 1.0), ("official_aux", 8.0, 8.0), ("orthonormal", math.sqrt(64 / 768), math.sqrt(64 / 768)),
])  # fmt: skip
def test_t9_a_step_of_equal_size_moves_the_effective_factors_so_much(init: str, A_moves: float, B_moves: float) -> None:
    """LoRA moves its entries by 1; N(0, 1) outside by √b = 8, so that its learning rate is far too large there."""
    delta = started(init)
    signs = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()
    rms = [float(t.square().mean().sqrt()) for t in (signs @ delta.lora_aux_A, delta.lora_aux_B @ signs.T)]
    assert rms == pytest.approx([A_moves, B_moves], rel=0.03)


def test_t9_the_published_auxiliaries_amplify_the_input() -> None:
    """Trap: √in = 27.7 where `matched` gives √(in/a) = 3.5."""
    x = batch(2000, 768)
    assert float((x @ started("official_aux").lora_aux_A.T).std()) == pytest.approx(math.sqrt(768), rel=0.03)
    assert float((x @ started("matched").lora_aux_A.T).std()) == pytest.approx(math.sqrt(12), rel=0.03)
    assert float(started("official_aux").lora_A0.detach().abs().max()) == pytest.approx(1 / 8, rel=0.01)


def test_t9_orthonormal_means_it() -> None:
    for m, n in ((768, 500), (64, 64)):
        delta = delta_of(LoraMini(r=32, inner_in=64, inner_out=32, init="orthonormal"), m, n)
        same(delta.lora_aux_A @ delta.lora_aux_A.T, torch.eye(64).double(), 0.01)  # as far as 8 binary digits go
        same(delta.lora_aux_B.T @ delta.lora_aux_B, torch.eye(32).double(), 0.01)
        lora = 1 / math.sqrt(3 * m)
        assert float((delta.lora_A0 @ delta.lora_aux_A).detach().std()) == pytest.approx(lora, rel=0.03)


@pytest.mark.parametrize("init", ["matched", "official_aux", "orthonormal"])
def test_t9_only_b_moves_in_the_first_step(init: str) -> None:
    delta = delta_of(LoraMini(r=3, inner_in=8, inner_out=8, init=init), 12, 20)
    start = delta.lora_A0.detach().clone()
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    delta(batch(5, 12)).sub(1).square().sum().backward()
    assert delta.lora_B0.grad.any() and not delta.lora_A0.grad.any()
    optimizer.step()
    assert torch.equal(delta.lora_A0, start) and delta.lora_B0.any()


# ---- defects of the published file


def test_trap_both_zero_never_moves_and_cannot_be_asked_for() -> None:
    published = PublishedMini(nn.Linear(12, 20, dtype=torch.float64), 6, 3, 8, 8)
    optimizer = torch.optim.Adam(published.parameters(), lr=0.1)
    for _ in range(20):
        published(batch(9, 12)).sub(1).square().mean().backward()
        assert not any(p.grad.any() for n, p in published.named_parameters() if n in ("A", "B", "A_aux", "B_aux"))
        optimizer.step()
        optimizer.zero_grad()
    assert not published.A.any() and not published.B.any()
    for init in ("matched", "official_aux", "orthonormal"):
        for flag in (True, False):
            delta = delta_of(LoraMini(r=3, inner_in=8, inner_out=8, init=init, init_lora_weights=flag), 12, 20)
            optimizer = torch.optim.Adam(delta.parameters(), lr=0.03)
            losses = []
            for _ in range(20):
                losses.append(delta(batch(9, 12)).sub(1).square().mean())
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            assert delta.lora_A0.all() and losses[-1] < losses[0]
    for init in ("zero", "both_zero", "zeros", None):
        with pytest.raises(ConfigError, match="give one of matched, official_aux, orthonormal"):
            LoraMini(init=init)


def test_trap_the_published_auxiliaries_are_trainable() -> None:
    published = PublishedMini(nn.Linear(12, 20, dtype=torch.float64), 6, 3, 8, 8)
    assert set(trainable_by_name(published)) == {"A", "B", "A_aux", "B_aux"}
    assert set(trainable_by_name(random(*SHAPES[0]))) == {"lora_A0", "lora_B0"}


# ---- settings


def sizes(m: int, n: int, **options) -> tuple[int, int]:
    delta = delta_of(LoraMini(**options), m, n, dtype=torch.bfloat16)
    assert delta.inner == (len(delta.lora_aux_A), delta.lora_aux_B.shape[1])
    return delta.inner


@pytest.mark.parametrize(("ends", "options", "expected"), [
    ((768, 768), {}, (38, 38)),
    ((1024, 4096), {}, (51, 51)),
    ((4096, 4096), {}, (205, 205)),
    ((384, 384), {"r": 32}, (32, 32)),
    ((768, 2), {}, (8, 2)),
    ((3, 768), {}, (3, 8)),
    ((384, 384), {"rank_pattern": {"value": 30}}, (30, 30)),
    ((384, 384), {"inner_in": 50}, (50, 19)),
    ((384, 384), {"inner_out": 50}, (19, 50)),
    ((768, 768), {"reduction": 20}, (38, 38)),
    ((768, 3072), {"reduction": 16.0}, (48, 192)),  # in proportion to in : out
    ((768, 3072), {"reduction": 1}, (768, 3072)),
    ((768, 2), {"reduction": 20}, (38, 1)),
])  # fmt: skip
def test_inner_sizes(ends: tuple[int, int], options: dict, expected: tuple[int, int]) -> None:
    assert sizes(*ends, **options) == expected


@pytest.mark.parametrize(("options", "message"), [
    ({"inner_in": 13}, r"layer.3.value: inner_in=13 is above in=12; give at most 12, or `reduction`"),
    ({"inner_out": 21, "inner_in": 2}, r"layer.3.value: inner_out=21 is above out=20; give at most 20.*target_modules"),
])  # fmt: skip
def test_sizes_above_the_module_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        delta_of(LoraMini(r=2, **options), 12, 20)
    assert sizes(12, 20, r=2, inner_in=12, inner_out=20) == (12, 20)


@pytest.mark.parametrize(("r", "a", "b", "message"), [
    (4, 3, 8, r"layer.3.value and modules like it: r=4 with inner sizes a=3, b=8: the rank of ΔW is at most 3"),
    (4, 8, 3, r"r=4 with inner sizes a=8, b=3: the rank of ΔW is at most 3: lower r to that"),
    (4, 4, 4, r"32 numbers make a matrix of 16: lower r, or raise the inner sizes \(2 r is enough\)"),
    (4, 7, 8, r"60 numbers make a matrix of 56"),
    (1, 1, 1, r"2 numbers make a matrix of 1"),
])  # fmt: skip
def test_sizes_that_waste_are_warned_of(r: int, a: int, b: int, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        delta_of(LoraMini(r=r, inner_in=a, inner_out=b), 12, 20)


def test_a_warning_comes_once_for_all_modules_alike_and_not_without_need() -> None:
    method = LoraMini(r=4, inner_in=3, inner_out=8).method(3, 96)
    with pytest.warns(UserWarning) as caught:
        for name in "qkv":
            method.make_delta(Site(name, 12, 20, 3, 96))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for r, a, b in ((4, 8, 8), (4, 7, 10), (1, 2, 2)):  # 4 = ab/(a+b); 4 < 70/17
            delta_of(LoraMini(r=r, inner_in=a, inner_out=b), 12, 20)


@pytest.mark.parametrize(("options", "message"), [
    ({"r": 0}, "r=0: give an int of at least 1"),
    ({"inner_in": 0}, "inner_in=0: give an int"),
    ({"inner_out": 2.5}, "inner_out=2.5: give an int"),
    ({"inner_in": True}, "inner_in=True"),
    ({"reduction": 0.5}, "reduction=0.5: give a number of at least 1"),
    ({"reduction": float("inf")}, "reduction=inf"),
    ({"reduction": float("nan")}, "reduction=nan"),
    ({"reduction": 4, "inner_in": 8}, "reduction=4 beside inner_in or inner_out"),
    ({"reduction": 4, "inner_out": 8}, "reduction=4 beside"),
    ({"forward": "lean"}, "forward='lean': give one of auto, composed, sequential"),
    ({"rank_pattern": {"query": 0}}, "rank_pattern: query=0"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
])  # fmt: skip
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraMini(**options)


def test_the_scale_is_alpha_over_r_whatever_the_inner_sizes_are() -> None:
    for options, scale in (
        ({}, 1.0), ({"lora_alpha": 16, "inner_in": 2}, 2.0), ({"alpha_pattern": {"value": 4}}, 0.5),
        ({"rank_pattern": {"value": 2}}, 4.0), ({"rank_pattern": {"query": 2}}, 1.0),
    ):  # fmt: skip
        assert delta_of(LoraMini(**options), 12, 20).scale == scale


def test_the_budget_is_at_most_loras_parameters() -> None:
    method = LoraMini(r=4).method(6, 192)
    assert (method.budget.ranks, method.budget.parameters, method.adaptive) == (None, 768, False)
    assert LoraMini(r=4, rank_pattern={"value": 2}).method(6, 192).budget.parameters is None
    assert METHODS["lora_mini"] is LoraMini and method.name == "lora_mini"


def test_precision_autocast_and_dtypes() -> None:
    delta = random(*SHAPES[0])
    expected = 1 + batch(3, 12) @ twin_of(delta).delta_weight().T
    delta.float()
    delta.lora_aux_A, delta.lora_aux_B = delta.lora_aux_A.bfloat16(), delta.lora_aux_B.bfloat16()  # as in a bf16 base
    for path in PATHS:
        delta.path = path
        x, y = batch(3, 12).bfloat16(), torch.ones(3, 20).bfloat16()
        assert delta.add_to(y, x).dtype == torch.bfloat16 and delta.weight().dtype == torch.float32
        torch.testing.assert_close(delta.add_to(y, x).double(), expected, rtol=0.03, atol=0.03)
        torch.testing.assert_close(
            delta.add_to(y.float(), batch(3, 12).float()).double(), expected, rtol=1e-4, atol=1e-4
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert delta.add_to(y, x.float()).dtype == torch.bfloat16
            result = delta.add_to(y.float(), x.float())
            torch.testing.assert_close(result.double(), expected, rtol=0.03, atol=0.03)
            result.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in delta.parameters())


def test_weights_are_composed_in_the_precision_of_the_inner_pair() -> None:
    delta = random(*SHAPES[0]).float()
    A, B = delta._operands()
    with torch.autocast("cpu", torch.bfloat16):
        found = delta._composed(A, B)
    torch.testing.assert_close(found, (A @ delta.lora_aux_A, delta.lora_aux_B @ B), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("path", PATHS)
def test_nothing_breaks_the_graph(path: str) -> None:
    delta, x = random(*SHAPES[0], forward=path), batch(9, 12)
    compiled = torch.compile(delta, backend="aot_eager", fullgraph=True)
    same(compiled(x), delta(x))
    compiled(x).sum().backward()


def test_one_block_that_is_active() -> None:
    delta = random(*SHAPES[0])
    assert delta.state.status == (Status.ACTIVE,) and delta.rank == delta.capacity == 3
    assert delta.size_of(delta.lora_A0) == 3
