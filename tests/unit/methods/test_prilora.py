"""PRILoRA's formulas and options: the hand-computed cases of the specification, and every refusal. P2 to P6."""

import pytest
import torch
from torch import Tensor

from increlora import PriLoraConfig
from increlora.decide.projections import nonzero_marks, zero_least
from increlora.decide.schedules import Multiples, Run
from increlora.decide.scores import weighted_magnitude
from increlora.deltas import LowRankDelta
from increlora.errors import BudgetError, ConfigError, ScheduleError
from increlora.methods import PriLora, Site
from increlora.rules.base import dtype_of
from increlora.rules.input_norms import InputNorms

X1, X2 = [[3, 0, 1, 0], [4, 0, 0, 2]], [[0, 2, 1, 0], [0, 0, 0, 2]]
A = [[0.1, 0.9, -0.5, 0.3], [-0.4, 0.2, 2, -0.1]]
N = [4.5, 0.2, 1, 2]


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected) -> bool:
    return torch.allclose(found, tensor(expected), rtol=1e-12, atol=1e-15)


def delta_of(config: PriLora, in_features: int = 4, out_features: int = 6) -> LowRankDelta:
    total = in_features + out_features
    site = Site("m", in_features, out_features, 1, total, torch.float64, (("m", in_features, out_features),))
    return config.method(1, total).make_delta(site)


def norms_of(*deltas: LowRankDelta) -> InputNorms:
    for delta in deltas:
        delta.reserve_statistics(0, delta.in_features + 1, dtype_of(delta))
    norms = InputNorms(deltas, 0, beta=0.9)
    norms.lay_out(afresh=True)
    return norms


def step(norms: InputNorms, *inputs: tuple[int, Tensor]) -> None:
    for module, x in inputs:
        norms.collect(module, x)
    norms.update()
    norms.forget()


# -- norms -------------------------------------------------------------------------------------------------------------


def test_p2_p3_norms_and_their_average() -> None:
    delta = delta_of(PriLora(r=1))
    norms = norms_of(delta)
    step(norms, (0, tensor(X1)))
    assert close(delta.statistics[0], [5, 0, 1, 2, 1])  # the first counts in full; the 1 says that there was one
    step(norms, (0, tensor(X2)))
    assert close(delta.statistics[0], [*N, 1])  # of zero init (0.45, 0.2, 0.19, 0.38), corrected (2.368, 1.053, 1, 2)


def test_micro_batches_and_uses_add_squares_not_norms() -> None:
    one, two = delta_of(PriLora(r=1)), delta_of(PriLora(r=1))
    step(norms_of(one), (0, torch.cat([tensor(X1), tensor(X2)])))
    step(norms_of(two), (0, tensor(X1).unsqueeze(1)), (0, tensor(X2)))
    assert close(one.statistics[0], [5, 2, 2**0.5, 8**0.5, 1]) and torch.equal(one.statistics[0], two.statistics[0])


def test_modules_that_share_their_inputs_add_up_each_for_itself() -> None:
    deltas, x1, x2 = [delta_of(PriLora(r=1)) for _ in range(2)], tensor(X1), tensor(X2)
    step(norms_of(*deltas), (0, x1), (1, x1), (0, x2), (1, x2))
    assert all(close(d.statistics[0], [5, 2, 2**0.5, 8**0.5, 1]) for d in deltas)


def test_a_module_without_a_use_keeps_its_norms() -> None:
    deltas = [delta_of(PriLora(r=1)) for _ in range(2)]
    norms = norms_of(*deltas)
    step(norms, (1, tensor(X1)))
    assert not deltas[0].statistics[0].any()
    step(norms, (0, tensor(X2)))  # its first
    assert close(deltas[0].statistics[0], [0, 2, 1, 2, 1]) and close(deltas[1].statistics[0], [5, 0, 1, 2, 1])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_with_an_input_that_is_not_finite_changes_nothing(bad: float) -> None:
    deltas = [delta_of(PriLora(r=1)) for _ in range(2)]
    norms = norms_of(*deltas)
    step(norms, (0, tensor(X1)), (1, tensor(X1)))
    before = [d.statistics[0].clone() for d in deltas]
    step(norms, (0, tensor([[1, bad, 1, 1]])), (1, tensor(X2)))
    assert all(torch.equal(d.statistics[0], b) for d, b in zip(deltas, before, strict=True))


