"""Parameters that are frozen while a run goes on: what is refused, and what people may do."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from increlora import IncreLoraConfig, rank_summary
from increlora.deltas import Status
from increlora.errors import DriveError
from increlora.runtime import controllers_of
from tests.contract.test_contracts import (
    METHODS,
    ROWS,
    STEPS,
    TARGETS,
    Row,
    backward,
    each,
    finished,
    optimizer_of,
    ranks,
    same_state,
    train,
    trained,
)
from tests.hosts.tiny import Mlp, seeded

driven_rows = each([row for row in ROWS if row.name in METHODS and row.adaptive])


def factors(model: nn.Module, part: str = "lora_") -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if part in name]


def freeze(parameters: list[nn.Parameter], frozen: bool = True) -> None:
    for p in parameters:
        p.requires_grad_(not frozen)


def begun(row: Row, steps: int) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A run that also trains the last layer's bias, so that there is a gradient whatever is frozen."""
    model = row.build()
    optimizer = optimizer_of(model)
    biases = factors(model, "base_layer.bias")
    freeze(biases, False)
    optimizer.add_param_group({"params": biases, "lr": 0.0, "weight_decay": 0.0})
    for _ in train(model, optimizer, stop=steps):
        pass
    return model, optimizer


@driven_rows
def test_an_adapter_that_is_frozen_in_mid_run_is_refused_at_the_step(row: Row) -> None:
    model, optimizer = begun(row, 5)
    freeze(factors(model))
    backward(model, 5)
    with pytest.raises(DriveError, match=r"frozen at step 5, before its ranks are decided.*set_adapter"):
        optimizer.step()
    optimizer.zero_grad()
    freeze(factors(model), False)  # as the error says
    for _ in train(model, optimizer, start=5):
        pass
    assert same_state(model, begun(row, STEPS)[0])


@driven_rows
def test_the_rest_may_be_trained_by_an_optimizer_of_its_own(row: Row) -> None:
    model, _ = begun(row, 5)
    freeze(factors(model))
    for _ in train(model, torch.optim.SGD(factors(model, "base_layer.bias"), lr=0.1), start=5, stop=8):
        pass
    assert controllers_of(model)[0].step == 5


@driven_rows
def test_what_is_decided_may_be_frozen(row: Row) -> None:
    model, optimizer = begun(row, STEPS)
    freeze(factors(model))
    for _ in train(model, optimizer, stop=3):
        pass
    assert ranks(model) == finished(row)[0]


@driven_rows
def test_a_look_at_the_frozen_adapter_between_two_steps_changes_nothing(row: Row) -> None:
    """With gradients of something else enabled, as for adversarial examples."""
    model = row.build()
    optimizer = optimizer_of(model)
    for step in train(model, optimizer):
        if step in (4, 9):
            freeze(factors(model))
            model(torch.ones(5, 8, dtype=torch.float64, requires_grad=True)).sum().backward()
            freeze(factors(model), False)
    assert same_state(model, trained(row, STEPS))


@driven_rows
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_E", "lora_M"])
@pytest.mark.parametrize("when", [0, 5])
def test_one_factor_may_be_frozen_and_the_budget_is_met(row: Row, part: str, when: int) -> None:
    model = row.build()
    if len({name.split("lora_")[-1][0] for name, _ in model.named_parameters() if "lora_" in name}) == 1:
        pytest.skip("it has one factor alone")
    optimizer = optimizer_of(model)
    for _ in train(model, optimizer, stop=when):
        pass
    freeze(factors(model, part))
    for _ in train(model, optimizer, start=when):
        pass
    assert (controllers_of(model)[0].step, sum(ranks(model).values())) == (STEPS, sum(finished(row)[0].values()))


@pytest.mark.parametrize("when", [0, 4])
def test_a_rank_born_frozen_is_refused_at_the_step(when: int) -> None:
    """Whoever freezes what has no gradient yet would grow ranks that never learn."""
    row = next(row for row in ROWS if row.name == "increlora")
    model = row.build()
    optimizer = optimizer_of(model)
    for _ in train(model, optimizer, stop=when):
        pass
    (controller,) = controllers_of(model)
    waiting = [delta.block(i) for delta in controller.deltas for i in delta.indices(Status.DORMANT)]
    freeze([p for block in waiting for p in block.values()])
    with pytest.raises(DriveError, match=r"block \d was born after step \d+, but is frozen"):
        for _ in train(model, optimizer, start=when):
            pass
    assert rank_summary(model).active < sum(finished(row)[0].values())


def test_two_adapters_that_take_turns_under_one_optimizer_each_meet_their_budget() -> None:
    options = METHODS["increlora"].tiny("mlp", STEPS) | {"target_modules": TARGETS}
    model = get_peft_model(seeded(Mlp).double(), IncreLoraConfig(**options), adapter_name="one")
    model.add_adapter("two", IncreLoraConfig(**options | {"seed": 5}))
    optimizer = torch.optim.AdamW(factors(model), lr=0.03)
    for step in range(2 * STEPS):
        model.set_adapter("one" if step % 4 < 2 else "two")
        for _ in train(model, optimizer, start=step, stop=step + 1):
            pass
    for controller in controllers_of(model):
        assert controller.step == STEPS and controller.finished
