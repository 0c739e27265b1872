"""The penalty of a run: what it sees, and its gradient added where the optimizer finds it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..decide.penalties import mean_size, mean_size_grad, orthogonality, orthogonality_grad
from ..deltas import BlockDelta, Status
from ..deltas.blocks import joined
from ..methods import Penalty
from ..ops.parallel import full, laid_out_like


def components(deltas: Sequence[BlockDelta]) -> list[Tensor]:
    """A and Bᵀ of every module, over active and reserve blocks: matrices whose rows are the components.

    Parameters that must not move are constants: a gradient of theirs would count where the host clips by the norm."""
    matrices = []
    for delta in deltas:
        frozen = {id(p) for p in delta.frozen_parameters()}
        blocks = [
            {letter: full(p.detach() if id(p) in frozen else p) for letter, p in block.items()}
            for block in penalised(delta)
        ]
        matrices.append(joined([b["A"] for b in blocks], 0))
        matrices.append(joined([b["B"] for b in blocks], 1).mT)
    return matrices


def penalised(delta: BlockDelta) -> list[dict[str, nn.Parameter]]:
    """The blocks that are computed or in reserve."""
    return [delta.block(i) for i in delta.indices(Status.ACTIVE, Status.RESERVE)]


def gates(deltas: Sequence[BlockDelta]) -> list[nn.Parameter]:
    return [block["E"] for delta in deltas for block in penalised(delta)]


def penalty_value(deltas: Sequence[BlockDelta], rule: Penalty) -> Tensor:
    """weight · R, differentiable."""
    if rule.form == "l1":
        return rule.weight * mean_size([full(e) for e in gates(deltas)])
    return rule.weight * orthogonality(components(deltas), form=rule.form)


@torch.no_grad()
def add_penalty(deltas: Sequence[BlockDelta], rule: Penalty, *, scale: float = 1.0) -> None:
    """Add scale · ∂(weight · R) to `.grad` of every parameter it concerns that may move."""
    frozen = {id(p) for delta in deltas for p in delta.frozen_parameters()}
    there: list[Tensor] = []
    added: list[Tensor] = []
    for p, grad in gradients(deltas, rule, scale):
        if id(p) in frozen or not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = laid_out_like(grad.contiguous(), p)
        else:
            there.append(p.grad)
            added.append(laid_out_like(grad, p))
    if there:
        torch._foreach_add_(there, added)


def gradients(deltas: Sequence[BlockDelta], rule: Penalty, scale: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter the penalty concerns, with scale · ∂(weight · R), whole."""
    if rule.form == "l1":
        found = gates(deltas)
        return list(zip(found, mean_size_grad([full(e) for e in found], weight=rule.weight * scale), strict=True))
    grads = orthogonality_grad(components(deltas), weight=rule.weight * scale, form=rule.form)
    pairs = []
    for delta, grad_a, grad_b in zip(deltas, grads[0::2], grads[1::2], strict=True):
        start = 0
        for block in penalised(delta):
            rows = slice(start, start + len(block["A"]))
            start = rows.stop
            pairs += [(block["A"], grad_a[rows]), (block["B"], grad_b[rows].mT)]
    return pairs
