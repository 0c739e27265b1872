"""A small net that looks up tokens and convolves them, and the options its modules can have."""

import torch
from torch import Tensor, nn

from tests.hosts.bases import seeded

TARGETS = ["embed", "conv", "head"]
CONVOLUTIONS = {
    "plain": {},
    "stride and padding": {"stride": 2, "padding": 1},
    "unequal": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "same": {"padding": "same", "kernel_size": (2, 3)},
    "dilated": {"dilation": 2, "padding": 2},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
}


class Scaled(nn.Embedding):
    """An embedding that multiplies its rows, as Gemma's does."""

    embed_scale = 3.0

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embed_scale


class Net(nn.Module):
    """Tokens (N, 8) → rows of an embedding, seen as an image (N, 2, 8, 6) → convolution → 3 outputs."""

    def __init__(self, embedding: type[nn.Embedding] = nn.Embedding, **convolution: object) -> None:
        super().__init__()
        self.embed = embedding(20, 12, padding_idx=0)
        self.conv = nn.Conv2d(2, 5, **{"kernel_size": 3} | convolution)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.embed(tokens).unflatten(-1, (2, 6)).movedim(2, 1)
        return self.head(torch.tanh(self.conv(image)).amax((-2, -1)))


def net(**options: object) -> nn.Module:
    return seeded(lambda: Net(**options))


def tokens() -> Tensor:
    """Some repeat, some are padding, some of the vocabulary are missing."""
    return torch.randint(0, 12, (6, 8), generator=torch.Generator().manual_seed(3))


def targets(step: int) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
