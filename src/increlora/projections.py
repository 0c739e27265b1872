"""What is done to parameters after the host's step, in place; plain functions on tensors."""

import torch
from torch import Tensor


def zero_dropped(values: list[Tensor], kept: list[Tensor]) -> None:
    """values ← values ∘ kept, for many tensors at once: where `kept` is 0 a value becomes 0, where it is 1 it stays.

    A projection, not a freeze: the optimizer may move it again at the next step. Lists of equal length, pairwise equal
    shapes, dtypes and devices.
    """
    torch._foreach_mul_(values, kept)
