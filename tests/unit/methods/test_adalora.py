"""AdaLoRA's formulas and options: the hand-computed cases of the specification, and every refusal. T1 to T8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from increlora import AdaLoraConfig
from increlora.decide.budget import Budget, falling
from increlora.decide.penalties import orthogonality, orthogonality_grad
from increlora.decide.schedules import CubicDecay, Run
from increlora.decide.scores import entry_sensitivity, smooth_entries, triplet_scores
from increlora.decide.selection import keep_published, keep_top
from increlora.deltas import TripletDelta
from increlora.errors import BudgetError, ConfigError, ScheduleError
from increlora.methods import AdaLora, Site
from increlora.methods.adalora_paper import AdaLoraPaper
from tests.reference import naive
from tests.switches import departing

REPEATABLE = settings(derandomize=True, deadline=None)  # a run never fails by chance
A_MODULE = {"A": [[1, 2, 0], [0, 1, -1]], "E": [[0.5], [-1]], "B": [[1, 0], [2, 1]]}
B_MODULE = {"A": [[1, 0, 0], [0, 1, 0]], "E": [[0.25], [2]], "B": [[1, 0], [0, 1]]}


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected) -> bool:
    return torch.allclose(found, tensor(expected), rtol=1e-12, atol=1e-15)


def delta_of(config: AdaLora, sites: int = 1, in_features: int = 3, out_features: int = 2) -> TripletDelta:
    total = sites * (in_features + out_features)
    site = Site("m", in_features, out_features, sites, total, torch.float64)
    return config.method(sites, total).make_delta(site)


def test_t1_forward() -> None:
    delta = delta_of(AdaLoraPaper.paper(1, lora_alpha=4))
    with torch.no_grad():
        for letter, p in delta.block(0).items():
            p.copy_(tensor(A_MODULE[letter]))
        W, x = tensor([[1, 0, 0], [0, 1, 0]]), tensor([[1, 1, 1]])
        y = delta.add_to(x @ W.T, x)
    assert delta.scale == 4 / 2.00001
    assert torch.allclose(y, tensor([[3.99998498, 6.99996996]]), rtol=0, atol=1e-7)  # float32


@pytest.mark.parametrize("changes", [
    [("target", (2, 0.5), (0.15, 0.1275, 0.019125)), ("", (2, -0.25), (0.2025, 0.153, 0.0309825))],
])  # fmt: skip
def test_t2_averages_of_one_entry(changes) -> None:
    I, U = [tensor([0.0])], [tensor([0.0])]
    for _, (w, g), (i, u, s) in changes:
        smooth_entries(I, U, entry_sensitivity([tensor([w])], [tensor([g])]), beta=0.85, beta_uncertainty=0.85)
        assert close(I[0], [i]) and close(U[0], [u]) and close(I[0] * U[0], [s])


def after_one_update(module: dict, gradients: dict) -> Tensor:
    """Scores of a module's triplets after one update of the averages."""
    weights, grads = [tensor(module[x]) for x in "AEB"], [tensor(gradients[x]) for x in "AEB"]
    I, U = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    smooth_entries(I, U, entry_sensitivity(weights, grads), beta=0.85, beta_uncertainty=0.85)
    return triplet_scores(*(i * u for i, u in zip(I, U, strict=True)))


def test_t3_scores_and_what_stays() -> None:
    a = after_one_update(
        A_MODULE, {"A": [[0.1, 0.2, 0.3], [0.1, 0.1, 0.1]], "E": [[0.4], [0.2]], "B": [[0.5, 0.1], [0.1, 0.3]]}
    )
    b = after_one_update(B_MODULE, {"A": [[0.3, 0, 0], [0, 0.3, 0]], "E": [[0.4], [0.05]], "B": [[0.3, 0], [0, 0.6]]})
    assert close(a, [0.004621875, 0.001753125]) and close(b, [0.001625625, 0.0042075])
    scores = [a.tolist(), b.tolist()]
    for keep in (keep_top, keep_published):
        kept = keep(scores, [5, 5], Budget(2))
        assert kept == [[True, False], [False, True]]


# ---- schedule


