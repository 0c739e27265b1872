"""What is done to parameters after the host's step, in place; plain functions on tensors."""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Group = Literal["row", "matrix"]


def zero_dropped(values: list[Tensor], kept: list[Tensor]) -> None:
    """values ← values ∘ kept, for many tensors at once: where `kept` is 0 a value becomes 0, where it is 1 it stays.

    A projection, not a freeze: the optimizer may move it again at the next step. Lists of equal length, pairwise equal
    shapes, dtypes and devices.
    """
    torch._foreach_mul_(values, kept)


def zero_least(A: Tensor, importance: Tensor, *, share: float, group: Group) -> Tensor:
    """A copy of A with zero for the ⌊share · n⌋ least important of the n entries of each row, or of the whole matrix.

    Exactly so many under ties, which go to the earlier row and column first; entries that are not a number come last.

    Args: A, importance: (…, r, in).   share: in [0, 1), taken as it is written: 0.29 of 100 is 29, although the float
        is a little less.   group: what n counts.
    Source: PRILoRA.   Differs: the published group is not known.
    """
    scores = importance.flatten(-2) if group == "matrix" else importance
    count = int(Fraction(str(share)) * scores.shape[-1])
    least = scores.argsort(dim=-1, stable=True)[..., :count]
    gone = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, least, True)
    return A.masked_fill(gone.view_as(A), 0)


def nonzero_marks(values: list[Tensor]) -> list[Tensor]:
    """1 where an entry is not zero, 0 where it is, for many tensors at once; for `zero_dropped`."""
    marks = torch._foreach_sign(values)
    torch._foreach_abs_(marks)
    return list(marks)
