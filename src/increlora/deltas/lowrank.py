"""LoRA's form in blocks: ΔW = s · Σ_i B_i A_i, with A_i (k, in), B_i (out, k)."""

import torch
from torch import Tensor

from ..ops.fused_linear import Pending
from .blocks import BlockDelta


class LowRankDelta(BlockDelta):
    """ΔW = s B A over the live blocks."""

    letters = ("A", "B")

    def factors(self) -> tuple[Tensor, Tensor]:
        if not self.live:
            return self._no_factors()
        A, B = self._operands()
        if self.in_features <= self.out_features:
            return A * self.scale, B
        return A, B * self.scale

    def _operands(self) -> tuple[Tensor, Tensor]:
        """A and B without the scale, which the product takes for nothing."""
        blocks = [self.block(i) for i in self.live]
        if len(blocks) == 1:
            return blocks[0]["A"], blocks[0]["B"]
        return torch.cat([b["A"] for b in blocks]), torch.cat([b["B"] for b in blocks], dim=1)

    def _add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.inputs.add_product(y, x, A, B, self.scale)
