"""Two forms of a low-rank ΔW in blocks, with A_i (k, in), e_i (k, 1), B_i (out, k):

    LoRA's     ΔW = s · Σ_i B_i A_i
    SVD-like   ΔW = s · Σ_i B_i diag(e_i) A_i

e of a reserve block is held fixed: it enters as a constant, so it has no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops.fused_linear import Pending
from .base import Status
from .blocks import BlockDelta, joined


class LowRankDelta(BlockDelta):
    """ΔW = s B A over the live blocks."""

    letters: tuple[str, ...] = ("A", "B")

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.live:
            return self._factors()
        like = next(self.parameters(), torch.empty(0))
        return like.new_empty(0, self.in_features), like.new_empty(self.out_features, 0)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """`factors` while any rank is left."""
        A, B = self._operands()
        return (A * self.scale, B) if self.in_features <= self.out_features else (A, B * self.scale)

    def _operands(self) -> tuple[Tensor, Tensor]:
        """A and B without the scale, which the product takes for nothing."""
        blocks = [self.block(i) for i in self.live]
        return joined([b["A"] for b in blocks], 0), joined([b["B"] for b in blocks], 1)

    def _add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.inputs.add_product(y, x, A, B, self.scale)


class TripletDelta(LowRankDelta):
    """ΔW = s B diag(e) A over the live blocks; e is folded into A."""

    letters = ("A", "E", "B")
    _opened: tuple[object, Tensor] | None = None  # index of the ranks that are computed, and what it was made for

    def _factors(self) -> tuple[Tensor, Tensor]:
        A, E, B = self._parts()
        return scaled_rows(A, E * self.scale), B

    def _operands(self) -> tuple[Tensor, Tensor]:
        A, E, B = self._parts()
        return scaled_rows(A, E), B

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, e and B of what is computed."""
        if self.state.closed:
            A, E, B = map(whole, self.block(0).values())
            index = self._open_index(A.device)
            return A.index_select(0, index), E.index_select(0, index), B.index_select(1, index)
        live = self.live
        blocks = [self.block(i) for i in live]
        status = self.state.status
        e = [b["E"].detach() if status[i] == Status.RESERVE else b["E"] for i, b in zip(live, blocks, strict=True)]
        return joined([b["A"] for b in blocks], 0), joined(e, 0), joined([b["B"] for b in blocks], 1)

    def _open_index(self, device: torch.device) -> Tensor:
        """Kept, as copying it to the device at every use would wait for it; a compiled graph has it as a constant."""
        closed = self.state.closed
        made_for = (*closed, device)
        if self._opened is not None and self._opened[0] == made_for and not torch.compiler.is_compiling():
            return self._opened[1]
        chosen = [i for i, out in enumerate(closed) if not out]
        index = torch.tensor(chosen, dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling():
            self._opened = made_for, index
        return index


def whole(p: Any) -> Tensor:
    """The whole parameter: outside the forward pass it may be sharded (a DTensor), which cannot be indexed."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def scaled_rows(A: Tensor, e: Tensor) -> Tensor:
    """diag(e) A for A (k, n) and e (k, 1), in the dtype of both, under autocast too.

    A batch of k products (1, 1) (1, n), as its backward pass takes two calls; that of `e * A`, which broadcasts, three.
    """
    if torch.is_autocast_enabled(A.device.type):  # it would round the factors before they are multiplied
        with torch.autocast(A.device.type, enabled=False):
            return scaled_rows(A, e)
    return torch.bmm(e.unsqueeze(2), A.unsqueeze(1)).squeeze(1)
