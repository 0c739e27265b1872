"""The SVD-like form in blocks: ΔW = s · Σ_i B_i diag(e_i) A_i, with A_i (k, in), e_i (k, 1), B_i (out, k).

e of a reserve block is held fixed: it enters as a constant, so it has no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from .base import Status
from .blocks import BlockDelta


class TripletDelta(BlockDelta):
    """ΔW = s B diag(e) A over the live blocks; s·e is folded into A."""

    letters = ("A", "E", "B")
    _opened: tuple[object, Tensor] | None = None  # index of the ranks that are computed, and what it was made for

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.closed:
            return self._folded(*self._open_ranks())
        live = self.live
        blocks = [self.block(i) for i in live]
        e = [b["E"].detach() if self.status[i] == Status.RESERVE else b["E"] for i, b in zip(live, blocks, strict=True)]
        A: Tensor
        B: Tensor
        if len(blocks) == 1:
            A, E, B = blocks[0]["A"], e[0], blocks[0]["B"]
        else:
            A, E = torch.cat([b["A"] for b in blocks]), torch.cat(e)
            B = torch.cat([b["B"] for b in blocks], dim=1)
        return self._folded(A, E, B)

    def _open_ranks(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, e and B of the ranks that are computed; none may be left."""
        A, E, B = map(whole, self.block(0).values())
        made_for = (*self.closed, A.device)
        if (
            self._opened is None or self._opened[0] != made_for
        ):  # copying it to the device at every use would wait for it
            chosen = [i for i, closed in enumerate(self.closed) if not closed]
            self._opened = made_for, torch.tensor(chosen, dtype=torch.int64, device=A.device)
        index = self._opened[1]
        return A.index_select(0, index), E.index_select(0, index), B.index_select(1, index)

    def _folded(self, A: Tensor, E: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return scaled_rows(A, E * self.scale), B


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
