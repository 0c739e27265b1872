"""A step of the optimizer as the controller describes it to rules, for tests that call a rule by hand."""

import torch
from torch.optim import Optimizer

from increlora.rules import Step


def step(number: int, optimizer: Optimizer, gradient_scale: float = 1.0) -> Step:
    return Step(number, optimizer, torch.tensor(True), gradient_scale, lambda: 1.0)
