"""SoRA while a toy network is trained: when gates shrink and by how much, what comes back, and what is refused."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from increlora import SoraConfig, attach, rank_summary
from increlora.errors import BudgetError, ScheduleError
from tests.reference.loop import adamw, controller_of, fused, trainable
from tests.reference.toy import toy_network
from tests.unit.rules.steps import step
from tests.unit.rules.test_keep import Calls, train

STEPS = 20
SCHEDULE = {"r": 2, "warmup_steps": 3, "interval_steps": 4, "settle_steps": 8, "total_steps": STEPS,
            "target_modules": ["up", "down"]}  # cuts at 4, 8 and 12  # fmt: skip
FIXED = SCHEDULE | {"threshold": 0.02}


def adapted(**options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(toy_network(), SoraConfig(**SCHEDULE | options))


def gates(model: nn.Module) -> Tensor:
    return torch.cat([delta.block(0)["E"].detach().flatten() for delta in controller_of(model).deltas])


def flags(model: nn.Module, which: str) -> Tensor:
    deltas = controller_of(model).deltas
    return torch.tensor([f for d in deltas for f in (getattr(d.state, which) or [False] * len(d.state.kept))])


def still(params) -> SGD:
    return SGD(params, lr=0.0)


# -- shrinking ---------------------------------------------------------------------------------------------------------


def test_gates_shrink_by_the_threshold_once_a_step_and_never_in_the_warm_up() -> None:
    model = adapted(threshold=0.02)
    before = gates(model)
    optimizer = train(model, make=still, steps=3)
    assert torch.equal(gates(model), before)
    train(model, optimizer=optimizer, start=3, steps=5)
    expected = before.sign() * (before.abs() - 0.04).clamp(min=0)
    torch.testing.assert_close(gates(model), expected, rtol=1e-6, atol=1e-8)


def test_a_threshold_in_units_of_the_learning_rate_follows_the_group_of_the_gates() -> None:
    model = adapted(threshold=0.5, threshold_unit="learning_rate", warmup_steps=0)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own, others = [p for n, p in named if n.endswith("E0")], [p for n, p in named if not n.endswith("E0")]
    before = gates(model)
    optimizer = SGD([{"params": others, "lr": 0.1}, {"params": own, "lr": 1e-9}])
    train(model, optimizer=optimizer, steps=1)
    optimizer.param_groups[1]["lr"] = 0.04
    seen = {}
    train(model, optimizer=optimizer, start=1, steps=2, before=lambda step, m: seen.update(
        grad=torch.cat([d.block(0)["E"].grad.flatten() for d in controller_of(m).deltas])))  # fmt: skip
    moved = before - 0.04 * seen["grad"]
    expected = moved.sign() * (moved.abs() - 0.02).clamp(min=0)
    torch.testing.assert_close(gates(model), expected, rtol=1e-6, atol=1e-7)


def test_gates_of_two_groups_shrink_at_the_rate_of_their_own() -> None:
    model = adapted(threshold=0.5, threshold_unit="learning_rate", warmup_steps=0)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    frozen = [p for n, p in named if n.endswith("blocks.0.up.lora_delta.default.lora_E0")]
    others = [p for n, p in named if all(p is not q for q in frozen)]
    before = frozen[0].detach().clone()
    train(model, optimizer=SGD([{"params": frozen, "lr": 0.0}, {"params": others, "lr": 0.04}]), steps=2)
    assert len(frozen) == 1 and torch.equal(frozen[0].detach(), before)


def test_without_a_threshold_or_decay_gates_move_as_any_parameter() -> None:
    """S9: before anything shrinks, SoRA is the host's optimizer."""
    model, twin = adapted(), adapted()
    gate = [p for n, p in twin.named_parameters() if n.endswith("E0")]
    rest = [p for n, p in twin.named_parameters() if p.requires_grad and not n.endswith("E0")]
    train(model, make=lambda p: AdamW(p, lr=1e-2, weight_decay=0.5), steps=3)
    train(twin, optimizer=AdamW([{"params": rest}, {"params": gate, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.5),
          steps=3)  # fmt: skip
    torch.testing.assert_close(gates(model), gates(twin), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [SGD, Adam])
def test_coupled_decay_is_left_as_it_is(make) -> None:
    """It is part of the gradient, and what an optimizer makes of that is not ours to undo."""
    model, seen = adapted(), {}

    def look(step: int, model: nn.Module) -> None:
        seen.update(
            before=gates(model), grad=torch.cat([d.lora_E0.grad.flatten() for d in controller_of(model).deltas])
        )

    train(model, make=lambda p: make(p, lr=1e-2, weight_decay=0.5), steps=1, before=look)
    twin = nn.Parameter(seen["before"].clone())
    twin.grad = seen["grad"]
    make([twin], lr=1e-2, weight_decay=0.5).step()
    torch.testing.assert_close(gates(model), twin.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, FIXED | {"gate_penalty": 0.5}])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_s9_one_shrink_per_step_however_the_batch_is_cut(accumulation: int, options: dict) -> None:
    whole, cut = adapted(**options), adapted(**options)
    train(whole), train(cut, accumulation=accumulation)
    torch.testing.assert_close(gates(cut), gates(whole), rtol=1e-8, atol=1e-10)
    assert controller_of(cut).ranks == controller_of(whole).ranks


@pytest.mark.parametrize("make", [adamw, fused])
def test_loss_scaling_changes_nothing(make) -> None:
    plain, scaled = adapted(gate_penalty=0.5), adapted(gate_penalty=0.5)
    train(plain, make=make)
    train(scaled, make=make, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))
    torch.testing.assert_close(gates(scaled), gates(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_step_that_is_not_taken_shrinks_nothing(scaled: bool) -> None:
    model = adapted(threshold=0.02, warmup_steps=0)
    before = {}

    def spoil(step: int, model: nn.Module) -> None:
        if step == 2:
            before["gates"] = gates(model)
            for delta in controller_of(model).deltas:
                delta.lora_A0.grad[0, 0] = torch.inf

    if scaled:
        train(model, steps=3, before=spoil, scaler=torch.amp.GradScaler("cpu"))
    else:
        with pytest.warns(UserWarning, match="non-finite gradient"):
            train(model, steps=3, before=spoil)
    assert torch.equal(gates(model), before["gates"])


def test_a_bad_step_does_not_put_off_a_cut() -> None:
    model = adapted()

    def spoil(step: int, model: nn.Module) -> None:
        if step == 4:  # the first cut
            controller_of(model).deltas[0].lora_A0.grad[0, 0] = torch.inf

    with pytest.warns(UserWarning, match="non-finite gradient"):
        train(model, steps=5, before=spoil)
    assert not flags(model, "kept").all()


# -- what counts -------------------------------------------------------------------------------------------------------


def test_the_rank_of_a_module_is_what_survived() -> None:
    model = adapted(threshold=0.1, r=3, interval_steps=2, close_after=1)
    train(model)
    survived = gates(model) != 0
    assert torch.equal(flags(model, "kept"), survived) and 0 < survived.sum() < len(survived)
    assert rank_summary(model).active == survived.sum()
    kinds = [event.kind for event in controller_of(model).events]
    assert "retirement" in kinds and kinds.count("finish") == 6
    assert all((event.importance or 0) >= 0 for event in controller_of(model).events)


def test_a_budget_is_met_by_the_threshold_it_chooses() -> None:
    """Of the gates that a cut drops nearly all are at zero already."""
    model = adapted(total_ranks=12, interval_steps=8, warmup_steps=2, settle_steps=3)  # cuts at 8, 16, 17
    dropped = {}

    def look(step: int, model: nn.Module) -> None:
        if step == 16:
            dropped["before"] = gates(model)

    train(model, make=lambda p: AdamW(p, lr=1e-4), before=look)
    gone = ~flags(model, "kept")
    assert rank_summary(model).active == 12 and gone.sum() == 6
    xi = controller_of(model).rules[0].threshold
    assert xi == 0.0 and (dropped["before"][gone].abs() < 0.01).all()
    assert gates(model).abs()[~gone].min() > 0.01


def test_a_gate_at_zero_may_come_back_until_it_is_closed() -> None:
    model = adapted(threshold=0.05, close_after=2, interval_steps=2, warmup_steps=0)
    optimizer = train(model, steps=3)
    gone = ~flags(model, "kept")
    assert gone.any() and not flags(model, "closed").any()
    revived = controller_of(model).deltas[0]
    with torch.no_grad():
        revived.block(0)["E"].fill_(3.0)
    train(model, optimizer=optimizer, start=3, steps=5)
    assert revived.rank == len(revived.state.kept) and not revived.state.closed
    closed = flags(model, "closed")
    assert closed.any() and not gates(model)[closed].any()
    train(model, optimizer=optimizer, start=5, steps=12)
    assert not gates(model)[closed].any() and flags(model, "closed")[closed].all()


def test_momentum_does_not_reopen_what_is_closed() -> None:
    model = adapted(total_ranks=12, close_after=1)
    optimizer = train(model, make=lambda p: AdamW(p, lr=0.2), steps=5)
    closed = flags(model, "closed")
    assert closed.any()
    for number in range(5, 8):
        train(model, optimizer=optimizer, start=number, steps=number + 1)
        assert not gates(model)[closed].any()


def test_a_closed_rank_costs_nothing_and_a_module_without_any_is_skipped() -> None:
    model = adapted(threshold=0.05, interval_steps=2, warmup_steps=0, close_after=1)
    with torch.no_grad():
        for p in controller_of(model).deltas[2].block(0)["E"]:
            p.fill_(0.01)
    optimizer = train(model, steps=3)
    (empty, *_), full = [d for d in controller_of(model).deltas if d.rank == 0], controller_of(model).deltas
    assert empty.live == [] and empty.factors()[0].shape[0] == 0
    assert all(d.factors()[0].shape[0] == len(d.state.kept) - sum(d.state.closed or [0]) for d in full)
    before = {n: p.detach().clone() for n, p in empty.named_parameters()}
    train(model, optimizer=optimizer, start=3, steps=6)
    assert all(torch.equal(p, before[n]) for n, p in empty.named_parameters())  # no gradient, no decay


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"threshold": 0.05, "close_after": 1}])
@pytest.mark.parametrize("stop", [4, 7, 10])
def test_the_state_dict_alone_resumes(stop: int, options: dict) -> None:
    straight, first, second = adapted(**options), adapted(**options), adapted(**options)
    train(straight)
    optimizer = train(first, steps=stop)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    fresh = adamw(trainable(second))
    fresh.load_state_dict(optimizer.state_dict())
    train(second, optimizer=fresh, start=stop)
    assert torch.equal(gates(second), gates(straight))
    for which in ("kept", "closed"):
        assert torch.equal(flags(second, which), flags(straight, which))


