"""Steps that the optimizer does not finish: whoever catches the exception and tries again gets the run without it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from increlora.runtime import controllers_of
from tests.contract.test_contracts import (
    ROWS,
    STEPS,
    Row,
    backward,
    batch,
    each,
    finished,
    optimizer_of,
    ranks,
    same_tensors,
    train,
)

Retry = Callable[[PeftModel, torch.optim.Optimizer, int], None]


driven_rows = each([row for row in ROWS if row.adaptive])


class OutOfMemory(Exception):
    """What an optimizer may raise in the middle of a run."""


def raise_out_of_memory(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    raise OutOfMemory


def same_gradients(model: PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The step again, on what is in `.grad`."""


def cleared(model: PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """All of it again: the first attempt was made on the gradients of another batch."""
    optimizer.zero_grad()
    backward(model, step)


def cleared_late(model: PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The same in the order that many loops have."""
    x, y = batch(step)
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()


def train_failing(row: Row, retry: Retry) -> PeftModel:
    """A run in which every step fails once, before anything has moved."""
    model = row.build()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        backward(model, step if retry is same_gradients else step + 40)
        hook = optimizer.register_step_pre_hook(raise_out_of_memory)  # it runs behind our own
        with pytest.raises(OutOfMemory):
            optimizer.step()
        hook.remove()
        retry(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_as_if_nothing_had_happened(row: Row, model: PeftModel) -> None:
    expected_ranks, expected = finished(row)
    assert ranks(model) == expected_ranks
    assert same_tensors(get_peft_model_state_dict(model), expected)


@driven_rows
@pytest.mark.parametrize("retry", [same_gradients, cleared, cleared_late])
def test_a_step_that_failed_and_is_tried_again_counts_once(row: Row, retry: Retry) -> None:
    assert_as_if_nothing_had_happened(row, train_failing(row, retry))


@driven_rows
@pytest.mark.filterwarnings("ignore:non-finite gradient")
def test_a_bad_step_that_failed_is_one_bad_step(row: Row) -> None:
    model = row.build()
    optimizer = optimizer_of(model)
    hook = optimizer.register_step_pre_hook(raise_out_of_memory)
    backward(model, 0)
    next(p.grad for p in model.parameters() if p.grad is not None).fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            optimizer.step()
    hook.remove()
    optimizer.step()
    (controller,) = controllers_of(model)
    assert (controller.health.skipped, controller.step) == (1, 1)


class Derived(torch.optim.AdamW):
    """A subclass of an optimizer that is in use itself: torch runs the hooks for both `step` methods."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@driven_rows
@pytest.mark.filterwarnings("ignore:the birth learning rate is exact")
@pytest.mark.parametrize("closure", [False, True])
def test_an_optimizer_that_calls_the_step_of_its_base_class_steps_once(row: Row, closure: bool) -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from now on its `step` has hooks
    model = row.build()
    optimizer = Derived([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.1)
    for step in range(STEPS):
        if closure:
            optimizer.step(lambda step=step: backward(model, step))
        else:
            backward(model, step)
            optimizer.step()
        optimizer.zero_grad()
    assert_as_if_nothing_had_happened(row, model)


@driven_rows
def test_a_checkpoint_loaded_after_a_step_that_failed_is_where_the_run_goes_on(row: Row) -> None:
    """torch's loader steps once itself, with a fresh optimizer: not in place of the step that was never taken."""
    first, stop = row.build(), 9
    optimizer = optimizer_of(first)
    for _ in train(first, optimizer, stop=stop):
        pass
    weights = copy.deepcopy(first.state_dict())
    states = copy.deepcopy(get_optimizer_state_dict(first, optimizer))
    for _ in train(first, optimizer, start=40, stop=41):
        pass
    backward(first, 41)  # and then the optimizer fails
    optimizer.zero_grad()
    first.load_state_dict(weights, strict=False)
    optimizer = optimizer_of(first)
    set_optimizer_state_dict(first, optimizer, states, options=StateDictOptions(strict=False))
    for _ in train(first, optimizer, start=stop):
        pass
    assert_as_if_nothing_had_happened(row, first)
