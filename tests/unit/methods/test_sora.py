"""SoRA's formulas and options: the hand-computed cases of the specification (S1 to S10), and every refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from increlora import SoraConfig
from increlora.decide.penalties import mean_size, mean_size_grad
from increlora.decide.projections import published_shrink, shrink_together, soft_threshold
from increlora.decide.schedules import Levels, Run, rising
from increlora.deltas import TripletDelta
from increlora.errors import BudgetError, ConfigError, ScheduleError
from increlora.methods import Site, Sora
from increlora.methods.sora_paper import SoraPaper
from tests.reference.official_sora import HfAdamW, shrink
from tests.switches import departing, settings_of

REPEATABLE = settings(derandomize=True, deadline=None)  # a run never fails by chance


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def delta_of(config: Sora, sites: int = 1, in_features: int = 2, out_features: int = 2) -> TripletDelta:
    total = sites * (in_features + out_features)
    site = Site("m", in_features, out_features, sites, total, torch.float64)
    return config.method(sites, total).make_delta(site)


def worked_example(gates: list[float]) -> TripletDelta:
    """S1 and S6."""
    delta = delta_of(SoraPaper.paper(2, lora_alpha=4))
    values = {"A": [[1, 0], [1, 1]], "E": [[g] for g in gates], "B": [[1, 0], [0, 2]]}
    with torch.no_grad():
        for letter, p in delta.block(0).items():
            p.copy_(tensor(values[letter]))
    return delta


def test_s1_forward() -> None:
    delta = worked_example([0.5, -0.1])
    assert torch.allclose(delta(tensor([[1, 2]])), tensor([[1.0, -1.2]]), rtol=1e-7, atol=0)  # float32 gates


def test_s6_a_rank_without_gate_goes_and_the_scale_stays() -> None:
    delta = worked_example([0.5, 0.0])
    assert delta(tensor([[1, 2]])).tolist() == [[1, 0]]
    delta.assign(kept=[True, False], closed=[False, True])
    A, B = delta.factors()
    assert A.shape == (1, 2) and B.shape == (2, 1) and delta.rank == 1
    assert delta(tensor([[1, 2]])).tolist() == [[1, 0]]
    delta.assign(kept=[False, False], closed=[True, True])
    assert delta.weight().tolist() == [[0, 0], [0, 0]] and [f.shape for f in delta.factors()] == [(0, 2), (2, 0)]
    assert delta(tensor([[1, 2]])).tolist() == [[0, 0]] and delta.rank == 0


# ---- operators

V = [-1, -0.75, -0.5, -0.375, -0.25, -0.125, 0, 0.125, 0.25, 0.3125, 0.375, 0.5, 0.625, 1]
EXACT = [-0.75, -0.5, -0.25, -0.125, 0, 0, 0, 0, 0, 0.0625, 0.125, 0.25, 0.375, 0.75]
PUBLISHED = [-0.75, -0.5, -0.25, 0, -0.25, 0, 0, 0, 0.25, 0, 0, 0.25, 0.375, 0.75]


@pytest.mark.parametrize(("operator", "expected"), [(soft_threshold, EXACT), (published_shrink, PUBLISHED)])
def test_s2_operators(operator, expected) -> None:
    assert operator(tensor(V), 0.25).tolist() == expected
    halves = [tensor(V[:5]).unsqueeze(1), tensor(V[5:]).unsqueeze(0), torch.tensor(V)]  # one in float32
    shrink_together(halves, operator, 0.25)
    assert [v for half in halves for v in half.flatten().tolist()] == expected * 2


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(1e-6, 1))
@settings(REPEATABLE)
def test_the_soft_threshold_is_the_proximal_point(values, xi: float) -> None:
    """T_ξ(v) minimises ½(x − v)² + ξ|x|: no nearby point is better."""
    v = tensor(values)

    def objective(x: Tensor) -> Tensor:
        return 0.5 * (x - v) ** 2 + xi * x.abs()

    best = soft_threshold(v, xi)
    for step in (1e-3, -1e-3):
        assert (objective(best) <= objective(best + step) + 1e-12).all()


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@settings(REPEATABLE)
def test_the_published_operator_equals_its_twin(values, xi: float) -> None:
    gate = torch.nn.Parameter(tensor([[*values, xi, -xi, 2 * xi]]))
    found = published_shrink(gate.detach().clone(), xi)
    shrink(gate, xi)
    assert torch.equal(found, gate.detach())


@pytest.mark.parametrize(("gate", "grad", "expected"), [
    (0.5, 0.2, 0.4989001), (0.001, 0.2, 0), (0.0012, -0.2, 0.0016999), (0, 0.2, -0.00049987),
])  # fmt: skip
def test_s3_one_step(gate: float, grad: float, expected: float) -> None:
    p = torch.nn.Parameter(tensor([gate]))
    p.grad = tensor([grad])
    HfAdamW([p], lr=8e-4).step()
    assert float(published_shrink(p.detach(), 3e-4)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("lr", "published", "exact"), [
    (6.1e-4, 0.03096, 0.03096), (5.9e-4, 0, 0.02897), (4e-4, 0, 0.00998), (2.9e-4, 0, 0),
])  # fmt: skip
def test_s4_a_gate_leaves_zero_only_by_a_step_beyond_the_dead_zone(lr: float, published: float, exact: float) -> None:
    for operator, expected in ((published_shrink, published), (soft_threshold, exact)):
        p = torch.nn.Parameter(tensor([0.0]))
        optimizer = HfAdamW([p], lr=lr)
        for _ in range(100):
            p.grad = tensor([-0.01])
            optimizer.step()
            p.data = operator(p.data, 3e-4)
        assert p.item() == pytest.approx(expected, abs=2e-5)


# ---- schedule


def test_s5_levels() -> None:
    linear = rising(0, 7e-4, 7, "linear")
    assert linear == pytest.approx([x * 1e-4 for x in (0, 1.16667, 2.33333, 3.5, 4.66667, 5.83333, 7)], rel=1e-5)
    assert rising(1e-4, 1e-2, 3, "geometric") == pytest.approx([1e-4, 1e-3, 1e-2])
    assert rising(1e-4, 1e-2, 3, "log_linear") == pytest.approx([1e-4, 5.06225e-3, 1e-2], rel=1e-5)
    with pytest.raises(ScheduleError, match="geometric.*first"):
        rising(0, 1e-2, 3, "geometric")


def test_a_threshold_rises_in_equal_phases_and_ends_with_the_settling() -> None:
    config = Sora(threshold=6.0, levels=3, warmup_steps=10, settle_steps=6, interval_steps=1)
    levels = config.method(1, 4).rules[0].thresholds(Run(25))
    assert levels == Levels((0.0, 2.0, 4.0, 6.0), 10, 20)
    expected = [0] * 10 + [2] * 4 + [4] * 3 + [6] * 3 + [0] * 5  # 10 steps in 3 phases
    assert [levels.at(step) for step in range(25)] == expected
    constant = SoraPaper.paper(threshold=0.5).method(1, 4).rules[0].thresholds(Run(25))
    assert [constant.at(step) for step in range(25)] == [0.5] * 25


def test_s7_penalty() -> None:
    gates = [tensor([[1.0], [-2.0], [0.0]]), torch.ones(573, 1, dtype=torch.float64)]
    first, second = mean_size_grad(gates, weight=10)
    assert first.flatten().tolist() == pytest.approx([0.0173611, -0.0173611, 0], abs=1e-6)
    assert second.flatten().tolist() == pytest.approx([0.0173611] * 573, abs=1e-6)
    leaves = [gate.clone().requires_grad_() for gate in gates]
    (10 * mean_size(leaves)).backward()
    assert all(torch.allclose(leaf.grad, grad) for leaf, grad in zip(leaves, (first, second), strict=True))
    assert float(mean_size(gates)) == pytest.approx(576 / 576)


# ---- settings


@pytest.mark.parametrize(("config", "rank", "scale"), [
    (Sora(r=8), 12, 1.0), (Sora(r=8, init_r=9), 9, 1.0), (Sora(r=8, threshold=1e-3), 8, 1.0),
    (settings_of("sora", r=4, scaling="initial_rank"), 6, 8 / 6), (Sora(r=4, total_ranks=2), 3, 4.0),
    (SoraPaper.paper(8), 8, 2.0),
])  # fmt: skip
def test_the_start_and_the_scale(config: Sora, rank: int, scale: float) -> None:
    delta = delta_of(config, in_features=20, out_features=30)
    assert delta.sizes == [rank] and delta.state.kept == (True,) * rank
    assert delta.scale == pytest.approx(scale)
    delta.assign(kept=[False] * rank)
    assert delta.rank == 0 and delta.scale == pytest.approx(scale)


def test_gates_start_at_random_or_at_one() -> None:
    gates = delta_of(Sora(r=200, init_r=300), in_features=300, out_features=300).block(0)["E"].detach()
    assert abs(float(gates.mean())) < 0.2 and abs(float(gates.std()) - 1) < 0.15
    assert (delta_of(Sora(gate_init="ones")).block(0)["E"] == 1).all()


def test_the_preset_starts_at_the_published_rank() -> None:
    config = SoraConfig.paper(lora_alpha=4)
    assert (config.r, config.threshold, config.gate_penalty, config.lora_alpha) == (8, 3e-4, 10.0, 4)


def test_a_threshold_bounds_the_ranks_and_promises_none() -> None:
    assert Sora(r=2, threshold=0.1).method(3, 30).budget.exact is False
    assert Sora(r=2, threshold=0.1).method(3, 30).budget.ranks == 6
    assert Sora(r=2).method(3, 30).budget.exact


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"r": 4, "init_r": 3}, BudgetError, "r=4 is above the start of init_r=3"),
    ({"r": 0}, ConfigError, "r=0"),
    ({"total_ranks": 0}, ConfigError, "total_ranks=0"),
    ({"threshold": 0.0}, ConfigError, "threshold=0.0: give a number above 0"),
    ({"threshold": math.inf}, ConfigError, "threshold=inf"),
    ({"threshold": 0.1, "init_r": 9}, ConfigError, "init_r=9: with a `threshold`"),
    ({"threshold": 0.1, "total_ranks": 9}, ConfigError, "total_ranks=9: with a `threshold`"),
    ({"threshold": 0.1, "first_threshold": 0.2}, ConfigError, "first_threshold=0.2 is above threshold=0.1"),
    ({"threshold": 0.1, "first_threshold": -0.2}, ConfigError, "first_threshold=-0.2"),
    ({"threshold": 0.1, "levels": 3, "spacing": "geometric"}, ScheduleError, "geometric"),
    ({"levels": 3}, ConfigError, "levels=3 needs a `threshold`"),
    ({"first_threshold": 0.1}, ConfigError, "first_threshold=0.1 needs a `threshold`"),
    ({"threshold_unit": "learning_rate"}, ConfigError, "threshold_unit='learning_rate' needs a `threshold`"),
    ({"operator": "hard"}, ConfigError, "operator='hard': give one of exact, published"),
    ({"gate_penalty": -1.0}, ConfigError, "gate_penalty=-1.0"),
    ({"close_after": 0}, ConfigError, "close_after=0"),
    ({"sparse_lambda": 10}, ConfigError, "sparse_lambda"),
])  # fmt: skip
def test_bad_settings_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        departing(SoraConfig, **options)
