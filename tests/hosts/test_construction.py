"""What making an adapter costs: beside LoRA's, and with the number of modules."""

import gc
import time

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from increlora import IncreLoraConfig


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
