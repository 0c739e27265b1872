"""Two forms of a low-rank ΔW in blocks, with A_i (k, in), e_i (k, 1), B_i (out, k):

    LoRA's     ΔW = s · Σ_i B_i A_i
    SVD-like   ΔW = s · Σ_i B_i diag(e_i) A_i

e of a reserve block is held fixed: it enters as a constant, so it has no gradient.
"""

from collections.abc import Callable, Sequence
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
    _made: tuple[object, Tensor] | None = None  # what `_parts` needs besides, and what it was made for

    def _factors(self) -> tuple[Tensor, Tensor]:
        A, E, B = self._parts()
        return scaled_rows(A, E * self.scale), B

    def _operands(self) -> tuple[Tensor, Tensor]:
        A, E, B = self._parts()
        return scaled_rows(A, E), B

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, e and B of what is computed. Ranks that are dropped for good are none of it, whatever their e may be."""
        state = self.state
        if state.closed:
            A, E, B = map(whole, self.block(0).values())
            index = self._kept_for((*state.closed, A.device), lambda: open_index(state.closed, A.device))
            return A.index_select(0, index), E.index_select(0, index), B.index_select(1, index)
        trains = self.training and torch.is_grad_enabled()  # their e is zero there: it was set so after the last step
        if state.settled and False in state.kept and not trains:
            A, E, B = map(whole, self.block(0).values())
            minus = self._kept_for((*state.kept, E.device, E.dtype), lambda: minus_dropped(state.kept, E))
            return A, torch.addcmul(E, minus, E.detach()), B  # the gradient is that of e, as published
        live = self.live
        blocks = [self.block(i) for i in live]
        e = [
            b["E"].detach() if state.status[i] == Status.RESERVE else b["E"] for i, b in zip(live, blocks, strict=True)
        ]
        return joined([b["A"] for b in blocks], 0), joined(e, 0), joined([b["B"] for b in blocks], 1)

    def _kept_for(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """Kept, as copying it to the device at every use would wait for it; a compiled graph has it as a constant."""
        if torch.compiler.is_compiling():
            return make()
        if self._made is None or self._made[0] != key:
            with torch.inference_mode(False):  # a backward pass could not use it otherwise
                self._made = key, make()
        return self._made[1]


def open_index(closed: Sequence[bool], device: torch.device) -> Tensor:
    """Index of the ranks that are computed."""
    return torch.tensor([i for i, out in enumerate(closed) if not out], dtype=torch.int64, device=device)


def minus_dropped(kept: Sequence[bool], E: Tensor) -> Tensor:
    """−1 for the ranks that do not count, else 0, beside E."""
    return torch.tensor([[float(flag) - 1] for flag in kept], dtype=E.dtype, device=E.device)


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
