"""Which base layers the fast path of `ops.fused_linear` may compute instead of them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ...ops.fused_linear import PLAIN, Pending


def pending(base: Any, x: Tensor, *, transposed: bool = False) -> Pending | None:
    """The output of a frozen linear layer without hooks, to be computed later; None for any other.

    base: an nn.Linear or Conv1D; the instance may have another forward pass.   transposed: the weight is (in, out).
    """
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    if _has_any_global_hook() or "forward" in base.__dict__:
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # they know plain operations best
        return None
    weight, bias = base.weight, base.bias
    if type(weight) not in PLAIN or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if type(x) not in PLAIN or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    return Pending(x, weight.t() if transposed else weight, bias, base)
