"""Pruning while a toy network is trained: what is observed and when, what comes back, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from increlora import AdaLoraConfig, attach, rank_summary
from increlora.errors import BudgetError, ScheduleError
from tests.reference.loop import adamw, controller_of, fused, trainable
from tests.reference.toy import toy_batches, toy_loss, toy_network
from tests.switches import departing

STEPS = 20
SCHEDULE = {"r": 2, "warmup_steps": 3, "interval_steps": 4, "settle_steps": 8, "total_steps": STEPS,
            "target_modules": ["up", "down"]}  # cuts at 4, 8 and 12  # fmt: skip


def adapted(**options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(toy_network(), departing(AdaLoraConfig, **SCHEDULE | options))


Between = Callable[[int, nn.Module], None]


def train(
    model: nn.Module, *, make=adamw, steps: int = STEPS, start: int = 0, accumulation: int = 1, optimizer=None,
    scaler: torch.amp.GradScaler | None = None, before: Between = lambda step, model: None,
):  # fmt: skip
    """Train the steps start … steps − 1; `before` is called before each optimizer step. Returns the optimizer."""
    optimizer = optimizer or make(trainable(model))
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step, [(x, y)] in list(enumerate(toy_batches(1, STEPS)))[start:steps]:
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            scaler.scale(toy_loss(model(part_x), part_y) / accumulation).backward()
        before(step, model)
        scaler.step(optimizer)
        scaler.update()
    return optimizer


def entries(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_delta." in n}


def statistics(model: nn.Module) -> Tensor:
    return torch.cat([delta.statistics[0] for delta in controller_of(model).deltas])


def e_values(model: nn.Module) -> Tensor:
    return torch.cat([delta.block(0)["E"].detach().flatten() for delta in controller_of(model).deltas])


def kept(model: nn.Module) -> Tensor:
    return torch.tensor([k for delta in controller_of(model).deltas for k in delta.state.kept])


def assert_equal_runs(one: nn.Module, other: nn.Module, *, rtol: float = 0.0) -> None:
    torch.testing.assert_close(entries(one), entries(other), rtol=rtol, atol=rtol * 1e-3)
    assert controller_of(one).events == controller_of(other).events or rtol > 0
    assert torch.equal(kept(one), kept(other))


# -- what comes back, and what does not --------------------------------------------------------------------------------


def test_t7_the_optimizer_revives_what_was_dropped_until_the_budget_has_settled() -> None:
    model = adapted(lora_alpha=2)
    optimizer = train(model, steps=5)  # the cut of step 4 is over
    gone = ~kept(model)
    assert gone.any() and not e_values(model)[gone].any() and e_values(model)[~gone].all()
    train(model, optimizer=optimizer, start=5, steps=6)
    assert e_values(model)[gone].abs().max() > 1e-3  # a step of AdamW is about its learning rate, 1e-2
    train(model, optimizer=optimizer, start=6, steps=13)
    for step in range(13, STEPS):
        train(model, optimizer=optimizer, start=step, steps=step + 1)
        assert torch.equal(e_values(model) != 0, kept(model))
    assert kept(model).sum() == 12


def test_a_dropped_rank_can_come_back_and_that_is_an_event() -> None:
    model = adapted(total_ranks=12)
    optimizer = train(model, steps=6)
    controller = controller_of(model)
    poor = min(controller.deltas, key=lambda delta: delta.rank)
    assert poor.rank < 3
    poor.statistics[0].fill_(10.0)  # from now on it matters
    train(model, optimizer=optimizer, start=6)
    assert poor.rank == 3
    assert {event.kind for event in controller.events} == {"birth", "retirement", "finish"}
    for name, delta in zip(controller.names, controller.deltas, strict=True):
        own = [event for event in controller.events if event.module == name]
        assert 3 + sum(event.ranks for event in own) == delta.rank == own[-1].rank
        assert all((event.ranks > 0) == (event.kind == "birth") for event in own if event.ranks)


def test_a_second_run_keeps_what_the_first_has_settled() -> None:
    model = adapted()
    train(model)
    settled, before = kept(model), len(controller_of(model).events)
    train(model)  # a new optimizer
    assert torch.equal(kept(model), settled) and torch.equal(e_values(model) != 0, settled)
    assert len(controller_of(model).events) == before


def test_the_state_dict_alone_resumes_between_cuts() -> None:
    straight, first, second = adapted(), adapted(), adapted()
    train(straight)
    optimizer = train(first, steps=7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    fresh = adamw(trainable(second))
    fresh.load_state_dict(optimizer.state_dict())
    train(second, optimizer=fresh, start=7)
    torch.testing.assert_close(entries(second), entries(straight), rtol=0, atol=0)
    assert torch.equal(kept(second), kept(straight)) and torch.equal(statistics(second), statistics(straight))


def test_a_run_resumed_behind_the_last_cut_of_a_shorter_schedule_settles_at_once() -> None:
    first, second = adapted(total_steps=60, settle_steps=30), adapted()
    train(first, steps=15)
    second.load_state_dict(first.state_dict())  # at step 15 of 20, and nothing is settled
    train(second, start=15, steps=16)
    assert all(delta.state.settled for delta in controller_of(second).deltas) and rank_summary(second).active == 12


def test_the_keys_and_shapes_of_a_state_dict_never_change() -> None:
    """torch's distributed checkpoint loads into what a fresh model has."""
    model = adapted()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    train(model)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


