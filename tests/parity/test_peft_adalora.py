"""peft's AdaLoRA and ours, side by side: 200 steps on the toy network from the same initial values.

peft does what ours does only where its known defects are kept away from, and so they are here:

* its penalty disappears without a task type: `base_model` is called, which adds it; it enters the loss in evaluation,
  too: what is compared are outputs;
* its allocator must be called by hand between `optimizer.step()` and `zero_grad()`, and its pattern exists only if the
  call at step total − tfinal is not missed;
* `ranknum`, a part of its scale, is trainable where the base model is not float32, so that an optimizer made from all
  that requires a gradient trains it: it is frozen here;
* equal ranks at start and end crash it, and saving or resuming in the middle loses triplets: neither is done.
"""

from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW

from increlora import AdaLoraConfig, attach
from tests.reference.toy import toy_batches, toy_loss, toy_network

STEPS, TARGETS = 200, ["up", "down"]


class WithLoss(nn.Module):
    """peft finds a loss only as an attribute of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.network = toy_network()

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        output = self.network(x)
        return SimpleNamespace(loss=toy_loss(output, y), output=output)


def peft_model(interval: int) -> nn.Module:
    config = PeftAdaLoraConfig(
        init_r=4, target_r=2, tinit=20, tfinal=60, deltaT=interval, total_step=STEPS, orth_reg_weight=0.1,
        lora_alpha=16, target_modules=TARGETS,
    )  # fmt: skip
    model = get_peft_model(WithLoss(), config)
    for name, p in model.named_parameters():
        if ".ranknum." in name:
            p.requires_grad_(False)
    return model


def our_model(interval: int) -> nn.Module:
    config = AdaLoraConfig.paper(
        2, init_r=4, warmup_steps=20, settle_steps=60, interval_steps=interval, orthogonality=0.1, lora_alpha=16,
        target_modules=TARGETS,
    )  # fmt: skip
    return get_peft_model(WithLoss(), config)


@pytest.mark.parametrize("interval", [1, 10])
def test_pefts_adalora_and_ours_agree(interval: int) -> None:
    torch.manual_seed(0)
    theirs, ours = peft_model(interval), our_model(interval)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.mul_(10)  # N(0, 0.2²): the network is small
    named = dict(theirs.base_model.model.named_parameters())
    optimizers = [AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (theirs, ours)]
    controller = attach(ours, optimizers[1], total_steps=STEPS)
    pairs = [
        (named[f"{name}.lora_{letter}.default"], p)
        for name, delta in zip(controller.names, controller.deltas, strict=True)
        for letter, p in delta.block(0).items()
    ]
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    for step, ((x, y),) in enumerate(toy_batches(0, STEPS)):
        found = [theirs.base_model(x, y), ours(x, y)]
        for output, optimizer in zip(found, optimizers, strict=True):
            output.loss.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.testing.assert_close(found[1].output, found[0].output, rtol=1e-5, atol=1e-7)
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in pairs), step
    pattern = theirs.peft_config["default"].rank_pattern
    for name, delta in zip(controller.names, controller.deltas, strict=True):
        assert list(delta.state.kept) == pattern[f"{name}.lora_E.default"]
    assert len(set(controller.ranks.values())) > 1
