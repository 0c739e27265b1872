"""LoRA-Mini's form: ΔW = s · B_aux B A A_aux, of which the inner pair alone is trained.

    lora_A0 (r, a), lora_B0 (b, r)               parameters: r (a + b) numbers, a ≤ in, b ≤ out
    lora_aux_A (a, in), lora_aux_B (out, b)      buffers: drawn once, never trained
    lora_digest (16 bytes)                       buffer: which outer factors these are

The outer factors are rounded, when they are drawn, to numbers that float16 and bfloat16 both represent: they are the
same in every dtype, and a different last bit of a random number seldom changes them.
"""

import hashlib
from collections.abc import Container, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...deltas.base import check_shape
from ...deltas.blocks import BlockDelta
from ...errors import CheckpointError
from ...ops.fused_linear import Pending, add_product, computed, matched

OUTER = {"lora_aux_A": "aux_A", "lora_aux_B": "aux_B"}  # name of the buffer: letter in `init` and `shape`


class FourFactorDelta(BlockDelta):
    """ΔW = s B_aux B A A_aux with one block (A, B); s is folded into A.

    Args:
        inner: (a, b), the inner sizes.   path: `composed` multiplies A A_aux and B_aux B first, `sequential` sends x
            through the four factors, `auto` takes the one with fewer multiplications for the tokens at hand.
        save_projection: the outer factors are written to files, too; otherwise they are drawn again on loading.
        init: of the letters A, B, aux_A and aux_B.   Further arguments as for `BlockDelta`.
    """

    letters = ("A", "B")
    lora_aux_A: Tensor
    lora_aux_B: Tensor
    lora_digest: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *args: Any,
        inner: tuple[int, int],
        path: Literal["auto", "composed", "sequential"] = "auto",
        save_projection: bool = True,
        **options: Any,
    ) -> None:
        assert inner[0] <= in_features and inner[1] <= out_features
        self.inner, self.path, self.save_projection = inner, path, save_projection
        super().__init__(in_features, out_features, *args, **options)
        assert len(self.sizes) == 1
        outer = {name: self.draw(letter, 0) for name, letter in OUTER.items()}
        for name, values in outer.items():
            self.register_buffer(name, values.to(self.block(0)["A"].dtype))
        self.drawn = digest(*outer.values())  # of the seed; the buffer says what was loaded
        self.register_buffer("lora_digest", torch.tensor(list(self.drawn), dtype=torch.uint8))

    def shape(self, letter: str, size: int) -> tuple[int, int]:
        a, b = self.inner
        inner = {"A": (size, a), "B": (b, size)}
        return (inner | {"aux_A": (a, self.in_features), "aux_B": (self.out_features, b)})[letter]

    def draw(self, letter: str, index: int) -> Tensor:
        values = super().draw(letter, index)
        return values.bfloat16().half() if letter in OUTER.values() else values

    @property
    def cost(self) -> int:
        return sum(self.inner)

    # -- computation ---------------------------------------------------------------------------------------------

    def _operands(self) -> tuple[Tensor, Tensor]:
        block = self.block(0)
        return block["A"] * self.scale, block["B"]

    def _add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        composed = self.path == "composed"
        if self.path == "auto":
            tokens = x.numel() // self.in_features
            composed = composing_pays(tokens, len(A), self.inner, (self.in_features, self.out_features))
        if composed:
            return add_product(y, x, *self._composed(A, B))
        h = Frozen.apply(matched(x, A), self.lora_aux_A)
        h = nn.functional.linear(nn.functional.linear(h, A), B)
        y = computed(y)
        return y + Frozen.apply(h, self.lora_aux_B).to(y.dtype)

    def _composed(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(A A_aux, B_aux B): a low-rank pair."""
        with torch.autocast(A.device.type, enabled=False):  # it would round A and B before they are multiplied
            return Frozen.apply(A, self.lora_aux_A.t()), Frozen.apply(B.t(), self.lora_aux_B).t()

    def factors(self) -> tuple[Tensor, Tensor]:
        """The smallest exact pair: of rank min(r, a, b)."""
        A, B = self._operands()
        a, b = self.inner
        if min(a, b) >= len(A):
            return self._composed(A, B)
        if a <= b:
            return self.lora_aux_A.to(A.dtype), self.lora_aux_B.to(A.dtype) @ (B @ A)
        return (B @ A) @ self.lora_aux_A.to(A.dtype), self.lora_aux_B.to(A.dtype)

    # -- checkpoints: outer factors are written, or drawn again; either way they must be those of the digest -----------

    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        written = super().saved(values)
        if not self.save_projection and bytes(written["lora_digest"].tolist()) == self.drawn:
            written = {name: value for name, value in written.items() if name not in OUTER}
        return written

    def check_entries(self, found: Mapping[str, Tensor]) -> None:
        super().check_entries(found)
        check_shape("lora_digest", (16,), found)
        trained_with = bytes(found["lora_digest"].tolist())
        if not any(name in found for name in OUTER):
            if trained_with != self.drawn:
                raise CheckpointError(
                    f"lora_digest: seed={self.seed} draws other outer factors here than it was trained with: give the "
                    f"seed of that run; if this is it, save the adapter where it was trained with save_projection=True"
                )
            return
        for name, letter in OUTER.items():
            check_shape(name, self.shape(letter, 0), found)
        outer = [found[name] for name in OUTER]
        if not outer[0].is_meta and digest(*outer) != trained_with:  # meta: only the shapes are known
            raise CheckpointError(
                "lora_digest is not that of lora_aux_A and lora_aux_B: the adapter is damaged; restore it from a copy"
            )

    def left_out(self, given: Container[str]) -> dict[str, Tensor]:
        drawn = {n: self.draw(letter, 0).to(getattr(self, n).dtype) for n, letter in OUTER.items() if n not in given}
        return super().left_out(given) | drawn


def composing_pays(tokens: int, r: int, inner: tuple[int, int], ends: tuple[int, int]) -> bool:
    """Does multiplying the weights first take no more multiplications than the four factors one after the other?

        r (a·in + b·out) + N·r (in + out)  ≤  N (a·in + r·a + r·b + b·out)       N tokens, inner (a, b), ends (in, out)

    Source: counted. At a = b = 64, r = 8, in = out = 768 from 10 tokens on.
    """
    outer = inner[0] * ends[0] + inner[1] * ends[1]
    return r * outer + tokens * r * sum(ends) <= tokens * (outer + r * sum(inner))


def digest(*outer: Tensor) -> bytes:
    """16 bytes that identify the outer factors, the same in every dtype: blake2b of their values in float32."""
    found = hashlib.blake2b(digest_size=16)
    for values in outer:
        found.update(values.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return found.digest()


class Frozen(torch.autograd.Function):
    """x Fᵀ in the dtype of x, for a frozen F: autograd keeps F alone, as it is stored, not cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, F: Tensor) -> Tensor:
        ctx.save_for_backward(F)
        return nn.functional.linear(x, F.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (F,) = ctx.saved_tensors
        return grad @ F.to(grad.dtype), None