def test_half_precision_inputs_are_squared_in_float32() -> None:
    delta = delta_of(PriLora(r=1)).float()
    norms = norms_of(delta)
    step(norms, (0, torch.full((100, 4), 300.0, dtype=torch.float16)))
    assert delta.statistics[0].dtype == torch.float32
    assert delta.statistics[0].tolist() == pytest.approx([3000] * 4 + [1])


def test_one_reduction_serves_all_modules_that_read_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [delta_of(PriLora(r=1)) for _ in range(3)]
    norms, x, calls = norms_of(*deltas), tensor(X1), []
    reduce = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: calls.append(1) or reduce(*a, **k))
    step(norms, *((i, x.detach()) for i in range(3)))
    assert len(calls) == 1 and all(close(d.statistics[0], [5, 0, 1, 2, 1]) for d in deltas)
    norms.collect(0, x)
    norms.collect(1, x.view(2, 4))
    assert len(calls) == 2  # a new step, a new look; a view of all of it is the same
    for count, other in ((3, x.zero_()), (4, x[:1]), (5, x.clone())):  # written anew, a part, another tensor
        norms.collect(2, other)
        assert len(calls) == count


# -- importance and selection ------------------------------------------------------------------------------------------


def test_p4_p5_importance_and_what_is_pruned() -> None:
    S = weighted_magnitude(tensor(A), tensor([N]))
    assert close(S, [[0.45, 0.18, 0.5, 0.6], [1.8, 0.04, 2, 0.2]])
    for group in ("row", "matrix"):
        assert close(zero_least(tensor(A), S, share=0.5, group=group), [[0, 0, -0.5, 0.3], [-0.4, 0, 2, 0]])
    by_size = zero_least(tensor(A), tensor(A).abs(), share=0.5, group="row")
    assert close(by_size, [[0, 0.9, -0.5, 0], [-0.4, 0, 2, 0]])


@pytest.mark.parametrize(("group", "left"), [("row", [[0, 2], [0, 4]]), ("matrix", [[0, 0], [3, 4]])])
def test_p5_rows_and_matrix_differ(group: str, left: list) -> None:
    S = tensor([[1, 2], [3, 4]])
    assert zero_least(S, S, share=0.5, group=group).tolist() == left


def test_ties_go_exactly_and_in_order() -> None:
    S = torch.ones(2, 2, 5)
    assert zero_least(S, S, share=0.5, group="row").tolist() == [[[0, 0, 1, 1, 1]] * 2] * 2
    assert zero_least(S, S, share=0.3, group="matrix").tolist() == [[[0, 0, 0, 1, 1], [1] * 5]] * 2
    S[..., 0] = torch.nan
    assert zero_least(torch.ones_like(S), S, share=0.8, group="row").tolist() == [[[1, 0, 0, 0, 0]] * 2] * 2


@pytest.mark.parametrize(("share", "size", "gone"), [
    (0.29, 100, 29), (0.7, 10, 7), (0.5, 7, 3), (0.01, 99, 0), (0.999, 1000, 999), (1e-05, 100_000, 1),
])  # fmt: skip
def test_the_share_is_taken_as_it_is_written(share: float, size: int, gone: int) -> None:
    left = zero_least(torch.ones(1, size), torch.ones(1, size), share=share, group="row")
    assert int((left == 0).sum()) == gone


def test_held_zeros_stay_and_everything_else_keeps_its_bits() -> None:
    values = [torch.tensor([0.0, -0.0, 1e-45, -3.0, torch.inf])]
    marks = nonzero_marks(values)
    moved = [torch.tensor([5.0, 6.0, 7.0, -0.1, 1e-45])]
    torch._foreach_mul_(moved, marks)
    assert moved[0].tolist() == torch.tensor([0, 0, 7.0, -0.1, 1e-45]).tolist()


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_p6_prunings_at_every_fortieth_step_and_nowhere_else() -> None:
    assert [s + 1 for s in range(200) if Multiples(40).due(s)] == [40, 80, 120, 160, 200]


@pytest.mark.parametrize(("options", "steps"), [
    ({"interval": 4, "total": 18}, [4, 8, 12, 16]),
    ({"interval": 4, "total": 16}, [4, 8, 12, 16]),
    ({"interval": 4, "warmup": 4, "settle": 2, "total": 18}, [8, 12, 16]),
    ({"interval": 4, "warmup": 3, "settle": 3, "total": 18}, [4, 8, 12]),
    ({"interval": 1, "warmup": 17, "total": 18}, [18]),
])  # fmt: skip
def test_phases_without_prunings(options: dict, steps: list[int]) -> None:
    schedule = Multiples(**options)
    assert [s + 1 for s in range(40) if schedule.due(s)] == steps
    assert (schedule.first + 1, schedule.last + 1) == (steps[0], steps[-1])
    assert [s + 1 for s in range(18) if schedule.over(s)] == [*range(steps[-1], 19)]


