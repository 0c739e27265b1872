"""Who holds whom: weak references, several models and adapters in one process, copies, and the loader's fake step."""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)  # fmt: skip
from torch.optim import AdamW

from increlora import IncreLoraConfig, attach
from increlora.deltas import Status
from increlora.errors import DriveError
from increlora.runtime import controllers_of
from increlora.runtime.attach import _controllers
from tests.reference.toy import toy_batches, toy_loss
from tests.unit.runtime.test_steps import (
    SCHEDULE,
    STEPS,
    adamw,
    adapted,
    assert_equal_runs,
    controller_of,
    live,
    straight,
    train,
    trainable,
)  # fmt: skip

__all__ = ["straight"]  # a fixture


# -- weak references ---------------------------------------------------------------------------------------------------


def test_a_deleted_model_takes_its_controller_along():
    model = adapted()
    _, optimizer = train(model, steps=6)
    gone = [weakref.ref(controller_of(model)), weakref.ref(model)]
    others = trainable(nn.Linear(2, 2))
    del model, optimizer, _
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    optimizer = AdamW(others)
    others[0].grad = torch.ones_like(others[0])
    before = others[0].detach().clone()
    optimizer.step()
    assert not torch.equal(others[0], before)


def test_a_deleted_optimizer_makes_room():
    model = adapted()
    _, optimizer = train(model, steps=2)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None, "the controller must not keep an optimizer alive"
    controller, _ = train(model)
    assert controller.finished and controller.step == STEPS


def test_a_rank_born_under_a_deleted_optimizer_goes_on_learning():
    model = adapted(birth_warmup=4)
    train(model, steps=8)
    gc.collect()
    controller = controller_of(model)
    born = next(d for d in controller.deltas if d.rank > 1)
    before = born.lora_A1.detach().clone()
    train(model, steps=10)
    assert max(born.state.born) <= 10 and not torch.equal(born.lora_A1, before)


# -- several of them ---------------------------------------------------------------------------------------------------


def test_two_models_with_their_own_optimizers(straight):
    """Interleaved step by step, each does what it does alone."""
    one, two = adapted(), adapted(top_h=1, seed=5, interval_steps=1)
    optimizers = [adamw(trainable(one)), adamw(trainable(two))]
    for model, optimizer in zip((one, two), optimizers):
        attach(model, optimizer, record=True)
    for [(x, y)] in toy_batches(1, STEPS):
        for model, optimizer in zip((one, two), optimizers):
            optimizer.zero_grad()
            toy_loss(model(x), y).backward()
            optimizer.step()
    alone = adapted(top_h=1, seed=5, interval_steps=1)
    train(alone)
    assert_equal_runs(one, straight)
    assert_equal_runs(two, alone)


def test_one_optimizer_for_two_models(straight):
    one, two = adapted(), adapted(seed=5)
    optimizer = adamw([*trainable(one), *trainable(two)])
    for model in (one, two):
        attach(model, optimizer, record=True)
    for [(x, y)] in toy_batches(1, STEPS):
        optimizer.zero_grad()
        (toy_loss(one(x), y) + toy_loss(two(x), y)).backward()
        optimizer.step()
    alone = adapted(seed=5)
    train(alone)
    assert_equal_runs(one, straight)
    assert_equal_runs(two, alone)


def test_controllers_are_visited_in_the_order_of_their_making():
    """Processes average scores one controller after another: the order must be the same everywhere."""
    models = [adapted() for _ in range(8)]
    mine = [controller_of(m) for m in models]
    assert [c for c in _controllers.values() if any(c is m for m in mine)] == mine


