"""Initial values of a block's parameters: (shape, generator, block index) → tensor."""

import math

import torch
from torch import Tensor

from ..deltas import Init, Inputs, Tokens
from ..deltas.blocks import ones, zeros

__all__ = ["gaussian", "kaiming", "lora_start", "normal", "ones", "zeros"]

Shape = tuple[int, int]


def kaiming(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """U(−1/√n, 1/√n) for n columns: Kaiming-uniform with a = √5, LoRA's A."""
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def gaussian(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """N(0, 0.02²): A and B of the published code."""
    return torch.randn(shape, generator=generator) * 0.02


def normal(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """N(0, 1): the gates of SoRA's published code, and LoRA's B of an embedding."""
    return torch.randn(shape, generator=generator)


def lora_start(inputs: Inputs, *, random: bool = False) -> dict[str, Init]:
    """A and B of LoRA, with B A = 0 unless `random`: A Kaiming-uniform and B zero.

    Of an embedding A zero and B N(0, 1), as in LoRA's published code: there a column of A is looked up, not multiplied.
    """
    if isinstance(inputs, Tokens):
        return {"A": gaussian if random else zeros, "B": normal}
    return {"A": kaiming, "B": gaussian if random else zeros}
