"""Initial values of a block's parameters: (shape, generator, block index) → tensor."""

import math

import torch
from torch import Tensor

Shape = tuple[int, int]


def kaiming(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """U(−1/√n, 1/√n) for n columns: Kaiming-uniform with a = √5, LoRA's A."""
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def gaussian(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """N(0, 0.02²): A and B of the published code."""
    return torch.randn(shape, generator=generator) * 0.02


def zeros(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    return torch.zeros(shape)


def ones(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    return torch.ones(shape)


def normal(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """N(0, 1): the gates of SoRA's published code."""
    return torch.randn(shape, generator=generator)
