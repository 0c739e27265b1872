"""Changes to parameters after the optimizer's step; plain functions on tensors."""

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Group = Literal["row", "matrix"]
Projection = Callable[[Tensor, float], Tensor]  # (gates, threshold) → gates


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """T_ξ(v) = sign(v) · max(|v| − ξ, 0): the proximal operator of ξ·Σ|v|, which sets small values to exactly 0.

    Any shape, ξ ≥ 0. Source: SoRA (arXiv 2311.11696), proximal gradient step."""
    return torch.nn.functional.softshrink(values, threshold)


def published_shrink(values: Tensor, threshold: float) -> Tensor:
    """SoRA's published code uses this instead of T_ξ: its dead zone is twice as wide.

    v − sign(v) ξ   if |v| ≥ 2ξ           v   if |v| = ξ exactly           0   otherwise
    """
    shrunk = torch.where(values.abs() > threshold, values - values.sign() * threshold, values)
    return torch.where(shrunk.abs() < threshold, 0.0, shrunk)


def shrink_together(tensors: list[Tensor], operator: Projection, threshold: float) -> None:
    """tensors ← operator(tensors, ξ), in place; all tensors with the same device and dtype in a single pass."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for members in groups.values():
        shrunk = operator(torch.cat([t.flatten() for t in members]), threshold)
        parts = shrunk.split([t.numel() for t in members])
        torch._foreach_copy_(members, [part.view_as(t) for part, t in zip(parts, members, strict=True)])


def zero_least(A: Tensor, importance: Tensor, *, share: float, group: Group) -> Tensor:
    """A copy of A with zero for the ⌊share · n⌋ least important of the n entries of each row, or of the whole matrix.

    The number is exact under ties: earlier rows and columns are zeroed first. NaN entries come last.

    Args: A, importance: (…, r, in).   share: in [0, 1), as a decimal number: 0.29 of 100 is 29, although the float is
        slightly less.   group: the entries that n counts.
    Source: PRILoRA.   Differs: the published group is not known.
    """
    scores = importance.flatten(-2) if group == "matrix" else importance
    count = int(Fraction(str(share)) * scores.shape[-1])
    least = scores.argsort(dim=-1, stable=True)[..., :count]
    gone = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, least, True)
    return A.masked_fill(gone.view_as(A), 0)


def nonzero_marks(values: list[Tensor]) -> list[Tensor]:
    """1 where an entry is nonzero, else 0, for many tensors at once."""
    marks = torch._foreach_sign(values)
    torch._foreach_abs_(marks)
    return list(marks)
