"""The reference twin against the hand-computed cases of the specification, §10, and against facts it states elsewhere.

What holds here is about `tests.reference.official_increlora` only; the library is compared with it in other files.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.reference.official_increlora import (
    OfficialAllocator,
    OfficialConfig,
    OfficialLinear,
    adapt,
    adapted,
    backward,
    block_tensors,
    lr_factor,
    orthogonality,
    run_official,
)
from tests.reference.toy import gaussian_initial, toy_batches, toy_network

RUN = OfficialConfig(target_total=12, top_h=2, incre_rank_num=1)  # from 6: events at 10, 15, 20
INITIAL = gaussian_initial(3, std=0.3)


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.01)


def layer(a: list, e: list, b: list, **options) -> OfficialLinear:
    """A layer with W0 = 0 and the given entry-0 factors A, λ, B."""
    a, b = tensor(a), tensor(b)
    built = OfficialLinear(b.new_zeros(b.shape[0], a.shape[1]), None, a, b, OfficialConfig(**options))
    built.lora_E[0].data.copy_(tensor(e))
    return built


def idle_allocator(modules: int, config: OfficialConfig) -> OfficialAllocator:
    """An allocator over 2×2 layers that nothing trains; scores are set by hand."""
    model = nn.ModuleList(layer([[1.0, 0.0]], [[0.0]], [[1.0], [0.0]]) for _ in range(modules))
    return OfficialAllocator(model, sgd([p for p in model.parameters() if p.requires_grad]), INITIAL, config)


def drive(allocator: OfficialAllocator, steps: int, scores: list[float]) -> list[tuple[int, int, int]]:
    """Run the allocator with constant scores; return (step, modules grown, total rank) of every event."""
    events = []
    for g in range(steps):
        for module, score in zip(allocator.modules.values(), scores, strict=True):
            module.score = tensor(score)
        if grown := allocator.step(g):
            events.append((g, len(grown), allocator.total))
    return events


def reserve_values(allocator: OfficialAllocator) -> list[float]:
    return [e.item() for m in allocator.modules.values() for e in list(m.lora_E)[-allocator.k :]]


def grouped(allocator: OfficialAllocator) -> set[int]:
    return {id(p) for group in allocator.optimizer.param_groups for p in group["params"]}


# ---- §10


@pytest.mark.parametrize(("eps", "ratio"), [(1e-5, 1.00001 / 2.00001), (0.0, 0.5)])
def test_t1_growing_rescales_what_was_learnt(eps: float, ratio: float):
    one = layer([[1.0, 2.0]], [[0.7]], [[3.0], [4.0]], rank_eps=eps)
    before = one.delta().detach()
    one.ranknum += 1
    torch.testing.assert_close(one.delta().detach(), ratio * before, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("norm", "score"), [("sqrt_numel", 5.715418912304959), ("mean", 13.99986000139998600 / 6)])
def test_t2_score_and_factor_gradients(norm: str, score: float):
    one = layer([[1, 2, -1]], [[0.5]], [[1], [-2]], alpha=2.0, score_norm=norm)
    y = one(tensor([[1, 0, 2], [0, 1, -1]]))
    half = 1 / 1.00001
    torch.testing.assert_close(one.delta().detach(), half * tensor([[1, 2, -1], [-2, -4, 2]]))
    torch.testing.assert_close(y.detach(), half * tensor([[-1, 2], [3, -6]]))
    y.backward(tensor([[1, -1], [2, 0.5]]))
    torch.testing.assert_close(one.lora_E[0].grad, tensor([[0.0]]))
    torch.testing.assert_close(one.lora_A[0].grad, half * tensor([[3, 1, 5]]))
    torch.testing.assert_close(one.lora_B[0].grad, half * tensor([[5], [2.5]]))
    assert one.score.item() == pytest.approx(score, rel=1e-14)


def test_t4_moving_averages():
    allocator = idle_allocator(1, OfficialConfig(target_total=2, incre_rank_num=1, init_warmup=9))
    rows = []
    for g, s in enumerate([1.0, 2.0, 4.0]):
        allocator.modules["0"].score = tensor(s)
        allocator.step(g)
        rows.append((allocator.I["0"], allocator.U["0"], allocator.importance()["0"]))
    expected = [(0.15, 0.1275, 0.019125), (0.4275, 0.34425, 0.147166875), (0.963375, 0.74810625, 0.72070685859375)]
    assert [x for row in rows for x in row] == pytest.approx([x for row in expected for x in row], rel=1e-14)


@pytest.mark.parametrize(
    ("init_warmup", "interval", "steps"),
    [
        (100, 100, [200, 300]),
        (5, 5, [10, 15]),
        (0, 5, [5, 10]),
        (7, 5, [10, 15]),
        (10, 5, [15, 20]),
    ],
)
def test_t5_event_steps(init_warmup: int, interval: int, steps: list[int]):
    config = OfficialConfig(target_total=99, top_h=1, incre_rank_num=1, init_warmup=init_warmup, interval=interval)
    assert [g for g, _, _ in drive(idle_allocator(1, config), steps[-1] + 1, [1.0])] == steps


def test_t6_budget_is_met_with_a_smaller_last_event():
    allocator = idle_allocator(6, OfficialConfig(target_total=18, top_h=5, incre_rank_num=1))
    events = drive(allocator, 40, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert events == [(10, 5, 11), (15, 5, 16), (20, 2, 18)]  # E = 3 events, the last one at ν(E+1)
    assert reserve_values(allocator) == [0.0] * 6


def test_t6_more_ranks_per_module_overshoot_and_never_finish():
    allocator = idle_allocator(6, OfficialConfig(target_total=15, top_h=2, incre_rank_num=2))
    events = drive(allocator, 40, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert [total for _, _, total in events] == [10, 14, 16]
    assert reserve_values(allocator) == [1e-5] * 12
    assert all(module.hooked for module in allocator.modules.values())


@pytest.mark.parametrize(
    ("c", "g", "factor"),
    [
        (-1, 0, 0.0),
        (-1, 1, 0.2),
        (-1, 5, 1.0),
        (-1, 6, 54 / 55),
        (-1, 32, 28 / 55),
        (-1, 59, 1 / 55),
        (10, 10, 1.0),
        (10, 11, 0.0),
        (10, 12, 0.2),
        (10, 16, 1.0),
        (10, 59, 1 / 44),
        (56, 59, 0.4),
    ],
)
def test_t7_learning_rate_clock(c: int, g: int, factor: float):
    assert lr_factor(c, g, 60, 5) == pytest.approx(factor, rel=1e-15, abs=0)
    assert lr_factor(c, g, 60, 5, "shared") == lr_factor(-1, g, 60, 5)
    assert lr_factor(c, g, 60, 5, "constant") == (1.0 if c >= 0 else lr_factor(c, g, 60, 5))


def test_t8_regulariser():
    one = layer([[3, 4]], [[0.0]], [[0.6], [0.8]])
    assert orthogonality([one]).item() == pytest.approx(12.0)
    assert orthogonality([one], "squared").item() == pytest.approx(576.0)
    twin = layer([[1, 0]], [[0.0]], [[1], [0]])
    twin.append_entry(tensor([[1, 0]]), tensor([[0], [1]]), 0.0)
    assert orthogonality([twin]).item() == pytest.approx(math.sqrt(2) / 2)
    assert orthogonality([twin], "per_entry").item() == 0.0
    assert orthogonality([one, twin]).item() == pytest.approx((24 + math.sqrt(2)) / 4)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("learn", [True, False])
def test_t9_reserve_after_the_first_step(k: int, learn: bool):
    allocator = idle_allocator(2, OfficialConfig(target_total=99, top_h=1, incre_rank_num=k, advance_learn=learn))
    drive(allocator, 1, [1.0, 2.0])
    start, members = 1e-5 if learn else 0.0, grouped(allocator)
    assert len(allocator.optimizer.param_groups) == (2 if learn else 1)
    for module in allocator.modules.values():
        assert [len(x) for x in (module.lora_A, module.lora_E, module.lora_B)] == [1 + k] * 3
        for a, e, b in list(zip(module.lora_A, module.lora_E, module.lora_B, strict=True))[1:]:
            assert a.requires_grad is b.requires_grad is learn and not e.requires_grad and e.item() == start
            assert (id(a) in members) is (id(b) in members) is learn and id(e) not in members


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("learn", [True, False])
def test_t9_activation(k: int, learn: bool):
    allocator = idle_allocator(2, OfficialConfig(target_total=99, top_h=1, incre_rank_num=k, advance_learn=learn))
    assert drive(allocator, 11, [1.0, 2.0]) == [(10, 1, 2 + k)]
    stays, grows = allocator.modules.values()
    assert (len(stays.lora_A), len(grows.lora_A)) == (1 + k, 1 + 2 * k) and grows.ranknum.item() == 1 + k
    members, newest = grouped(allocator), {id(p) for p in allocator.optimizer.param_groups[-1]["params"]}
    entries = list(zip(grows.lora_A, grows.lora_E, grows.lora_B, strict=True))
    for a, e, b in entries[1 : 1 + k]:
        assert a.requires_grad and e.requires_grad and b.requires_grad and e.item() == (1e-5 if learn else 0.0)
        assert {id(a), id(e), id(b)} <= members and id(e) in newest and (id(a) in newest) is (not learn)
    for a, e, b in entries[1 + k :]:
        assert a.requires_grad is b.requires_grad is learn and not e.requires_grad and id(e) not in members
        assert (id(a) in newest) is (id(b) in newest) is learn


@pytest.mark.parametrize("make", [sgd, adamw])
def test_t10_finish(make):
    trace = run_official(RUN, make, initial=INITIAL, steps=30)
    assert [g for g, s in enumerate(trace.steps) if any(s.grown.values())] == [10, 15, 20]
    assert trace.steps[-1].total_rank == 12 and reserve_values(trace.allocator) == [0.0] * 6
    assert not any(module.hooked for module in trace.allocator.modules.values())
    assert trace.steps[20].score == trace.steps[-1].score
    assert (trace.steps[20].I, trace.steps[20].U) == (trace.steps[-1].I, trace.steps[-1].U)
    assert trace.steps[19].I != trace.steps[20].I
    assert len(trace.allocator.optimizer.param_groups) == 1 + 1 + 3
    for name, module in trace.allocator.modules.items():
        a, e, b = (x.detach() for x in module.factors())
        r = int(module.ranknum.item())
        active = 16.0 / (r + 1e-5) * b[:, :r] @ (e[:r] * a[:r])
        torch.testing.assert_close(trace.delta[name], active, rtol=1e-14, atol=1e-16)


def test_t11_only_the_first_use_is_scored():
    first, second = tensor([[1, 0, 2]]), tensor([[0, 1, -1]])
    scores = []
    for uses in ([(first, 1.0)], [(first, 1.0), (second, 5.0)]):
        one = layer([[1, 2, -1]], [[0.5]], [[1], [-2]])
        sum(weight * one(x).sum() for x, weight in uses).backward()
        scores.append(one.score.item())
    assert scores[0] == scores[1] > 0


# ---- facts stated in other sections


def test_score_is_zero_at_first_then_tiny_and_the_first_step_moves_nothing():
    """§1.2, §4: λ = 0 and the learning rate 0 in step 0, so the reserve alone speaks in step 1."""
    trace = run_official(RUN, sgd, initial=INITIAL, steps=30)
    assert set(trace.steps[0].score.values()) == {0.0}
    assert all(0 < s < 1e-4 for s in trace.steps[1].score.values())
    start = block_tensors(adapted(adapt(toy_network(0), INITIAL, RUN)), 1)
    one_step = run_official(RUN, adamw, initial=INITIAL, steps=1).parameters
    assert all(torch.equal(value, one_step[key]) for key, value in start.items())


@pytest.mark.parametrize("k", [1, 2])
def test_learnt_update_drops_at_growth(k: int):
    """§1.2: by (r + 1e-5) / (r + k + 1e-5), between backward and optimizer step; exact while the reserve is 0."""
    config = replace(RUN, incre_rank_num=k, advance_learn=False)
    allocator = idle_allocator(2, config)
    drive(allocator, 10, [1.0, 2.0])
    for module in allocator.modules.values():
        module.lora_E[0].data.fill_(0.3)
    before = {name: module.delta().norm().item() for name, module in allocator.modules.items()}
    assert len(allocator.step(10)) == 2
    for name, module in allocator.modules.items():
        assert module.delta().norm().item() / before[name] == pytest.approx(1.00001 / (1.00001 + k), rel=1e-12)


def test_ties_make_every_tied_module_grow():
    """§8 item 8: h = 1, four modules, total 4 → 8 in one event."""
    config = OfficialConfig(target_total=20, top_h=1, incre_rank_num=1)
    assert drive(idle_allocator(4, config), 11, [0.0] * 4) == [(10, 4, 8)]


def test_a_nan_score_stops_growth_and_still_adds_groups():
    """§8 item 12."""
    allocator = idle_allocator(2, OfficialConfig(target_total=20, top_h=1, incre_rank_num=1))
    assert drive(allocator, 21, [float("nan"), 1.0]) == []
    assert [len(group["params"]) for group in allocator.optimizer.param_groups] == [6, 4, 0, 0, 0]


def test_only_the_last_micro_batch_is_scored_and_its_loss_is_divided():
    """§2.4: the score of two micro-batches is that of the second alone, halved; the gradient is their mean."""
    batches = toy_batches(0, 1, 2)[0]

    def scored(used: list) -> tuple[dict[str, float], list[Tensor]]:
        model = adapt(toy_network(0), INITIAL, RUN)
        for module in adapted(model).values():
            module.lora_E[0].data.fill_(0.1)
        backward(model, used, RUN)
        scores = {name: module.score.item() for name, module in adapted(model).items()}
        return scores, [p.grad for p in model.parameters() if p.requires_grad]

    (both, gradients), (_, first), (last, second) = scored(batches), scored(batches[:1]), scored(batches[1:])
    assert both == pytest.approx({name: s / 2 for name, s in last.items()}, rel=1e-13)
    torch.testing.assert_close(gradients, [(x + y) / 2 for x, y in zip(first, second, strict=True)])


def test_loss_counts_the_penalty_once():
    """§3.2: total = task + γR whatever the number of micro-batches."""
    model = adapt(toy_network(0), INITIAL, RUN)
    task, total = backward(model, toy_batches(0, 1, 3)[0], RUN)
    assert total - task == pytest.approx(0.1 * orthogonality(list(adapted(model).values())).item(), rel=1e-13)


def test_every_tensor_follows_its_own_clock():
    """§4: an activated λ restarts at its event, its a and b keep the clock of their creation as reserve."""
    trace = run_official(RUN, sgd, initial=INITIAL, steps=30)
    name = next(name for name, grown in trace.steps[10].grown.items() if grown)
    births = {"A0": -1, "E0": -1, "B0": -1, "A1": 0, "B1": 0, "E1": 10, "A2": 10, "B2": 10}
    for g in range(11, 30):
        factors = trace.steps[g].lr_factor
        expected = {f"{name}.lora_{t}": lr_factor(c, g, 30, 5) for t, c in births.items()}
        assert {key: factors[key] for key in expected} == expected
    assert f"{name}.lora_E1" not in trace.steps[9].lr_factor
    off = run_official(replace(RUN, advance_learn=False), sgd, initial=INITIAL, steps=30)
    name = next(name for name, grown in off.steps[10].grown.items() if grown)
    assert {off.steps[12].lr_factor[f"{name}.lora_{t}1"] for t in "AEB"} == {0.2}
    assert f"{name}.lora_A2" not in off.steps[14].lr_factor


def test_the_optimizer_uses_the_clock():
    """§4: with SGD a tensor moves by its own learning rate times its gradient; checked on the λ an event activated."""
    moved = {}
    for steps in (12, 13):  # T does not matter inside warm-up
        trace = run_official(RUN, sgd, initial=INITIAL, steps=steps)
        moved[steps] = trace.parameters
    name = next(name for name, grown in trace.steps[10].grown.items() if grown)
    assert trace.steps[11].lr_factor[f"{name}.lora_E1"] == 0.0
    assert moved[12][f"{name}.lora_E1"].item() == 1e-5 != moved[13][f"{name}.lora_E1"].item()


def test_the_second_step_is_one_plain_gradient_step():
    """§3.2, §4: step 0 has learning rate 0; step 1 moves the initial tensors by η/T_w · gradient, no reserve."""
    model, batches = adapt(toy_network(0), INITIAL, RUN), toy_batches(0, 2)
    allocator = OfficialAllocator(model, sgd([p for p in model.parameters() if p.requires_grad]), INITIAL, RUN)
    backward(model, batches[0], RUN)
    allocator.step(0)
    model.zero_grad()
    backward(model, batches[1], RUN)
    expected = {}
    for name, module in allocator.modules.items():
        for letter in "AEB":
            first, reserve = getattr(module, f"lora_{letter}")
            expected |= {
                f"{name}.lora_{letter}0": first.detach() - 0.05 / 5 * first.grad,
                f"{name}.lora_{letter}1": reserve.detach(),
            }
    end = run_official(RUN, sgd, initial=INITIAL, steps=2).parameters
    torch.testing.assert_close(end, expected, rtol=1e-13, atol=1e-16)


def test_blocks_are_initial_values_split_into_one_rank_entries():
    config = replace(RUN, lora_r=2, incre_rank_num=3, target_total=99)
    parameters = run_official(config, adamw, initial=INITIAL, steps=1).parameters
    for key, value in parameters.items():
        name, letter, block = key.split(".lora_")[0], key[-2], int(key[-1])
        if letter != "E":
            assert torch.equal(value, INITIAL(name, block, letter, tuple(value.shape)))
    shapes = {"A0": (2, 7), "A1": (3, 7), "E0": (2, 1), "E1": (3, 1), "B0": (12, 2), "B1": (12, 3)}
    assert {key: tuple(parameters[f"blocks.0.up.lora_{key}"].shape) for key in shapes} == shapes


@pytest.mark.parametrize(("decay", "expected"), [(None, 0.01), (0.3, 0.3)])
def test_weight_decay_of_new_groups(decay: float | None, expected: float):
    """§8 item 20: it acts on λ, a, b and on the reserve; the dead reserve of a finished run still shrinks."""
    config = replace(RUN, weight_decay=decay, gamma=0.0)
    trace = run_official(config, adamw, initial=INITIAL, steps=24)
    assert [group["weight_decay"] for group in trace.allocator.optimizer.param_groups] == [0.01] + [expected] * 4
    name = next(name for name, grown in trace.steps[20].grown.items() if grown)
    newest = max(key for key in trace.parameters if key.startswith(f"{name}.lora_A"))
    shrink = math.prod(1 - 0.01 * lr_factor(20, g, 24, 5) * expected for g in range(21, 24))
    start = INITIAL(name, int(newest[-1]), "A", tuple(trace.parameters[newest].shape))
    torch.testing.assert_close(trace.parameters[newest], shrink * start, rtol=1e-13, atol=0)


def test_clipping_reduces_what_a_step_moves():
    free, clipped = (run_official(RUN, sgd, initial=INITIAL, steps=2, clip_norm=c).parameters for c in (None, 1e-3))
    start = block_tensors(adapted(adapt(toy_network(0), INITIAL, RUN)), 1)

    def distance(end: dict[str, Tensor]) -> float:
        return math.sqrt(sum((end[key] - value).square().sum().item() for key, value in start.items()))

    rate = 0.05 * lr_factor(-1, 1, 2, 5)
    assert 0.5 * rate * 1e-3 < distance(clipped) <= rate * 1e-3 < distance(free)


def test_the_same_seed_gives_the_same_trace_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    runs = [run_official(RUN, adamw, initial=INITIAL, steps=12, accumulation=2) for _ in range(2)]
    assert runs[0].steps == runs[1].steps and torch.equal(state, torch.get_rng_state())
