"""A slow, obvious twin of LoRA-Mini, from our specification and from torch alone; it shares no code with `increlora`.

    y = x Wᵀ + b + s · drop(x) A_auxᵀ Aᵀ Bᵀ B_auxᵀ          s = α/r

`PublishedMini` is the linear class of the one published file that could be read, its defects included: the auxiliaries
are N(0, 1) parameters with gradients, and both trained matrices start at zero.
"""

import torch
from torch import Tensor, nn


class NaiveMini(nn.Module):
    """Frozen W and bias, four matrices, of which A and B train; nothing is multiplied out first."""

    def __init__(self, linear: nn.Linear, alpha: float, A_aux: Tensor, A: Tensor, B: Tensor, B_aux: Tensor):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(p.detach().clone(), requires_grad=False) for p in linear.parameters())
        self.A_aux, self.B_aux = (nn.Parameter(t.detach().clone(), requires_grad=False) for t in (A_aux, B_aux))
        self.A, self.B = (nn.Parameter(t.detach().clone()) for t in (A, B))
        self.scale, self.dropout = alpha / A.shape[0], nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(x) @ self.A_aux.T
        h = h @ self.A.T
        h = h @ self.B.T
        return x @ self.weight.T + self.bias + self.scale * (h @ self.B_aux.T)

    def delta_weight(self) -> Tensor:
        return self.scale * (self.B_aux @ (self.B @ (self.A @ self.A_aux)))


class PublishedMini(NaiveMini):
    """As published; `seed` of the auxiliaries."""

    def __init__(self, linear: nn.Linear, alpha: float, r: int, a: int, b: int, seed: int = 0):
        generator, (out_features, in_features) = torch.Generator().manual_seed(seed), linear.weight.shape
        A_aux = torch.randn(a, in_features, generator=generator).to(linear.weight)
        B_aux = torch.randn(out_features, b, generator=generator).to(linear.weight)
        super().__init__(linear, alpha, A_aux, A_aux.new_zeros(r, a), A_aux.new_zeros(b, r), B_aux)
        self.requires_grad_(True)
        self.weight.requires_grad_(False)


def trainable_by_name(model: nn.Module) -> list[str]:
    """The usual rule of LoRA libraries: whatever belongs to the adapter trains."""
    return [name for name, p in model.named_parameters() if p.requires_grad and name not in ("weight", "bias")]
