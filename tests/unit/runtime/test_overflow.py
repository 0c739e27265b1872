"""Steps under a loss scale, and steps whose gradients are not finite."""

import warnings
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn

from increlora import IncreLoraConfig, attach
from increlora.deltas import Status
from increlora.errors import NonFiniteError
from increlora.runtime.health import LIMIT, Health
from tests.reference.loop import adamw, controller_of, fused, trainable
from tests.reference.toy import toy_batches, toy_loss, toy_network
from tests.unit.runtime.test_steps import SCHEDULE, STEPS, adapted, assert_equal_runs, live, scores, straight, train

__all__ = ["straight"]  # a fixture

# -- loss scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["delta", "signed"])
@pytest.mark.parametrize("make", [adamw, fused])
def test_loss_scaling_changes_no_decision(make, score):
    """Scales are powers of two, so even the bits agree; the scale doubles every third step."""
    plain, scaled = adapted(score=score), adapted(score=score)
    train(plain, make=make)
    train(scaled, make=make, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))
    assert_equal_runs(scaled, plain, rtol=1e-9)


def overflow_at(*steps: int) -> Callable[[int, nn.Module], None]:
    def spoil(step: int, model: nn.Module) -> None:
        if step in steps:
            controller_of(model).deltas[2].lora_B0.grad[0, 0] = torch.inf

    return spoil


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", ["mean", "last", "exact"])
@pytest.mark.parametrize("make", [adamw, fused])
def test_overflow_steps_leave_no_trace(make, how, accumulation):
    """The run is the one that never saw the batches that overflowed: first of all, before and at an event."""
    left_out = (0, 5, 8)
    model = adapted(score_accumulation=how)
    controller, optimizer = train(
        model, make=make, accumulation=accumulation, before=overflow_at(*left_out),
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
    )  # fmt: skip
    assert controller.step == STEPS - len(left_out) == len(controller.records)
    assert controller.health.skipped == 0

    twin = adapted(score_accumulation=how)
    other = make(trainable(twin))
    attach(twin, other, record=True)
    for step, [(x, y)] in enumerate(toy_batches(1, STEPS)):
        if step not in left_out:
            other.zero_grad()
            for part in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
                (toy_loss(twin(part[0]), part[1]) / accumulation).backward()
            other.step()
    assert_equal_runs(model, twin, rtol=1e-9)
    idle = [p for delta in controller.deltas for p in delta.frozen_parameters() if p is not None]
    dormant = [p for d in controller.deltas for i in d.indices(Status.DORMANT) for p in d.block(i).values()]
    assert idle and dormant and not any(p in optimizer.state for p in dormant)


def test_a_batch_the_user_drops_leaves_no_trace(straight):
    """backward, a look at the loss, zero_grad, next batch: nothing of it is in the scores."""
    model = adapted()
    optimizer = adamw(trainable(model))
    attach(model, optimizer, record=True)
    bad = toy_batches(7, 1)[0][0]
    for [(x, y)] in toy_batches(1, STEPS):
        toy_loss(model(bad[0]), bad[1]).backward()
        optimizer.zero_grad()
        toy_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_runs(model, straight)


# -- non-finite --------------------------------------------------------------------------------------------------------


def nan_at(*steps: int) -> Callable[[int, nn.Module], None]:
    def spoil(step: int, model: nn.Module) -> None:
        if step in steps:
            for p in trainable(model):
                if p.grad is not None:
                    p.grad.mul_(torch.nan)

    return spoil


@pytest.mark.filterwarnings("ignore:non-finite gradient")
def test_non_finite_steps_move_nothing_and_are_not_scored():
    model = adapted()
    ends: dict[int, dict] = {}

    def spoil(step: int, model: nn.Module) -> None:
        controller = controller_of(model)
        ends[step] = live(model) | {
            "I": controller.rules[0].averages[:, 0].clone(),
            "U": controller.rules[0].averages[:, 1].clone(),
        }
        nan_at(2, 7)(step, model)

    controller, _ = train(model, before=spoil)
    assert controller.health.skipped == 2 and controller.step == STEPS and controller.finished
    for step in (2, 7):
        assert controller.records[step]["modules"][controller.names[0]]["score"] is None or (
            scores(controller)[step].isnan().all()
        )
        common = ends[step].keys() & ends[step + 1].keys()
        torch.testing.assert_close(
            {k: ends[step + 1][k] for k in common}, {k: ends[step][k] for k in common}, rtol=0, atol=0
        )
    assert not torch.equal(ends[3]["I"], ends[4]["I"])
    assert all(p.isfinite().all() for p in trainable(model))


@pytest.mark.filterwarnings("ignore:non-finite gradient")
def test_non_finite_steps_move_no_head_either():
    """Clipping by a norm that is NaN makes every gradient NaN: whatever the optimizer holds stays where it is."""
    model = get_peft_model(
        toy_network(), IncreLoraConfig(**SCHEDULE | {"target_modules": ["up"]}, modules_to_save=["down"])
    )
    optimizer = adamw(trainable(model))
    head = next(p for n, p in model.named_parameters() if "modules_to_save" in n)
    before = head.detach().clone()
    x, y = toy_batches(1, 1)[0][0]
    toy_loss(model(x * torch.nan), y).backward()
    nn.utils.clip_grad_norm_(trainable(model), 1.0)
    optimizer.step()
    assert torch.equal(head, before) and controller_of(model).health.skipped == 1
    optimizer.zero_grad()
    toy_loss(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(head, before) and head.isfinite().all()


def test_non_finite_steps_are_reported_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller, _ = train(adapted(), before=nan_at(1, 4, 9))
    assert [w for w in caught if "non-finite gradient at blocks.0.up" in str(w.message)].__len__() == 1
    assert controller.health.skipped == 3


@pytest.mark.filterwarnings("ignore:non-finite gradient")
def test_nothing_but_non_finite_steps_stops_the_run():
    seen: list[int] = []

    def spoil(step: int, model: nn.Module) -> None:
        seen.append(step)
        nan_at(*range(3, 99))(step, model)

    with pytest.raises(NonFiniteError, match=f"{LIMIT} steps in a row.*learning rate"):
        train(adapted(), steps=60, before=spoil)
    assert len(seen) == 3 + LIMIT


@pytest.mark.filterwarnings("ignore:non-finite gradient")
def test_a_good_step_starts_the_count_anew():
    bad = [*range(0, LIMIT - 1), *range(LIMIT, 2 * LIMIT - 1)]
    controller, _ = train(adapted(), steps=2 * LIMIT, before=nan_at(*bad))
    assert controller.health.skipped == 2 * (LIMIT - 1)


@pytest.mark.filterwarnings("ignore:non-finite gradient")
def test_where_waiting_is_dear_the_verdict_is_read_later():
    """On an accelerator: counted on the device, fetched every LIMIT steps, and the run still stops."""
    health, good, bad = Health(), torch.tensor(True), torch.tensor(False)
    for finite in [bad, good, bad]:
        assert health.judge(finite, "m", at_once=False)
    assert health.skipped == 0
    health.read()
    assert (health.skipped, health.in_a_row) == (2, 1)
    health.read()
    assert health.skipped == 2
    with pytest.raises(NonFiniteError):
        for _ in range(2 * LIMIT):
            health.judge(bad, "m", at_once=False)
