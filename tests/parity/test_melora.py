"""MELoRA against its naive twin, and with one mini adapter against LoRA: every step, float64."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from increlora import MeLoraConfig, PlainLoraConfig
from tests.reference.official_melora import OfficialMeLora, adapt
from tests.reference.toy import gaussian_initial, toy_loss

STEPS = 220


class Net(nn.Module):
    """Wider, narrower, square; every size a multiple of 12."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(12, 36), nn.Linear(36, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.down(torch.tanh(self.up(x)))))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Net().double().requires_grad_(False)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64)
    return x, torch.sin(x @ torch.ones(12, 24, dtype=torch.float64))


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    torch.manual_seed(step)  # the same dropout masks
    x, y = batch(step)
    loss = toy_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def adamw(model: nn.Module) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def sgd(model: nn.Module) -> SGD:
    return SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize(("minis", "r", "dropout"), [(2, 3, 0.0), (4, 1, 0.0), (12, 2, 0.0), (3, 2, 0.2)])
def test_every_step_equals_the_naive_loop(minis: int, r: int, dropout: float, make) -> None:
    targets = ["up", "down", "last"]
    initial = gaussian_initial(seed=4, std=0.3)
    theirs = adapt(network(), targets, initial, minis=minis, r=r, alpha=5)
    ours = get_peft_model(network(), MeLoraConfig(
        r=r, minis=minis, lora_alpha=5, lora_dropout=dropout, target_modules=targets,
    ))  # fmt: skip
    pairs = {}
    for name, layer in theirs.named_modules():
        if isinstance(layer, OfficialMeLora):
            layer.dropout.p = dropout
            delta = ours.base_model.model.get_submodule(name).delta("default")
            pairs[name] = delta, layer
    with torch.no_grad():
        for delta, layer in pairs.values():
            delta.lora_A0.copy_(torch.cat(list(layer.lora_A)))
            delta.lora_B0.copy_(torch.cat(list(layer.lora_B)))
    optimizers = make(ours), make(theirs)
    first = None
    for step in range(STEPS):
        losses = [step_once(m, o, step) for m, o in zip((ours, theirs), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        first = first or losses[0]
    assert losses[0] != first
    for delta, layer in pairs.values():
        torch.testing.assert_close(delta.lora_A0, torch.cat(list(layer.lora_A)), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(delta.lora_B0, torch.cat(list(layer.lora_B)), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(delta.weight(), layer.delta_weight(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_t8_one_mini_adapter_is_lora_to_the_bit(dropout: float) -> None:
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": dropout, "target_modules": ["up", "down", "last"], "seed": 7}
    ours, lora = (get_peft_model(network(), config) for config in (
        MeLoraConfig(minis=1, **options), PlainLoraConfig(**options),
    ))  # fmt: skip
    optimizers = adamw(ours), adamw(lora)
    for step in range(60):
        assert step_once(ours, optimizers[0], step) == step_once(lora, optimizers[1], step)
    found, expected = ours.state_dict(), lora.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    ours.merge_adapter()
    lora.merge_adapter()
    assert torch.equal(ours.base_model.model.up.base_layer.weight, lora.base_model.model.up.base_layer.weight)
