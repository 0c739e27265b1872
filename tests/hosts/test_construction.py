"""What making an adapter costs: beside LoRA's, and with the number of modules."""

import copy
import gc
import time

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from increlora import IncreLoraConfig
from increlora.runtime import controllers_of


class Stack(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))


def seconds(config: PeftConfig, count: int) -> float:
    """CPU time, of the fastest of a few."""
    found = []
    for _ in range(3):
        net = Stack(count)
        gc.collect()
        began = time.process_time()
        get_peft_model(net, config)
        found.append(time.process_time() - began)
    return min(found)


@pytest.mark.slow
def test_room_for_many_ranks_costs_little_time() -> None:
    config = IncreLoraConfig(r=8, capacity=64, target_modules=r"layers\.\d+", total_steps=1000)
    get_peft_model(Stack(1), config)  # imports
    small, large = seconds(config, 40), seconds(config, 200)
    assert large <= 2 * seconds(LoraConfig(r=8, target_modules=r"layers\.\d+"), 200)
    assert large <= 8 * small


def test_making_an_adapter_leaves_the_collector_as_it_was() -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        get_peft_model(Stack(1), IncreLoraConfig(r=2, target_modules=r"layers\.\d+", total_steps=100))
        assert gc.isenabled() is enabled
    gc.enable()


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
