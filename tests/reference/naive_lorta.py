"""LoRTA the naive way: the whole order-5 tensor by one einsum, a dense slice of it for every module."""

import torch
from torch import Tensor, nn

MATRICES = "qkvo"


class Factors(nn.Module):
    """The five factors, by the names they have in the library."""

    def __init__(self, A: Tensor, B: Tensor, C_head: Tensor, C_matrix: Tensor, C_layer: Tensor) -> None:
        super().__init__()
        given = {"A": A, "B": B, "C_head": C_head, "C_matrix": C_matrix, "C_layer": C_layer}
        for name, values in given.items():
            setattr(self, name, nn.Parameter(values.detach().clone()))

    def tensor(self) -> Tensor:
        """T without its scale: (d, d_h, H, 4, L)."""
        return torch.einsum("ir,jr,hr,mr,lr->ijhml", self.A, self.B, self.C_head, self.C_matrix, self.C_layer)


def dense(factors: Factors, role: str, layer: int, alpha: float, *, key_heads: int, heads_out: bool) -> Tensor:
    """ΔW (out, in) of one projection; k and v of fewer heads are means of what they would be for every query head."""
    T = alpha / factors.A.shape[1] * factors.tensor()[:, :, :, MATRICES.index(role), layer]  # (d, d_h, H)
    by_head = T.permute(2, 1, 0)  # (H, d_h, d)
    if role in "kv":
        by_head = by_head.unflatten(0, (key_heads, -1)).mean(1)
    W = by_head.reshape(-1, T.shape[0])
    return W if heads_out else W.T


class NaiveLorta(nn.Module):
    """A linear map and its slice, added as a dense matrix."""

    def __init__(self, base: nn.Linear, factors: Factors, dropout: float, **where: object) -> None:
        super().__init__()
        self.base, self.where, self.dropout = base, where, nn.Dropout(dropout)
        self._factors = (factors,)

    def weight(self) -> Tensor:
        return dense(self._factors[0], **self.where)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.weight().T


def adapt(
    net: nn.Module, factors: Factors, alpha: float, *, key_heads: int, sides: dict[str, bool], dropout: float
) -> nn.Module:
    """`net` (an AttentionNet) with every projection adapted; it owns the factors. sides: role → heads on the output?"""
    net.factors = factors
    for i, layer in enumerate(net.layers):
        for role in sides:
            where = {"role": role, "layer": i, "alpha": alpha, "key_heads": key_heads, "heads_out": sides[role]}
            setattr(layer, f"{role}_proj", NaiveLorta(getattr(layer, f"{role}_proj"), factors, dropout, **where))
    return net
