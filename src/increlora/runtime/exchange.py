"""Optimizers that keep two sets of weights and exchange them between steps, by `train` and `eval` (schedule-free ones).

What pruning has set to zero in the one is not zero in the other, which no gradient has pulled there: it stays zero.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..decide.projections import nonzero_marks

Tensors = Callable[[], list[Tensor]]


def keep_zeros(optimizer: Optimizer, pruned: "weakref.ref[Tensors]") -> None:
    """Have entries of the `pruned` tensors that are zero stay zero whenever this optimizer exchanges its weights."""
    for name in ("train", "eval"):
        if callable(getattr(optimizer, name, None)):
            setattr(optimizer, name, kept_zero(optimizer, name, pruned))


def kept_zero(optimizer: Optimizer, name: str, pruned: "weakref.ref[Tensors]") -> Callable[..., Any]:
    """The optimizer's method with ours around it. It refers to the optimizer weakly, which would else wait for Python's
    garbage collector, with all its state."""
    above: Any = vars(optimizer).get(name)
    itself, below = weakref.ref(optimizer), getattr(type(optimizer), name, above)

    @functools.wraps(below)
    def exchange(*args: Any, **kwargs: Any) -> Any:
        find = pruned()
        tensors = find() if find is not None else []
        marks = nonzero_marks(tensors) if tensors else []
        result = above(*args, **kwargs) if above is not None else below(itself(), *args, **kwargs)
        if tensors:
            torch._foreach_mul_(tensors, marks)
        return result

    return exchange
