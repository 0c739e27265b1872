"""The toy problem the reference and the library both train: frozen network, batches, loss, initial values.

min mean (f(x) − y)²,   f: tanh network of six frozen linear layers, all of them adapted
"""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

Initial = Callable[[str, int, str, tuple[int, int]], Tensor]
"""`initial(module_name, block, "A" or "B", shape)` → a (ranks, n) or b (m, ranks).
Block 0 has r0 ranks, block i ≥ 1 the k ranks of the i-th reserve of that module."""


class Block(nn.Module):
    def __init__(self, n: int, hidden: int, m: int):
        super().__init__()
        self.up, self.down = nn.Linear(n, hidden), nn.Linear(hidden, m)


class ToyNetwork(nn.Module):
    """Six linear layers `blocks.{0,1,2}.{up,down}` of six shapes, one square, tanh between them: (N, 7) → (N, 3)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(7, 12, 9), Block(9, 9, 5), Block(5, 14, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            x = torch.tanh(block.down(torch.tanh(block.up(x))))
        return self.blocks[-1].down(torch.tanh(self.blocks[-1].up(x)))


def toy_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> ToyNetwork:
    """A frozen `ToyNetwork` of plain `nn.Linear`, drawn in float64 and cast; does not touch the global generator."""
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws its own initial values
        network = ToyNetwork().double()
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.requires_grad_(False).normal_(0.0, 1.0 / math.sqrt(p.shape[-1]), generator=generator)
    return network.to(dtype)


def toy_batches(
    seed: int,
    steps: int,
    accumulation: int = 1,
    dtype: torch.dtype = torch.float64,
    size: int = 8,
) -> list[list[tuple[Tensor, Tensor]]]:
    """`batches[step][micro]` = (x (size, 7), y (size, 3)), y a noisy non-linear function of x; float64, then cast."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(7, 3, generator=generator, dtype=torch.float64)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 7, generator=generator, dtype=torch.float64)
        y = torch.sin(x @ mix) + 0.1 * torch.randn(size, 3, generator=generator, dtype=torch.float64)
        return x.to(dtype), y.to(dtype)

    return [[batch() for _ in range(accumulation)] for _ in range(steps)]


def toy_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def gaussian_initial(seed: int = 0, std: float = 0.02) -> Initial:
    """N(0, std²) in float64, one generator per (seed, module, block, letter): the call order does not matter."""

    def initial(name: str, block: int, letter: str, shape: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{block}/{letter}".encode()))
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    return initial