def test_two_trainable_adapters():
    """Each grows to its own budget, by its own schedule, under one optimizer."""
    model = get_peft_model(adapted().unload(), IncreLoraConfig(**SCHEDULE), adapter_name="one")
    model.add_adapter("two", IncreLoraConfig(**SCHEDULE | {"r": 3, "interval_steps": 1, "top_h": 3}))
    model.base_model.set_adapter(["one", "two"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    optimizer = adamw(trainable(model))
    with pytest.raises(DriveError, match="2 trainable adaptive adapters"):
        attach(model, optimizer)
    for [(x, y)] in toy_batches(1, STEPS):
        optimizer.zero_grad()
        toy_loss(model(x), y).backward()
        optimizer.step()
    a, b = controllers_of(model)
    assert (sum(a.ranks.values()), sum(b.ranks.values())) == (12, 18)
    assert a.step == b.step == STEPS and a.events[0].step == b.events[0].step == 4


def test_an_adapter_that_rests_is_not_driven():
    model = get_peft_model(adapted().unload(), IncreLoraConfig(**SCHEDULE), adapter_name="one")
    model.add_adapter("two", IncreLoraConfig(**SCHEDULE))
    model.set_adapter("two")
    optimizer = adamw([p for n, p in model.named_parameters() if "lora_" in n])
    for [(x, y)] in toy_batches(1, STEPS):
        optimizer.zero_grad()
        toy_loss(model(x), y).backward()
        optimizer.step()
    a, b = controllers_of(model)
    assert (a.step, sum(a.ranks.values())) == (0, 6) and (b.step, sum(b.ranks.values())) == (STEPS, 12)


def test_a_copy_is_not_driven_by_chance():
    model = adapted()
    train(model, steps=5)
    twin = copy.deepcopy(model)
    x, y = toy_batches(1, 1)[0][0]
    assert torch.equal(twin(x), model(x))
    with pytest.raises(DriveError, match="attach"):
        toy_loss(twin(x), y).backward()
    for p in trainable(twin):
        p.grad = None
    optimizer = adamw(trainable(twin))
    attach(twin, optimizer)
    toy_loss(twin(x), y).backward()
    optimizer.step()
    assert controller_of(twin) is not controller_of(model) and controller_of(model).step == 5


# -- the checkpoint loader's fake step ---------------------------------------------------------------------------------


def dormant(model: nn.Module) -> list[nn.Parameter]:
    return [p for d in controller_of(model).deltas for i in d.indices(Status.DORMANT) for p in d.block(i).values()]


def snapshot(model: nn.Module) -> dict:
    controller = controller_of(model)
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "step": controller.step, "ranks": dict(controller.ranks), "events": len(controller.events),
        "status": [list(map(int, d.state.status)) for d in controller.deltas],
        "averages": [values.clone() for values in controller.rules[0].statistics()],
        "driven": controller.driven, "skipped": controller.health.skipped,
    }  # fmt: skip


LOOSE = StateDictOptions(strict=False)  # dormant blocks have no state to load


@pytest.mark.parametrize("used", ["never", "driven by another optimizer"])
def test_a_fake_step_invents_nothing_and_disturbs_nothing(used):
    model = adapted()
    if used != "never":
        _, old = train(model, steps=6)
        old.zero_grad()
    before = snapshot(model)
    optimizer = adamw(trainable(model))
    saved = get_optimizer_state_dict(model, optimizer)  # a fresh optimizer: this is the fake step
    assert len(optimizer.state) > 0, "the loader did invent states for blocks that may move"
    assert dormant(model) and not any(p in optimizer.state for p in dormant(model))
    assert not any("lora_A3" in name for name in saved["state"])
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)


def test_a_run_resumed_by_the_distributed_checkpoint_equals_the_straight_one(straight):
    """Saved after a few steps, loaded into a fresh model and a fresh optimizer, trained on."""
    stop = 7
    first = adapted(total_steps=STEPS)
    _, optimizer = train(first, steps=stop)
    weights, states = copy.deepcopy(first.state_dict()), get_optimizer_state_dict(first, optimizer)
    states = copy.deepcopy(states)

    second = adapted(total_steps=STEPS)
    second.load_state_dict(weights)
    fresh = adamw(trainable(second))
    set_optimizer_state_dict(second, fresh, states, options=LOOSE)
    assert dormant(second) and not any(p in fresh.state for p in dormant(second))
    for [(x, y)] in toy_batches(1, STEPS)[stop:]:
        fresh.zero_grad()
        toy_loss(second(x), y).backward()
        fresh.step()
    assert controller_of(second).step == STEPS
    torch.testing.assert_close(live(second), live(straight), rtol=0, atol=0)
    assert controller_of(second).ranks == controller_of(straight).ranks