# -- what is observed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observe", ["before_step", "after_step"])
def test_an_entry_is_scored_with_the_weights_before_or_after_the_step(observe: str) -> None:
    model = adapted(observe=observe, init_lora_weights=False)
    seen = {}

    def look(step: int, model: nn.Module) -> None:
        delta = controller_of(model).deltas[1]
        seen["weight"], seen["grad"] = delta.lora_B0.detach().clone(), delta.lora_B0.grad.clone()

    train(model, steps=1, before=look, make=lambda p: SGD(p, lr=0.5))
    delta = controller_of(model).deltas[1]
    weight = seen["weight"] if observe == "before_step" else delta.lora_B0.detach()
    expected = 0.15 * (weight * seen["grad"]).abs()
    n = len(delta.statistics[0]) // 2
    found = delta.statistics[0][n - expected.numel() : n].view_as(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(delta.statistics[0][n:], 0.85 * delta.statistics[0][:n], rtol=1e-12, atol=0)


def test_nothing_is_observed_once_it_cannot_matter() -> None:
    model = adapted()
    optimizer = train(model, steps=12)
    before = statistics(model)
    assert before.any()
    train(model, optimizer=optimizer, start=12)  # the cut of step 12 is decided by steps 0 to 11
    assert torch.equal(statistics(model), before)


@pytest.mark.parametrize("observe", ["before_step", "after_step"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_t11_one_update_per_step_however_the_batch_is_cut(accumulation: int, observe: str) -> None:
    whole, cut = (adapted(orthogonality=0.1, observe=observe, start="published") for _ in range(2))
    train(whole), train(cut, accumulation=accumulation)
    assert controller_of(cut).step == STEPS
    torch.testing.assert_close(statistics(cut), statistics(whole), rtol=1e-8, atol=1e-18)
    assert_equal_runs(cut, whole, rtol=1e-8)


@pytest.mark.parametrize("observe", ["before_step", "after_step"])
@pytest.mark.parametrize("make", [adamw, fused])
def test_loss_scaling_changes_nothing(make, observe: str) -> None:
    """Fused optimizers see scaled gradients before their step, and leave them unscaled behind."""
    plain, scaled = adapted(observe=observe), adapted(observe=observe)
    train(plain, make=make)
    train(scaled, make=make, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))
    torch.testing.assert_close(statistics(scaled), statistics(plain), rtol=1e-9, atol=0)
    assert_equal_runs(scaled, plain, rtol=1e-9)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_step_with_infinite_gradients_leaves_no_trace(scaled: bool) -> None:
    model = adapted()
    before = {}

    def spoil(step: int, model: nn.Module) -> None:
        if step == 2:
            before["statistics"] = statistics(model)
            for delta in controller_of(model).deltas:
                delta.lora_A0.grad[0, 0] = torch.inf

    scaler = torch.amp.GradScaler("cpu") if scaled else None
    if scaled:
        train(model, steps=3, before=spoil, scaler=scaler)
    else:
        with pytest.warns(UserWarning, match="non-finite gradient"):
            train(model, steps=3, before=spoil)
    assert torch.equal(statistics(model), before["statistics"])


def test_a_module_without_a_gradient_keeps_its_averages() -> None:
    model = adapted()
    before = {}

    def drop(step: int, model: nn.Module) -> None:
        if step == 2:
            delta = controller_of(model).deltas[0]
            before["statistics"] = delta.statistics[0].clone()
            for p in delta.parameters():
                p.grad = None

    train(model, steps=3, before=drop)
    first, second = controller_of(model).deltas[:2]
    assert torch.equal(first.statistics[0], before["statistics"]) and second.statistics[0].any()
    train(adapted(), before=drop)  # and the run goes on to its end


def test_half_precision_weights_are_scored_in_float32() -> None:
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(toy_network().bfloat16(), AdaLoraConfig(**SCHEDULE), autocast_adapter_dtype=False)
    optimizer = SGD(trainable(model), lr=0.1)
    for [(x, y)] in toy_batches(1, STEPS, dtype=torch.bfloat16):
        toy_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert statistics(model).dtype == torch.float32
    assert {p.dtype for p in entries(model).values()} == {torch.bfloat16}
    assert rank_summary(model).active == 12


# -- cost --------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of all torch operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_between_cuts_a_few_calls_serve_all_modules_and_none_waits_for_the_device() -> None:
    model = adapted(observe="after_step")
    train(model, steps=6)
    pruner = controller_of(model).rules[0]
    with Calls() as observing:
        assert pruner.after_step(6) == []
    computing = [name for name in observing.names if "detach" not in name]
    assert len(computing) == 6, computing
    train(model, start=6)
    with Calls() as settled:
        pruner.after_step(STEPS)
    assert [name for name in settled.names if "detach" not in name] == ["aten._foreach_mul_.List"]
    assert not any("_local_scalar" in name or "nonzero" in name for name in observing.names + settled.names)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_target_above_the_start_is_refused_before_the_model_changes() -> None:
    network = toy_network()
    with pytest.raises(BudgetError, match="the budget of 90 ranks is above the start of 31"):
        get_peft_model(network, AdaLoraConfig(total_ranks=90, init_r=6, target_modules=["up", "down"]))
    with pytest.raises(BudgetError, match="the budget of 48 ranks is above the start of 38"):  # 3 outputs, 5 inputs
        get_peft_model(network, AdaLoraConfig(r=8, target_modules=["up", "down"]))
    assert type(network.blocks[0].up) is nn.Linear


@pytest.mark.parametrize("options", [
    {"warmup_steps": 15, "settle_steps": 5}, {"warmup_steps": 0.6, "settle_steps": 0.5}, {"settle_steps": 20},
])  # fmt: skip
def test_phases_that_overlap_are_refused_at_the_first_step(options: dict) -> None:
    model = adapted(**options)
    with pytest.raises(ScheduleError, match=r"warmup_steps.*settle_steps.*run of 20 steps"):
        train(model, steps=1)


def test_adapters_whose_names_contain_each_other_do_not_mix() -> None:
    model = adapted()
    model.add_adapter("default2", AdaLoraConfig(**SCHEDULE | {"seed": 5}))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".default2." in n}
    attach(model, optimizer := adamw(trainable(model)))
    train(model, optimizer=optimizer)
    assert before and all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert rank_summary(model, "default").active == 12 and rank_summary(model, "default2").active == 18