def test_t4_schedule() -> None:
    decay = CubicDecay(12, 8, warmup=10, settle=20, interval=5, total=100)
    expected = [(11, 12), (17, 11), (25, 10), (36, 9), (100, 8)]  # (first step that is no longer so, ranks)
    for step in range(100):
        assert decay.ranks(step) == next(ranks for end, ranks in expected if step < end), step
    assert decay.cuts() == [*range(15, 81, 5)] and decay.last_cut == 80
    assert decay.cuts(40) == [*range(40, 81, 5)]
    assert [decay.observed(step) for step in (0, 79, 80)] == [True, True, False]
    fine = CubicDecay(12_000_000, 8_000_000, warmup=10, settle=20, interval=5, total=100)
    for step, ranks in ((11, 11.831), (20, 10.519), (30, 9.4577), (45, 8.5), (80, 8.0)):
        assert fine.ranks(step) / 1e6 == pytest.approx(ranks, abs=5e-4)


@pytest.mark.parametrize(("interval", "late", "last"), [(5, True, 80), (7, True, 81), (7, False, 80), (500, True, 81)])
def test_the_last_cut_is_where_the_published_code_has_it_or_at_once(interval: int, late: bool, last: int) -> None:
    decay = CubicDecay(12, 8, warmup=10, settle=20, interval=interval, total=100, late=late)
    assert decay.last_cut == last == decay.cuts()[-1]
    assert decay.ranks(last) == 8


@pytest.mark.parametrize(("warmup", "settle"), [(50, 50), (80, 40), (0, 100), (99, 1)])
def test_phases_that_leave_no_step_are_refused(warmup: int, settle: int) -> None:
    with pytest.raises(ScheduleError, match=f"warmup_steps={warmup}, settle_steps={settle}.*run of 100 steps"):
        CubicDecay(12, 8, warmup=warmup, settle=settle, interval=1, total=100)


def test_the_last_cut_never_falls_behind_the_run() -> None:
    with pytest.raises(ScheduleError, match="settle_steps=1"):
        CubicDecay(12, 8, warmup=0, settle=1, interval=7, total=100, late=True)
    assert CubicDecay(12, 8, warmup=0, settle=1, interval=7, total=100).last_cut == 99


def test_an_unknown_length_names_the_remedies() -> None:
    method = AdaLora(r=2, warmup_steps=10, settle_steps=10, interval_steps=1).method(2, 20)
    with pytest.raises(ScheduleError, match=r"`total_steps`.*increlora.attach.*Trainer"):
        method.rules[0].schedule(Run(None), 6, 4)


def test_settling_takes_at_least_one_step() -> None:
    method = AdaLora(r=2, settle_steps=0.0).method(2, 20)
    assert method.rules[0].schedule(Run(50), 6, 4).last_cut == 49


# ---- selection


def test_t5_ties() -> None:
    scores = [[0.5, 0.5], [0.5, 0.5]]
    assert keep_published(scores, [5, 5], Budget(2)) == [[False, False], [False, False]]
    assert keep_top(scores, [5, 5], Budget(2)) == [[True, True], [False, False]]


@pytest.mark.parametrize("keep", [keep_top, keep_published])
def test_equal_ranks_at_start_and_end_keep_everything(keep) -> None:
    assert keep([[0.1, 0.2], [0.3]], [5, 7], Budget(3)) == [[True, True], [True]]


def test_a_score_that_is_not_finite_comes_last() -> None:
    assert keep_top([[float("nan"), 0.1], [float("inf"), 0.0]], [5, 5], Budget(2)) == [[False, True], [False, True]]


modules = st.lists(
    st.tuples(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=3), st.sampled_from([3, 5, 8])),
    min_size=2, max_size=3,
)  # fmt: skip


@given(modules, st.integers(1, 5), st.integers(0, 6))
@settings(REPEATABLE)
def test_keep_top_equals_its_twin(modules, wanted: int, slack: int) -> None:
    scores, costs = [list(m[0]) for m in modules], [m[1] for m in modules]
    every = sorted(cost for row, cost in zip(scores, costs, strict=True) for _ in row)
    ranks = min(wanted, len(every))
    for bound in (None, sum(every[:ranks]) + slack):
        kept = keep_top(scores, costs, Budget(ranks, bound))
        assert kept == naive.keep_top(scores, costs, ranks, bound)
        assert sum(map(sum, kept)) == ranks
        assert bound is None or sum(sum(row) * cost for row, cost in zip(kept, costs, strict=True)) <= bound


