"""Importance of a module, or of a rank, from weights and gradients. Plain functions on tensors.

Legend: A (R, in), B (out, R), dW (out, in), G (out, in) = ∂L/∂ΔW, X (N, in) inputs, D (N, out) = ∂L/∂Y, so G = Dᵀ X.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["sqrt_numel", "mean", "sum"]
TILE_NUMEL = 1 << 20  # entries of one row panel of G; 4 MiB in float32


def normaliser(norm: Norm, numel: int) -> float:
    """Divisor of Σ|ΔW∘G|: √(mn) as in the published code, mn as in the paper's equation, or 1."""
    return {"sqrt_numel": math.sqrt(numel), "mean": float(numel), "sum": 1.0}[norm]


def delta_sensitivity(
    A: Tensor,
    B: Tensor,
    X: Tensor | None,
    D: Tensor,
    *,
    norm: Norm = "sqrt_numel",
    numel: int | None = None,
    tile_numel: int = TILE_NUMEL,
) -> Tensor:
    """Entry-wise sensitivity of a module, exact, without storing ΔW or G.

        S = (1/√(mn)) Σ_ij |ΔW_ij · G_ij|      ΔW = B A,  G = Dᵀ X,   one panel of rows at a time

    Args:
        A, B: (R, in) and (out, R), scales folded in.   X, D: (N, in) and (N, out), any floating dtype; X None: the
            identity, so that D is Gᵀ.   norm: `sqrt_numel` (published code), `mean` (paper) or `sum`.
        numel: m·n, if A and X omit columns of zero gradient.   tile_numel: entries of G stored at once.
    Returns: 0-dim tensor, float32 (float64 for float64 input), ≥ 0.
    Source: IncreLoRA, section 3.2; the panel form is ours. |·| is inside the sum, so scores of parts do not add up.
    """
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    A, B, D = (t.detach().to(dtype) for t in (A, B, D))
    X = X.detach().to(dtype) if X is not None else None
    rows = max(1, tile_numel // max(1, A.shape[1]))
    total = A.new_zeros(())
    for start in range(0, B.shape[0], rows):
        panel = slice(start, start + rows)
        G = D[:, panel].t() if X is None else D[:, panel].t() @ X
        total += (B[panel] @ A).mul_(G).abs_().sum()
    return total / normaliser(norm, numel or B.shape[0] * A.shape[1])


def signed_sensitivity(B: Tensor, B_grad: Tensor) -> Tensor:
    """|Σ_ij ΔW_ij G_ij| = |⟨B, ∂L/∂B⟩|: the first-order change of the loss if ΔW were removed.

    A cheap alternative to `delta_sensitivity`, but a different criterion: entries of opposite sign cancel, so it can be
    0 where the entry-wise score is large. B, B_grad (out, R); returns a 0-dim tensor ≥ 0 in float32 or float64.
    """
    dtype = torch.float64 if B.dtype == torch.float64 else torch.float32
    return (B.detach().to(dtype) * B_grad.to(dtype)).sum().abs()


def smooth(
    sensitivity: Tensor, uncertainty: Tensor, score: Tensor, *, beta: float, beta_uncertainty: float
) -> tuple[Tensor, Tensor]:
    """Moving averages of a score and of its fluctuation; importance is their product I · U.

        I ← β₁ I + (1 − β₁) S        U ← β₂ U + (1 − β₂) |I − S|      (the updated I; no bias correction)

    Non-finite scores leave both unchanged for that entry. All tensors of one shape, β in [0, 1).
    Source: IncreLoRA, section 3.2 (as in AdaLoRA). Differs: in the published code a NaN stays in the averages forever.
    """
    finite = score.isfinite()
    updated = beta * sensitivity + (1 - beta) * score
    sensitivity_new = torch.where(finite, updated, sensitivity)
    spread = beta_uncertainty * uncertainty + (1 - beta_uncertainty) * (updated - score).abs()
    return sensitivity_new, torch.where(finite, spread, uncertainty)


def entry_sensitivity(weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """S = |w · g| of every entry; for many tensors at once, all of one floating dtype."""
    score: list[Tensor] = list(torch._foreach_mul(weights, gradients))
    torch._foreach_abs_(score)
    return score


def smooth_entries(
    sensitivity: list[Tensor], uncertainty: list[Tensor], score: list[Tensor], *, beta: float, beta_uncertainty: float
) -> None:
    """Moving averages of the sensitivity of every entry, in place; for many tensors at once.

        I ← β₁ I + (1 − β₁) S        U ← β₂ U + (1 − β₂) |S − I|      (the updated I)

    Args: three lists of tensors of pairwise equal shapes, all of one floating dtype; β in [0, 1). `score` is used up.
    Source: AdaLoRA, published code. Differs: nothing; six calls for all tensors instead of eleven for each.
    """
    torch._foreach_lerp_(sensitivity, score, 1 - beta)
    torch._foreach_sub_(score, sensitivity)
    torch._foreach_abs_(score)
    torch._foreach_lerp_(uncertainty, score, 1 - beta_uncertainty)


def weighted_magnitude(A: Tensor, norms: Tensor) -> Tensor:
    """Importance of every entry of A for the inputs there are: S_ij = |A_ij| · N_j.

    Args: A: (…, r, in).   norms: N ≥ 0, (…, 1, in), a moving average of the norms of the input's features.
    Returns: (…, r, in), in the dtype of `norms`.   Source: PRILoRA (the product as in Wanda).
    """
    return A.detach().abs().to(norms.dtype) * norms


def triplet_scores(A: Tensor, e: Tensor, B: Tensor) -> Tensor:
    """Importance of each rank from the importance s = I · U of the entries of its triplet.

        S_i = s(e_i) + mean_j s(A_ij) + mean_j s(B_ji)

    A (…, k, in), e (…, k, 1), B (…, out, k), all ≥ 0 → (…, k). Source: AdaLoRA, published code.
    """
    return e.squeeze(-1) + A.mean(-1) + B.mean(-2)
