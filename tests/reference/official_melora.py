"""A slow, obvious twin of the *published* MELoRA code, written from our specification and from torch alone.

    y = x Wᵀ + b + concat_i( s · drop(x_i) A_iᵀ B_iᵀ )        x_i: the i-th slice of x        s = α/r

A loop over lists of mini adapters, with slices by floor division, as published. It shares no code with `increlora`.
One quirk is left out: a mask of dropout is drawn for x as a whole, not one per slice (the same distribution).
"""

import math

import torch
from torch import Tensor, nn

from tests.reference.toy import Initial


class OfficialMeLora(nn.Module):
    """Frozen W and bias, and n mini adapters of rank r; `initial` gives A_i and B_i by mini adapter."""

    def __init__(self, linear: nn.Linear, minis: int, r: int, alpha: float, initial: Initial, *, name: str = ""):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        d, k = (size // minis for size in linear.weight.shape)
        self.k, self.scale, self.dropout = k, alpha / r, nn.Dropout(0.0)
        self.lora_A = nn.ParameterList(initial(name, i, "A", (r, k)).clone() for i in range(minis))
        self.lora_B = nn.ParameterList(initial(name, i, "B", (d, r)).clone() for i in range(minis))

    def forward(self, x: Tensor) -> Tensor:
        dropped, parts = self.dropout(x), []
        for i, (A, B) in enumerate(zip(self.lora_A, self.lora_B)):
            parts.append(self.scale * (dropped[..., i * self.k : (i + 1) * self.k] @ A.T @ B.T))
        return nn.functional.linear(x, self.weight, self.bias) + torch.cat(parts, dim=-1)

    def delta_weight(self) -> Tensor:
        """ΔW, entry by entry: zero outside the blocks."""
        dense = torch.zeros_like(self.weight)
        for i, (A, B) in enumerate(zip(self.lora_A, self.lora_B)):
            d, k = B.shape[0], A.shape[1]
            dense[i * d : (i + 1) * d, i * k : (i + 1) * k] += self.scale * (B @ A)
        return dense


def adapt(model: nn.Module, targets: list[str], initial: Initial, **settings: float) -> nn.Module:
    """Replace the named `nn.Linear` modules of `model`, in place."""
    for name, linear in [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in targets]:
        model.set_submodule(name, OfficialMeLora(linear, initial=initial, name=name, **settings))
    return model


def standard_deviation(minis: int, in_features: int) -> float:
    """Of A's entries at the start: uniform in ±√(n/k)."""
    return math.sqrt(minis / (3 * in_features))
