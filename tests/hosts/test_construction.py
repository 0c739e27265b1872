"""What making an adapter costs: beside LoRA's, and with the number of modules."""

import gc
import sys

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from increlora import IncreLoraConfig


class Stack(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))


def calls(config: PeftConfig, count: int) -> int:
    """How many functions are called, of Python and of C: a count, since times on a busy machine say little."""
    net, counted = Stack(count), 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        get_peft_model(net, config)
    finally:
        sys.setprofile(None)
    return counted


def test_room_for_many_ranks_costs_little_and_grows_with_the_number_of_modules() -> None:
    config = IncreLoraConfig(r=8, capacity=64, target_modules=r"layers\.\d+", total_steps=1000)
    lora = LoraConfig(r=8, target_modules=r"layers\.\d+")
    for made in (config, lora):
        get_peft_model(Stack(1), made)  # imports
    small, large = calls(config, 20), calls(config, 100)
    assert large <= 5.5 * small
    assert large <= 2 * calls(lora, 100)


def test_making_an_adapter_leaves_the_collector_as_it_was() -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        get_peft_model(Stack(1), IncreLoraConfig(r=2, target_modules=r"layers\.\d+", total_steps=100))
        assert gc.isenabled() is enabled
    gc.enable()
