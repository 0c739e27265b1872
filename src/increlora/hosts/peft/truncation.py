"""The best approximation of ΔW = B A with fewer ranks, computed from the small factors only.

B = Q_b R_b     Aᵀ = Q_a R_a     R_b R_aᵀ = U diag(σ) Vᵀ (r × r)     B' = Q_b U_k √σ_k     A' = √σ_k V_kᵀ Q_aᵀ
‖B A − B' A'‖ / ‖B A‖ = √(Σ_{i>k} σ_i²) / √(Σ σ_i²)       (Frobenius; no rank-k matrix comes closer)
"""

import torch
from torch import Tensor


@torch.no_grad()
def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A', B', error) with at most `rank` ≥ 1 ranks.

    Args:
        A: (r, in).   B: (out, r).   rank: factors with at most this rank are returned unchanged, with error 0.
    Returns: A' (k, in) and B' (out, k) with k = min(rank, in, out) in the dtype of A and B, computed in float64, and
        the relative Frobenius error. The norm of each component is shared evenly between A' and B'.
    """
    if A.shape[0] <= rank:
        return A, B, 0.0
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().t())
    U, sigma, Vt = torch.linalg.svd(r_b @ r_a.t())
    rank = min(rank, len(sigma))  # wide factors of a small matrix
    root = sigma[:rank].sqrt()
    error = float(sigma[rank:].norm() / sigma.norm()) if sigma.any() else 0.0
    small_a = root[:, None] * (Vt[:rank] @ q_a.t())
    small_b = (q_b @ U[:, :rank]) * root
    return small_a.to(A.dtype), small_b.to(B.dtype), error