@given(modules, st.integers(1, 5), st.integers(0, 6))
@settings(REPEATABLE)
def test_a_falling_budget_can_always_be_met(modules, wanted: int, slack: int) -> None:
    costs = sorted(cost for row, cost in modules for _ in row)
    first, end = Budget(len(costs), sum(costs)), min(wanted, len(costs))
    last = Budget(end, sum(costs[:end]) + slack)
    if last.parameters > first.parameters:
        return
    for ranks in range(end, len(costs) + 1):
        now = falling(first, last, ranks)
        assert now.ranks == ranks and sum(costs[:ranks]) <= now.parameters
    assert falling(first, last, end).parameters == last.parameters
    assert falling(first, Budget(end), end) == Budget(end)


# ---- penalty, dtype


def test_t6_orthogonality() -> None:
    A, B = tensor(A_MODULE["A"]), tensor(A_MODULE["B"])
    assert orthogonality([A]) == pytest.approx(5) and orthogonality([B.mT]) == pytest.approx(4.898979, abs=1e-6)
    assert 0.1 * orthogonality([A, B.mT]) == pytest.approx(0.494949, abs=1e-6)
    assert orthogonality([A, B.mT], form="squared") == pytest.approx(49)
    flat = [tensor([[1, 0, 0], [0, 1, 0]]), tensor([[1, 0], [0, 1]])]
    assert orthogonality(flat) == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in orthogonality_grad(flat, weight=0.1))


def test_t8_products_of_averages_survive_half_precision() -> None:
    I, U = [torch.zeros(1)], [torch.zeros(1)]
    w, g = torch.tensor([1e-2]).half(), torch.tensor([1e-4]).half()
    smooth_entries(I, U, entry_sensitivity([w.float()], [g.float()]), beta=0.85, beta_uncertainty=0.85)
    assert float(I[0] * U[0]) == pytest.approx(1.9125e-14, rel=1e-2)
    assert float(I[0].half() * U[0].half()) == 0


# ---- settings


@pytest.mark.parametrize(("r", "options", "rank"), [
    (1, {}, 2), (2, {}, 3), (8, {}, 12), (8, {"init_r": 8}, 8), (3, {"total_ranks": 5}, 4), (100, {}, 20),
])  # fmt: skip
def test_the_start_is_half_as_much_again_and_fits_the_shape(r: int, options: dict, rank: int) -> None:
    assert delta_of(AdaLora(r=r, **options), sites=2, in_features=30, out_features=20).sizes == [rank]


def test_the_published_start_is_that_of_the_papers_tables() -> None:
    assert [AdaLoraPaper.paper(r).init_r for r in (1, 2, 4, 8)] == [2, 4, 6, 12]
    assert delta_of(AdaLoraPaper.paper(8)).sizes == [12]  # whatever the shape


@pytest.mark.parametrize(("config", "scale"), [
    (AdaLora(r=4, lora_alpha=8), 2.0),
    (AdaLora(r=4, lora_alpha=8, total_ranks=2), 4.0),
    (AdaLoraPaper.paper(4, lora_alpha=18), 18 / 6.00001),
    (AdaLoraPaper.paper(4, lora_alpha=0), 6 / 6.00001),
])  # fmt: skip
def test_the_scale_does_not_follow_the_rank(config: AdaLora, scale: float) -> None:
    delta = delta_of(config)
    assert delta.scale == pytest.approx(scale, rel=1e-15)
    delta.assign(kept=[False] * len(delta.state.kept))
    assert delta.rank == 0 and delta.scale == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"r": 4, "init_r": 3}, BudgetError, "r=4 is above the start of init_r=3.*6"),
    ({"r": 0}, ConfigError, "r=0"),
    ({"init_r": 1.5}, ConfigError, "init_r=1.5"),
    ({"beta": 1.0}, ConfigError, "beta=1.0"),
    ({"orthogonality": -0.1}, ConfigError, "orthogonality=-0.1"),
    ({"observe": "never"}, ConfigError, "observe='never': give one of before_step, after_step"),
    ({"total_ranks": 0}, ConfigError, "total_ranks=0"),
    ({"target_r": 4}, ConfigError, "target_r"),
])  # fmt: skip
def test_bad_settings_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        departing(AdaLoraConfig, **options)


def test_the_type_is_not_pefts() -> None:
    assert AdaLoraConfig().peft_type == "INCRELORA_ADALORA"
