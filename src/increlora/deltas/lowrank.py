"""LoRA's form in blocks: ΔW = s · Σ_i B_i A_i, with A_i (k, in), B_i (out, k)."""

import torch
from torch import Tensor

from .blocks import BlockDelta


class LowRankDelta(BlockDelta):
    """ΔW = s B A over the live blocks; s is folded into the smaller factor."""

    letters = ("A", "B")

    def factors(self) -> tuple[Tensor, Tensor]:
        blocks = [self.block(i) for i in self.live]
        A: Tensor
        B: Tensor
        if len(blocks) == 1:
            A, B = blocks[0]["A"], blocks[0]["B"]
        else:
            A, B = torch.cat([b["A"] for b in blocks]), torch.cat([b["B"] for b in blocks], dim=1)
        if self.in_features <= self.out_features:
            return A * self.scale, B
        return A, B * self.scale
