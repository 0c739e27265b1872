"""The fast path: a frozen linear map plus a low-rank product, as one node of the autograd graph.

    forward     y = x Wᵀ + b        h = x Aᵀ         y += s h Bᵀ
    backward    g = ∂L/∂y           ∂L/∂h = s g B    ∂L/∂x = g W + (∂L/∂h) A     ∂L/∂A = (∂L/∂h)ᵀ x     ∂L/∂B = s gᵀ h

W and b are frozen, s is a number; x (N, in), A (R, in), B (out, R), N tokens. With separate calls,
the branch and its sum with the base output, and in the backward pass its part of ∂L/∂x and that sum, are matrices as
large as all tokens. They are written to memory and read again, for products with R columns that cost almost nothing.
Here the products add into the result (`addmm_` with β = 1), so the only matrices of that size are y and ∂L/∂x, which
the base needs anyway. Kept for the backward pass: x, which q, k and v share, and h (N, R).

The base layer is not called, so its whole forward pass must be known. The host creates a `Pending` for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NARROW = 16  # float32 numbers in a register of 512 bits
PLAIN = (Tensor, nn.Parameter)  # no subclasses: sharded and packed tensors behave differently


class Pending:
    """The output of a base layer that is not computed yet, so that a product can be added in the same computation.

    Attributes:
        x: input.   weight: W (out, in).   bias: b (out,) or None.   forward: computes the output.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, forward: Callable[[Tensor], Tensor]) -> None:
        self.x, self.weight, self.bias, self.forward = x, weight, bias, forward

    def joins(self, x: Tensor, A: Tensor, B: Tensor) -> bool:
        """Whether the product x Aᵀ Bᵀ can be computed together with the output: same x, one dtype."""
        if x is not self.x or type(A) not in PLAIN or type(B) not in PLAIN:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return x.is_floating_point() and x.dtype != torch.float64
        return x.dtype == self.weight.dtype == A.dtype == B.dtype


def matched(x: Tensor, A: Tensor) -> Tensor:
    """x in the adapter's dtype; under autocast unchanged, because autocast casts it."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)


def computed(y: Tensor | Pending) -> Tensor:
    """The output of the base."""
    return y.forward(y.x) if isinstance(y, Pending) else y


def add_product(y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """y + s x Aᵀ Bᵀ, by one fused call where the dtypes agree; the result has the dtype of y."""
    if isinstance(y, Pending) and y.joins(x, A, B):
        return with_product(y, A, B, scale)
    y = computed(y)
    h = nn.functional.linear(matched(x, A), A)
    if not h.dtype == y.dtype == B.dtype:
        return y + (nn.functional.linear(h, B) * scale).to(y.dtype)
    total = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale)
    return total if y.dim() == 2 else total.view(y.shape)  # FSDP2 does not accept views as outputs of a module


def with_product(base: Pending, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x Wᵀ + b + s x Aᵀ Bᵀ."""
    operands: tuple[Tensor | None, ...] = (base.x, base.weight, base.bias, A, B)
    device = base.x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        operands = tuple(t if t is None else t.to(dtype) for t in operands)
    y: Tensor = LinearWithProduct.apply(*operands, scale)
    return y


class LinearWithProduct(torch.autograd.Function):
    """The equations above. Second derivatives follow from the same equations; h is recomputed for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        y = x.new_empty(*x.shape[:-1], W.shape[0])
        rows, into = x.reshape(-1, x.shape[-1]), y.view(-1, W.shape[0])
        if b is None:
            torch.mm(rows, W.t(), out=into)
        else:
            torch.addmm(b, rows, W.t(), out=into)
        h = rows @ A.t()
        into.addmm_(h, B.t(), alpha=scale)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_A = grad_B = None
        few = is_narrow(h)  # benchmarks/narrow_products.py
        if wants_B:
            h = rows @ A.t() if torch.is_grad_enabled() else h
            grad_B = scaled_product(ctx.scale, h.t(), g).t() if few else scaled_product(ctx.scale, g.t(), h)
        if wants_x or wants_A:
            grad_h = scaled_product(ctx.scale, g, B.t().contiguous().t() if few else B)
            if wants_A:
                grad_A = grad_h.t() @ rows
            if wants_x:
                grad_x = (g @ W).addmm_(grad_h, A).view(x.shape)
        return grad_x, None, None, grad_A, grad_B, None


def is_narrow(h: Tensor) -> bool:
    """Whether products with as few columns as h are faster transposed: (hᵀ g)ᵀ for gᵀ h, and g B with B by columns.

    On a CPU they are up to four times faster below one vector register of columns, and slower above it. For few tokens
    the copy does not pay off.
    """
    return h.device.type == "cpu" and h.shape[1] < NARROW < h.shape[0]


def scaled_product(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """s a b in one call."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)
