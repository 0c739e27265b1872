"""LoRA-Mini against its naive twin: every step, float64."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from increlora import LoraMiniConfig
from tests.reference.naive_lora_mini import NaiveMini
from tests.reference.toy import toy_batches, toy_loss, toy_network

STEPS = 220
TARGETS = ["blocks.0.up", "blocks.1.down", "blocks.2.up"]  # 7 → 12, 9 → 5, 5 → 14: odd, wider and narrower
SETTINGS = {"r": 1, "inner_in": 4, "inner_out": 5, "lora_alpha": 3, "init_lora_weights": False}


def adamw(model: nn.Module) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def sgd(model: nn.Module) -> SGD:
    return SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> float:
    torch.manual_seed(len(batches) + int(1e6 * batches[0][0][0, 0].abs()))  # the same dropout masks
    total = 0.0
    for x, y in batches:
        loss = toy_loss(model(x), y) / len(batches)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("options", [
    {"forward": "composed"}, {"forward": "sequential"}, {"forward": "auto", "lora_dropout": 0.2},
    {"forward": "composed", "r": 2, "init": "official_aux", "lora_alpha": 0.1}, {"r": 2, "init": "orthonormal"},
], ids=str)  # fmt: skip
def test_every_step_equals_the_naive_one(options: dict, make) -> None:
    ours = get_peft_model(toy_network(), LoraMiniConfig(target_modules=TARGETS, **SETTINGS | options))
    theirs, pairs = toy_network(), []
    for name in TARGETS:
        delta = ours.base_model.model.get_submodule(name).delta("default")
        factors = delta.lora_aux_A, delta.lora_A0, delta.lora_B0, delta.lora_aux_B
        twin = NaiveMini(theirs.get_submodule(name), delta.scale * delta.rank, *factors)
        twin.dropout.p = options.get("lora_dropout", 0.0)
        theirs.set_submodule(name, twin)
        pairs.append((delta, twin))
    frozen = [t.clone() for delta, _ in pairs for t in delta.buffers()]
    optimizers, losses = (make(ours), make(theirs)), []
    for batches in toy_batches(3, STEPS, accumulation=2):
        found = [step_once(m, o, batches) for m, o in zip((ours, theirs), optimizers, strict=True)]
        assert found[0] == pytest.approx(found[1], rel=1e-10)
        losses.append(found[0])
    assert abs(losses[0] - losses[-1]) > 1e-3
    for delta, twin in pairs:
        torch.testing.assert_close(delta.lora_A0, twin.A, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(delta.lora_B0, twin.B, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(delta.weight(), twin.delta_weight(), rtol=1e-9, atol=1e-10)
    assert all(map(torch.equal, frozen, [t for delta, _ in pairs for t in delta.buffers()]))
