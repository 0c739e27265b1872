"""PRILoRA against its naive twin: every loss, tensor and norm at every step, in float64. There is no published code to
compare with; this pins the definition of docs/methods/prilora.md."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from increlora import PriLoraConfig, attach
from increlora.runtime import Controller
from tests.parity.test_official_adalora import Make, adamw, sgd
from tests.parity.test_official_increlora import set_initial
from tests.reference.naive_prilora import NaiveConfig, Step, run_naive
from tests.reference.toy import gaussian_initial, toy_batches, toy_loss, toy_network


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]
    naive: NaiveConfig
    make: Make = adamw
    accumulation: int = 1
    steps: int = 60


RAMP = {"r": 2, "first_r": 1.0, "interval_steps": 10}
CASES = [
    Case("adamw", RAMP, NaiveConfig((1, 2, 3)), steps=210),
    Case(  # at a scale where SGD is stable: rounding is not amplified
        "sgd, accumulation", {**RAMP, "lora_alpha": 1}, NaiveConfig((1, 2, 3), alpha=1.0), sgd, accumulation=3,
        steps=210,
    ),
    Case("at every step", {**RAMP, "interval_steps": 1}, NaiveConfig((1, 2, 3), interval=1)),
    Case("matrix", {**RAMP, "group": "matrix"}, NaiveConfig((1, 2, 3), by_row=False)),
    Case("zeros held", {**RAMP, "regrow": False}, NaiveConfig((1, 2, 3), hold=True), steps=210),
    Case("constant scale", {**RAMP, "scaling": "constant"}, NaiveConfig((1, 2, 3), constant_scale=True)),
    Case("other average", {**RAMP, "beta": 0.5}, NaiveConfig((1, 2, 3), beta=0.5)),
    Case("no average", {**RAMP, "beta": 0.0}, NaiveConfig((1, 2, 3), beta=0.0)),
    Case("other share", {**RAMP, "prune_share": 0.29, "lora_alpha": 3}, NaiveConfig((1, 2, 3), share=0.29, alpha=3.0)),
    Case("no ramp", {**RAMP, "first_r": 2.0}, NaiveConfig((2, 2, 2))),
    Case("the other way", {**RAMP, "total_ranks": 12, "first_r": 3.0}, NaiveConfig((3, 2, 1))),
]  # fmt: skip


def ours(case: Case, initial) -> Iterator[tuple[float, Controller]]:
    model = get_peft_model(toy_network(seed=0), PriLoraConfig(target_modules=["up", "down"], **case.options))
    set_initial(model, initial)
    optimizer = case.make(p for p in model.parameters() if p.requires_grad)
    controller = attach(model, optimizer)
    for micro_batches in toy_batches(0, case.steps, case.accumulation):
        total = 0.0
        for x, y in micro_batches:
            loss = toy_loss(model(x), y) / case.accumulation
            total += loss.item()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield total, controller


def close(ours: Tensor, theirs: Tensor) -> bool:
    """To 1e-10 of the tensor's largest entry."""
    return bool((ours - theirs).abs().max() <= 1e-10 * theirs.abs().max())


def check(t: int, controller: Controller, theirs: Step) -> None:
    for name, delta in zip(controller.names, controller.deltas, strict=True):
        for letter, p in delta.block(0).items():
            expected = theirs.tensors[f"{name}.lora_{letter}"]
            assert close(p.detach(), expected), (t, name, letter)
            assert torch.equal(p == 0, expected == 0), (t, name, letter)
        norms = torch.tensor(theirs.norms[name], dtype=torch.float64)
        assert close(delta.statistics[0][:-1], norms), (t, name)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_it_is_its_naive_twin(case: Case) -> None:
    initial = gaussian_initial(seed=1, std=0.2)
    trace = run_naive(case.naive, case.make, initial=initial, steps=case.steps, accumulation=case.accumulation)
    prunings = 0
    for t, (theirs, (loss, controller)) in enumerate(zip(trace, ours(case, initial), strict=True)):
        assert abs(loss - theirs.loss) <= 1e-10 * abs(theirs.loss), t
        check(t, controller, theirs)
        prunings += theirs.pruning
    assert prunings == case.steps // case.naive.interval
    assert tuple(controller.ranks[f"blocks.{i}.up"] for i in range(3)) == case.naive.ranks
