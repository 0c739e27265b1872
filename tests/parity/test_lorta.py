"""LoRTA against the dense order-5 tensor, every step, float64: grouped queries and all orientations."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from increlora import LortaConfig
from increlora.structural.lorta.delta import TensorBank
from tests.reference.attention import AttentionNet
from tests.reference.naive_lorta import Factors, adapt
from tests.reference.toy import toy_loss

STEPS, LAYERS = 220, 2
GROUPED = {"width": 7, "heads": 4, "key_heads": 2, "head_dim": 3, "layers": LAYERS}
PLAIN = {"width": 8, "heads": 4, "key_heads": 4, "head_dim": 2, "layers": LAYERS}
SIDES = {
    "head_aligned": {"q": True, "k": True, "v": True, "o": False},
    "official_peft": dict.fromkeys("qkvo", False),
    "official_litgpt": dict.fromkeys("qkvo", True),
}


def network(sizes: dict) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return AttentionNet(**sizes).double().requires_grad_(False)


def batch(step: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(3, 5, width, generator=generator, dtype=torch.float64)
    return x, torch.sin(x @ torch.ones(width, 3, dtype=torch.float64))


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, width: int) -> float:
    torch.manual_seed(step)  # the same dropout masks
    x, y = batch(step, width)
    loss = toy_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def adamw(model: nn.Module) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def sgd(model: nn.Module) -> SGD:
    return SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


@pytest.mark.parametrize(("sizes", "r", "roles", "orientation", "dropout", "make"), [
    (GROUPED, 5, "qkvo", "head_aligned", 0.0, adamw),
    (GROUPED, 13, "qv", "head_aligned", 0.0, sgd),  # a subset; more ranks than any side has
    (GROUPED, 2, "ko", "head_aligned", 0.2, adamw),
    (PLAIN, 3, "qkvo", "official_peft", 0.0, adamw),
    (PLAIN, 3, "qkvo", "official_litgpt", 0.0, sgd),
])  # fmt: skip
def test_every_step_equals_the_dense_tensor(sizes, r, roles, orientation, dropout, make) -> None:
    ours = get_peft_model(network(sizes), LortaConfig(
        r=r, lora_alpha=5, lora_dropout=dropout, target_modules=[f"{role}_proj" for role in roles], heads=4,
        head_dim=sizes["head_dim"], orientation=orientation, init_lora_weights=False, seed=3,
    ))  # fmt: skip
    (bank,) = (m for m in ours.modules() if isinstance(m, TensorBank))
    sides = {role: SIDES[orientation][role] for role in roles}
    theirs = adapt(
        network(sizes), Factors(*bank.parameters()), 5, key_heads=sizes["key_heads"], sides=sides, dropout=dropout
    )
    models = ours.train(), theirs.train()
    optimizers, losses, first = [make(m) for m in models], [0.0, 0.0], None
    for step in range(STEPS):
        losses = [step_once(m, o, step, sizes["width"]) for m, o in zip(models, optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        first = first or losses[0]
    assert losses[0] != first
    for mine, other in zip(bank.parameters(), theirs.factors.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)
    unused = [m for m, role in enumerate("qkvo") if role not in roles]
    if make is sgd and unused:  # rows that no module uses have gradient zero; AdamW decays them
        assert torch.equal(bank.lora_C_matrix[unused], as_drawn(r)[unused])


def as_drawn(r: int) -> Tensor:
    """C_matrix as it was drawn."""
    config = LortaConfig(r=r, heads=4, head_dim=3, seed=3, target_modules=["q_proj"])
    model = get_peft_model(network(GROUPED), config)
    return next(m for m in model.modules() if isinstance(m, TensorBank)).lora_C_matrix.detach()