@pytest.mark.parametrize(("options", "run"), [
    ({"interval_steps": 50}, 39), ({"warmup_steps": 40}, 79), ({"settle_steps": 0.6}, 80),
])  # fmt: skip
def test_a_run_without_any_pruning_is_refused(options: dict, run: int) -> None:
    method = PriLora(**options).method(2, 20)
    with pytest.raises(ScheduleError, match=f"no pruning falls into a run of {run} steps.*lower `interval_steps`"):
        method.rules[0].schedule(Run(run))
    assert method.rules[0].schedule(Run(1000)).first in (39, 49, 79)


@pytest.mark.parametrize(("run", "steps"), [(1, [1]), (2, [1, 2]), (39, [19, 38]), (40, [40]), (100, [40, 80])])
def test_the_default_interval_fits_any_run(run: int, steps: list[int]) -> None:
    schedule = PriLora().method(2, 20).rules[0].schedule(Run(run))
    assert [step + 1 for step in range(run) if schedule.due(step)] == steps


@pytest.mark.parametrize("options", [{"interval_steps": 0.1}, {"warmup_steps": 0.1}, {"settle_steps": 10}])
def test_an_unknown_length_names_the_remedies(options: dict) -> None:
    with pytest.raises(ScheduleError, match=r"`total_steps`.*increlora.attach.*Trainer"):
        PriLora(**options).method(2, 20).rules[0].schedule(Run(None))
    assert PriLora().method(2, 20).rules[0].schedule(Run(None)).last is None


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "rank", "scale"), [
    ("per_rank", 4, 4.0), ("per_rank", 12, 4 / 3), ("constant", 4, 2.0), ("constant", 12, 2.0),
])  # fmt: skip
def test_the_scale_is_that_of_the_module_or_of_the_mean(scaling: str, rank: int, scale: float) -> None:
    peers = (("h.0.q", 30, 20), ("h.1.q", 30, 20))
    method = PriLora(r=8, lora_alpha=16, scaling=scaling).method(2, 100)
    delta = method.make_delta(Site(f"h.{int(rank == 12)}.q", 30, 20, 2, 100, None, peers))
    assert delta.sizes == [rank] and delta.scale == pytest.approx(scale, rel=1e-15)


def test_a_site_without_peers_has_the_mean_rank_as_far_as_its_shape_goes() -> None:
    method = PriLora(total_ranks=9).method(2, 100)
    assert [method.make_delta(Site("h.0.q", n, 20, 2, 100)).sizes for n in (30, 3)] == [[4], [3]]


def test_nothing_to_prune_needs_nobody() -> None:
    method = PriLora(prune_share=0.0).method(2, 20)
    assert not method.rules and not method.adaptive


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"r": 0}, ConfigError, "r=0"),
    ({"total_ranks": 0}, ConfigError, "total_ranks=0"),
    ({"first_r": 0.5}, BudgetError, "first_r=0.5.*give a rank from 1 to 15"),
    ({"r": 2, "first_r": 4}, BudgetError, "first_r=4.*the last layer would get 0; give a rank from 1 to 3"),
    ({"prune_share": 1.0}, ConfigError, "prune_share=1.0"),
    ({"prune_share": -0.1}, ConfigError, "prune_share=-0.1"),
    ({"beta": 1.0}, ConfigError, "beta=1.0"),
    ({"statistic_interval": 0}, ConfigError, "statistic_interval=0"),
    ({"group": "column"}, ConfigError, "group='column': give one of row, matrix"),
    ({"ramp": "layer"}, ConfigError, "ramp='layer': give one of per_stack, whole"),
    ({"scaling": "initial_rank"}, ConfigError, "scaling='initial_rank'"),
    ({"prune_shares": 0.4}, ConfigError, "did you mean 'prune_share'"),
])  # fmt: skip
def test_bad_settings_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PriLoraConfig(**options)


def test_the_type_is_its_name() -> None:
    assert PriLoraConfig().peft_type == "INCRELORA_PRILORA"