def test_a_second_run_keeps_what_the_first_has_settled() -> None:
    model = adapted()
    train(model)
    settled = flags(model, "kept")
    train(model)
    assert torch.equal(flags(model, "kept"), settled) and torch.equal(gates(model) != 0, settled)


def test_a_copy_goes_on_where_the_original_was() -> None:
    model = adapted()
    optimizer = train(model, steps=7)
    twin = copy.deepcopy(model)
    fresh = adamw(trainable(twin))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    attach(twin, fresh)
    train(twin, optimizer=fresh, start=7)
    train(model, optimizer=optimizer, start=7)
    assert torch.equal(gates(twin), gates(model)) and torch.equal(flags(twin, "kept"), flags(model, "kept"))


@pytest.mark.parametrize("options", [{}, {"r": 1, "init_r": 4, "close_after": 1, "interval_steps": 2}])
def test_a_new_run_on_an_unfinished_one_starts_anew(options: dict) -> None:
    model = adapted(**options)
    train(model, steps=9)
    assert not flags(model, "kept").all()
    before = gates(model)
    optimizer = train(model, make=still, steps=3)
    assert torch.equal(gates(model), before)  # the threshold of the run before is forgotten
    assert flags(model, "kept").all() and not flags(model, "closed").any()
    assert model.peft_config["default"].ranks == controller_of(model).ranks
    train(model, optimizer=optimizer, start=3)
    assert rank_summary(model).active == rank_summary(model).budget_ranks


