"""Adapters with many modules are loaded in a time that grows with their number."""

import copy

import torch
from peft import get_peft_model

from increlora import IncreLoraConfig
from increlora.runtime import controllers_of
from tests.hosts.test_construction import Stack


def test_loading_many_modules_describes_them_twice_and_rightly() -> None:
    """Each module tells that it was loaded: whatever looks at all of them must not be done for each."""
    config = IncreLoraConfig(r=2, target_modules=r"layers\.\d+", total_steps=4)
    first, second = get_peft_model(Stack(30), config), get_peft_model(Stack(30), copy.deepcopy(config))
    optimizer = torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(4):
        sum(layer(torch.ones(2, 64)).mean() for layer in first.base_model.model.layers).backward()
        optimizer.step()
        optimizer.zero_grad()
    (controller,), calls = controllers_of(second), []
    describe = controller.on_change
    controller.on_change = lambda: (calls.append(1), describe())[1]
    for _ in range(2):
        second.load_state_dict(first.state_dict())
    assert 1 <= len(calls) <= 4
    assert controller.step == 4 and controller.finished
    assert second.peft_config["default"].ranks == first.peft_config["default"].ranks
