"""LoRA+ (peft.optimizers): a higher learning rate for B, also for the B of ranks that are born later."""

import re
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from increlora import (
    AdaLoraConfig,
    IncreLoraConfig,
    LoraMiniConfig,
    LortaConfig,
    MeLoraConfig,
    MoraConfig,
    PlainLoraConfig,
    PriLoraConfig,
    SoraConfig,
    attach,
    rank_summary,
)
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for
from tests.hosts.training import deltas

LINEARS = ["q_proj", "v_proj", "down_proj"]
ONE, PAIR, TRIPLET = (["M"], []), (["A"], ["B"]), (["A", "E"], ["B"])
# Which parameters have the learning rate, and which the higher one.
ROWS: list[tuple[type, dict[str, Any], tuple[list[str], list[str]]]] = [
    (PlainLoraConfig, {}, PAIR),
    (IncreLoraConfig, {"total_steps": 20}, TRIPLET),
    (AdaLoraConfig, {"total_steps": 20}, TRIPLET),
    (SoraConfig, {"total_steps": 20}, TRIPLET),
    (PriLoraConfig, {}, PAIR),
    (MeLoraConfig, {"minis": 2}, PAIR),
    (LoraMiniConfig, {"inner_in": 8, "inner_out": 8}, PAIR),
    (LortaConfig, {"target_modules": LINEARS[:2]}, (["A", "C_head", "C_layer", "C_matrix"], ["B"])),
    (IncreLoraConfig, {"total_steps": 20, "target_modules": ["embed_tokens", "q_proj"]}, TRIPLET),
    (MoraConfig, {}, ONE),  # it has no B: LoRA+ changes nothing
]


def loraplus(model: nn.Module, ratio: float, kind: type = torch.optim.AdamW, lr: float = 0.02) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, kind, lr=lr, loraplus_lr_ratio=ratio)


@pytest.mark.parametrize(("config_cls", "options", "expected"), ROWS)
def test_b_and_nothing_else_has_the_higher_rate(config_cls: type, options: dict, expected: tuple) -> None:
    model = get_peft_model(BUILDERS["llama"](), config_cls(**{"r": 3, "target_modules": LINEARS} | options))
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[float, set[str]] = {0.02: set(), 0.32: set()}
    held = 0
    for group in loraplus(model, 16).param_groups:
        held += len(group["params"])
        for p in group["params"]:
            found[group["lr"]].add(re.search(r"\.lora_(\w+?)\d*$", names[id(p)])[1])
    assert tuple(map(sorted, found.values())) == expected and held == len(adapter_only(model))


def growing() -> PeftModel:
    options = {"warmup_steps": 2, "interval_steps": 2, "birth_warmup": 4, "top_h": 3, "grow_by": 1}
    return get_peft_model(BUILDERS["llama"](), IncreLoraConfig(r=3, target_modules=LINEARS, **options))


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int = 14) -> None:
    attach(model, optimizer, total_steps=steps)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        target = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(model(**inputs_for("llama")).logits, target).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def test_with_ratio_one_it_is_one_group() -> None:
    """Bitwise, through growth, newborn ranks and a schedule; and with a higher ratio it is not."""
    plain, plus, faster = growing(), growing(), growing()
    train(plain, torch.optim.AdamW(adapter_only(plain), lr=0.02, weight_decay=0.0))
    train(plus, loraplus(plus, 1))
    train(faster, loraplus(faster, 8))
    assert all(torch.equal(p, q) for p, q in zip(adapter_only(plain), adapter_only(plus), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(adapter_only(plain), adapter_only(faster), strict=True))
    for model in (plain, plus, faster):
        assert rank_summary(model).active == rank_summary(model).budget_ranks


def test_newborns_ramp_up_to_the_rate_of_their_group() -> None:
    """Under SGD a step is −m · lr · gradient: m = 1/4, 2/4, … of each group's own rate while `birth_warmup` lasts."""
    model, rate, ratio = growing(), 0.02, 8
    optimizer = loraplus(model, ratio, torch.optim.SGD, rate)
    attach(model, optimizer, total_steps=14)
    seen = set()
    for step in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(**inputs_for("llama")).logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        born = {f"{delta.name}.{i}": at for delta in deltas(model) for i, at in enumerate(delta.state.born)}
        optimizer.step()
        optimizer.zero_grad()
        for name, gradient in gradients.items():
            module, letter, index = re.search(r"(model\.layers.*)\.lora_delta\.default\.lora_(\w)(\d+)", name).groups()
            at = born[f"{module}.{index}"]
            m = 1.0 if at < 0 else min(1.0, (step - at) / 4)
            moved = model.get_parameter(name).detach() - before[name]
            expected = -m * rate * (ratio if letter == "B" else 1) * gradient
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)
            seen.add((letter, m))
    assert {("B", 0.25), ("B", 0.5), ("B", 1.0)} <= seen
