"""y + s x Aᵀ Bᵀ in whatever dtypes there are, and idle parameters as part of the graph."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .beside import Pending, computed, with_product


def matched(x: Tensor, A: Tensor) -> Tensor:
    """x in the adapter's dtype; autocast sees to that itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)


def add_product(y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """y + s x Aᵀ Bᵀ, by one fused call where the dtypes agree; the result has the dtype of y."""
    if isinstance(y, Pending) and y.joins(x, A, B):
        return with_product(y, A, B, scale)
    y = computed(y)
    h = nn.functional.linear(matched(x, A), A)
    if not h.dtype == y.dtype == B.dtype:
        return y + (nn.functional.linear(h, B) * scale).to(y.dtype)
    total = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale)
    return total if y.dim() == 2 else total.view(y.shape)  # FSDP2 distrusts views that a module returns


def in_process_group() -> bool:
    """Has torch.distributed been initialised? Then every parameter must take part in every backward pass: DDP insists,
    also in a group of one."""
    return dist.is_available() and dist.is_initialized()


class ZeroGate(torch.autograd.Function):
    """Identity that makes idle parameters part of the graph with gradient zero; the runtime clears it before a step."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *still: Tensor) -> Tensor:
        ctx.save_for_backward(*still)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *(torch.zeros_like(p) for p in ctx.saved_tensors))
