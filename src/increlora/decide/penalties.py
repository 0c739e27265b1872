"""Regularisers, with their gradients in closed form; they are never part of the reported loss.

trainer   R = (1/2M) Σ_modules ( ‖A Aᵀ − I‖_F + ‖Bᵀ B − I‖_F )        norms not squared, as the published trainer
squared   R = Σ_modules ( ‖A Aᵀ − I‖²_F + ‖Bᵀ B − I‖²_F )             as printed in the papers
l1        R = (1/N) Σ |e|                                               over the N gates of all modules
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

OrthogonalityForm = Literal["trainer", "squared"]
PenaltyForm = OrthogonalityForm | Literal["l1"]


def gram_error(rows: Tensor) -> Tensor:
    """M Mᵀ − I for M (R, n) or a batch of them."""
    gram = rows @ rows.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def orthogonality(factors: Sequence[Tensor], *, form: OrthogonalityForm = "trainer") -> Tensor:
    """R for matrices whose *rows* are the components (pass A and Bᵀ of every module); differentiable.

    Source: AdaLoRA eq. 4 (`squared`); IncreLoRA's trainer (`trainer`). An empty list gives 0.
    """
    if not factors:
        return torch.zeros(())
    norms = torch.stack([torch.linalg.matrix_norm(gram_error(M)) for M in factors])
    return norms.mean() if form == "trainer" else norms.square().sum()


def orthogonality_grad(
    factors: Sequence[Tensor], *, weight: float, form: OrthogonalityForm = "trainer"
) -> list[Tensor]:
    """∂(weight · R)/∂M for each matrix, equal shapes batched.

        trainer   weight/(2M) · 2 (M Mᵀ − I) M / ‖M Mᵀ − I‖_F   (0 at the optimum)     squared   weight · 4 (M Mᵀ − I) M

    Args: factors: matrices (R_i, n_i) with the components as rows; 2M of them.   weight ≥ 0.
    Returns: gradients of the same shapes. Source: derived; see `orthogonality`.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, M in enumerate(factors):
        by_shape.setdefault((*M.shape,), []).append(i)
    grads: list[Tensor] = [torch.empty(0)] * len(factors)
    for members in by_shape.values():
        M = torch.stack([factors[i].detach() for i in members])
        error = gram_error(M)
        if form == "trainer":
            norm = torch.linalg.matrix_norm(error, keepdim=True)
            error /= norm + (norm == 0)  # at the optimum 0 / 1
        slope = 2 * weight / len(factors) if form == "trainer" else 4 * weight
        for i, grad in zip(members, torch.baddbmm(M, error, M, beta=0, alpha=slope), strict=True):
            grads[i] = grad
    return grads


def mean_size(gates: Sequence[Tensor]) -> Tensor:
    """R = (1/N) Σ |e| over the N entries of all tensors; differentiable. Source: SoRA, published trainer."""
    return torch.cat([gate.flatten() for gate in gates]).abs().mean()


def mean_size_grad(gates: Sequence[Tensor], *, weight: float) -> list[Tensor]:
    """∂(weight · R)/∂e = (weight/N) sign(e) for each tensor; 0 for a gate at 0."""
    signs = list(torch._foreach_sign([gate.detach() for gate in gates]))
    torch._foreach_mul_(signs, weight / sum(gate.numel() for gate in gates))
    return signs
