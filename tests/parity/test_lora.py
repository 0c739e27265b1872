"""The yardstick: our LoRA equals peft's, step by step, from equal initial values."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from transformers.pytorch_utils import Conv1D

from increlora import PlainLoraConfig
from tests.reference.toy import toy_batches, toy_loss, toy_network


def conv_network() -> nn.Module:
    """GPT-2's Conv1D stores its weight as (in, out)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(Conv1D(9, 7), nn.Tanh(), Conv1D(3, 9)).double()


@pytest.mark.parametrize("make", [lambda ps: AdamW(ps, lr=1e-2, weight_decay=0.1), lambda ps: SGD(ps, lr=0.1)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("network", [toy_network, conv_network], ids=["linear", "conv1d"])
@pytest.mark.parametrize("patterned", [False, True])
def test_lora_equals_pefts_lora_step_by_step(network, dropout: float, make, patterned: bool) -> None:
    targets = ["up", "down"] if network is toy_network else ["0", "2"]
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": dropout, "target_modules": targets}
    if patterned:
        options |= {"rank_pattern": {targets[0]: 2, ".*": 4}, "alpha_pattern": {targets[1]: 7}}
    options["fan_in_fan_out"] = network is conv_network
    ours = get_peft_model(network(), PlainLoraConfig(**options))
    theirs = get_peft_model(network(), LoraConfig(**options))
    with torch.no_grad():
        values = dict(ours.named_parameters())
        pairs = {
            name: values[name.replace(".default.weight", "").replace(".lora_", ".lora_delta.default.lora_") + "0"]
            for name, p in theirs.named_parameters()
            if ".lora_" in name
        }
        for name, p in theirs.named_parameters():
            if name in pairs:
                p.copy_(pairs[name])
    optimizers = [make([p for p in model.parameters() if p.requires_grad]) for model in (ours, theirs)]
    first = None
    for step, ((x, y),) in enumerate(toy_batches(0, 60)):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers):
            torch.manual_seed(step)  # the same dropout masks
            loss = toy_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        first = first or losses[0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, p in theirs.named_parameters():
        if name in pairs:
            torch.testing.assert_close(pairs[name], p, rtol=1e-10, atol=1e-12)
    assert losses[0] != first and all(p.abs().max() > 0 for p in pairs.values())  # B started at 0
