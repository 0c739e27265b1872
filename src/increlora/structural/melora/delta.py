"""MELoRA's form: n mini adapters on the diagonal, ΔW = s · diag(B_1 A_1, …, B_n A_n).

    A_i (r, in/n) reads the i-th slice of x only, B_i (out/n, r) writes the i-th slice of y only
    lora_A0 (n r, in/n): A_1 above A_2 above …        lora_B0 (out, r): B_1 above B_2 above …

So r (in + out) parameters give rank n r. The width of A says what n was: an adapter of another n does not fit.
"""

from typing import Any

import torch
from torch import Tensor

from ...deltas.blocks import BlockDelta
from ...ops.fused_linear import Pending, computed, matched


class BlockDiagonalDelta(BlockDelta):
    """ΔW = s diag(B_i A_i) over the live blocks, computed as one batched product; s is folded into the smaller factor.

    Args:
        minis: n ≥ 1; divides `in_features` and `out_features`.   sizes: ranks of each mini adapter, per block.
            Further arguments as for `BlockDelta`.
    """

    letters = ("A", "B")

    def __init__(self, in_features: int, out_features: int, *args: Any, minis: int, **options: Any) -> None:
        assert in_features % minis == out_features % minis == 0
        self.minis = minis
        super().__init__(in_features, out_features, *args, **options)

    def shape(self, letter: str, size: int) -> tuple[int, int]:
        return {"A": (self.minis * size, self.in_features // self.minis), "B": (self.out_features, size)}[letter]

    def size_of(self, A: Tensor) -> int:
        return A.shape[0] // self.minis

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self._operands()
        return torch.block_diag(*A), torch.block_diag(*B)

    def weight(self) -> Tensor:
        A, B = self._operands()
        return torch.block_diag(*torch.bmm(B, A))

    def _operands(self) -> tuple[Tensor, Tensor]:
        """A (n, r, in/n) and B (n, out/n, r) of all mini adapters."""
        blocks = [self.block(i) for i in self.live]
        A, B = ([b[letter].unflatten(0, (self.minis, -1)) for b in blocks] for letter in self.letters)
        a, b = (A[0], B[0]) if len(blocks) == 1 else (torch.cat(A, dim=1), torch.cat(B, dim=2))
        if self.in_features <= self.out_features:
            return a * self.scale, b
        return a, b * self.scale

    def _add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        slices = matched(x, A).reshape(-1, self.minis, A.shape[2]).transpose(0, 1)  # views: nothing is copied
        added = torch.bmm(torch.bmm(slices, A.mT), B.mT)
        y = computed(y)
        return y + added.transpose(0, 1).reshape(y.shape).to(y.dtype)
