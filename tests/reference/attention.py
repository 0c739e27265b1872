"""A tiny attention net without transformers, and what its modules are to LoRTA."""

import torch
from torch import Tensor, nn

WIDTH, HEADS, KEY_HEADS, HEAD_DIM, LAYERS = 8, 4, 2, 3, 2
ARCHITECTURE = {"heads": HEADS, "head_dim": HEAD_DIM}


class Attention(nn.Module):
    """Grouped-query attention over the rows of x (…, n, d); H·d_h need not be d."""

    def __init__(self, width: int, heads: int, key_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.q_proj = nn.Linear(width, heads * head_dim)
        self.k_proj = nn.Linear(width, key_heads * head_dim)
        self.v_proj = nn.Linear(width, key_heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (n, -1)).transpose(-2, -3)
            for project, n in ((self.q_proj, self.heads), (self.k_proj, self.key_heads), (self.v_proj, self.key_heads))
        )
        k, v = (t.repeat_interleave(self.heads // self.key_heads, dim=-3) for t in (k, v))
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        return self.o_proj(mixed.transpose(-2, -3).flatten(-2))


class AttentionNet(nn.Module):
    """Residual attention layers under a linear head of 3 outputs."""

    def __init__(
        self, width: int = WIDTH, heads: int = HEADS, key_heads: int = KEY_HEADS, head_dim: int = HEAD_DIM,
        layers: int = LAYERS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList(Attention(width, heads, key_heads, head_dim) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)
