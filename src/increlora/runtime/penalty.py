"""The orthogonality penalty of a run: which matrices it sees, and its gradient added where the optimizer finds it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..deltas import BlockDelta, Status
from ..methods import PenaltyRule
from ..penalties import orthogonality, orthogonality_grad
from .distributed import full, laid_out_like


def components(deltas: Sequence[BlockDelta]) -> list[Tensor]:
    """A and Bᵀ of every module, over active and reserve blocks: matrices whose rows are the components."""
    matrices = []
    for delta in deltas:
        blocks = [delta.block(i) for i in penalised(delta)]
        matrices.append(joined([full(b["A"]) for b in blocks], dim=0))
        matrices.append(joined([full(b["B"]) for b in blocks], dim=1).mT)
    return matrices


def joined(parts: list[Tensor], *, dim: int) -> Tensor:
    """The parts as one tensor; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def penalised(delta: BlockDelta) -> list[int]:
    return delta.indices(Status.ACTIVE, Status.RESERVE)


def penalty_value(deltas: Sequence[BlockDelta], rule: PenaltyRule) -> Tensor:
    """weight · R, differentiable."""
    return rule.weight * orthogonality(components(deltas), form=rule.form)


@torch.no_grad()
def add_penalty(deltas: Sequence[BlockDelta], rule: PenaltyRule, *, scale: float = 1.0) -> None:
    """Add scale · ∂(weight · R) to `.grad` of every component that may move."""
    grads = orthogonality_grad(components(deltas), weight=rule.weight * scale, form=rule.form)
    there: list[Tensor] = []
    added: list[Tensor] = []
    for delta, grad_a, grad_b in zip(deltas, grads[0::2], grads[1::2], strict=True):
        still = {id(p) for p in delta.still()}
        start = 0
        for i in penalised(delta):
            block, rows = delta.block(i), slice(start, start + delta.sizes[i])
            start += delta.sizes[i]
            for p, grad in ((block["A"], grad_a[rows]), (block["B"], grad_b[rows].mT)):
                if id(p) not in still and p.requires_grad:
                    if p.grad is None:
                        p.grad = laid_out_like(grad.contiguous(), p)
                    else:
                        there.append(p.grad)
                        added.append(laid_out_like(grad, p))
    if there:
        torch._foreach_add_(there, added)
