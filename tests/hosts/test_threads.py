"""Threads: one adapter is trained by one at a time, and what differs may be trained side by side."""

import threading
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from increlora.errors import DriveError
from tests.catalogue import CATALOGUE, STEPS, Row
from tests.hosts.tiny import adapter_only, build_llama, inputs_for

every_method = pytest.mark.parametrize("row", CATALOGUE, ids=str)


def build(row: Row) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = get_peft_model(build_llama(), row.config()).train()
    return model, torch.optim.AdamW(adapter_only(model), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for step in range(steps):
        output = model(**inputs_for("llama")).logits
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(output, target).backward()
        optimizer.step()
        optimizer.zero_grad()


def halted(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[threading.Thread, Callable[[], None]]:
    """A thread in the midst of a backward pass, and what lets it go on to its step."""
    reached, go = threading.Event(), threading.Event()

    def step() -> None:
        output = model(**inputs_for("llama")).logits
        output.register_hook(lambda grad: (reached.set(), go.wait(60), None)[2])
        output.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    thread = threading.Thread(target=step)
    thread.start()
    assert reached.wait(60)

    def release() -> None:
        go.set()
        thread.join()

    return thread, release


@every_method
def test_a_second_thread_that_trains_the_same_adapter_is_refused(row: Row) -> None:
    model, optimizer = build(row)
    train(model, optimizer, 1)
    _, release = halted(model, optimizer)
    try:
        with torch.no_grad():
            model(**inputs_for("llama"))
        with pytest.raises(DriveError, match=r"q_proj: two threads train this adapter at once.*torch.no_grad"):
            model(**inputs_for("llama"))
    finally:
        release()
    train(model, optimizer, 1)  # now it is this thread's turn


@every_method
def test_threads_that_take_turns_are_no_two_at_once(row: Row) -> None:
    """Workers of a pool: one trains the adapter, then another model, while another worker goes on with the adapter."""
    (model, optimizer), (other, others) = build(row), build(row)
    straight, its = build(row)
    thread = threading.Thread(target=train, args=(model, optimizer, 3))
    thread.start()
    thread.join()
    _, release = halted(other, others)
    try:
        train(model, optimizer, STEPS - 3)
    finally:
        release()
    train(straight, its, 3)
    train(straight, its, STEPS - 3)
    assert equal(model, straight)


def test_the_thread_that_has_trained_an_adapter_may_train_another_meanwhile() -> None:
    (model, optimizer), (other, others) = build(CATALOGUE[0]), build(CATALOGUE[0])
    begin = threading.Event()

    def work() -> None:
        train(model, optimizer, 2)
        begin.set()
        train(other, others, STEPS)

    thread = threading.Thread(target=work)
    thread.start()
    assert begin.wait(60)
    train(model, optimizer, STEPS - 2)
    thread.join()
    assert optimizer.state and others.state


@every_method
def test_two_threads_with_a_model_each_do_what_they_do_alone(row: Row) -> None:
    runs, (straight, its) = [build(row), build(row)], build(row)
    threads = [threading.Thread(target=train, args=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    train(straight, its)
    assert all(equal(model, straight) for model, _ in runs)


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