def test_a_checkpoint_of_a_shorter_schedule_goes_on_under_a_longer_one() -> None:
    """There more ranks may stay than are left, and more would have to go at once."""
    options = {"r": 1, "init_r": 4, "interval_steps": 8}
    first, second = adapted(**options), adapted(**options | {"warmup_steps": 12, "total_steps": 40})
    train(first, steps=9)
    second.load_state_dict(first.state_dict())
    train(second, start=9)
    assert controller_of(second).step == STEPS


# -- cost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"threshold": 0.02, "gate_penalty": 0.1}])
def test_between_cuts_a_few_calls_serve_all_gates_and_none_waits_for_the_device(options: dict) -> None:
    model = adapted(**options)
    optimizer = train(model, make=lambda p: AdamW(p, lr=1e-2, weight_decay=0.1), steps=5)
    pruner = controller_of(model).rules[0]
    for delta in controller_of(model).deltas:
        for p in delta.parameters():
            p.grad = torch.zeros_like(p)
    with Calls() as calls:
        pruner.before_step(step(5, optimizer))
        assert pruner.after_step(5) == []
    computing = [name for name in calls.names if not any(view in name for view in ("detach", "view", "split"))]
    assert len(computing) <= 7, computing
    assert not any("_local_scalar" in name or "nonzero" in name for name in calls.names)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_threshold_that_leaves_nothing_is_refused_before_the_first_step_or_where_it_happens() -> None:
    with pytest.raises(BudgetError, match="threshold=9.0 is not below the largest gate"):
        train(adapted(threshold=9.0))
    with pytest.raises(BudgetError, match="step 4: the threshold has set every gate.*lower `threshold`"):
        train(adapted(threshold=0.9))


@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}])
def test_phases_that_overlap_or_an_unknown_length_are_refused(options: dict) -> None:
    with pytest.raises(ScheduleError, match=r"warmup_steps=15.*run of 20 steps"):
        train(adapted(warmup_steps=15, settle_steps=5, **options), steps=1)
    with pytest.raises(ScheduleError, match=r"total_steps"):
        train(adapted(total_steps=None, **options), steps=1)


def test_a_target_above_the_start_is_refused() -> None:
    with pytest.raises(BudgetError, match="the budget of 90 ranks is above the start of 31"):
        adapted(total_ranks=90, init_r=6)
