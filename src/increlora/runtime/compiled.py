"""The taps as operations of torch's own, for `torch.compile`: it does not look into them, so they break no graph.

A graph holds no Python objects, so a watcher goes by its number. The taps of `taps` do the same without copies; they
are custom functions of autograd, whose side effects a compiler would have to refuse.
"""

import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .taps import Watcher

_numbers = count()
_watchers: "weakref.WeakValueDictionary[int, Watcher]" = weakref.WeakValueDictionary()


def register(watcher: "Watcher") -> int:
    """The number under which graphs know this watcher."""
    number = next(_numbers)
    _watchers[number] = watcher
    return number


@torch.library.custom_op("increlora::tap_output", mutates_args=())
def tap_output(y: Tensor, x: Tensor, watcher: int) -> Tensor:
    """y; in the backward pass the watcher sees x and ∂L/∂y."""
    return y.clone()


@torch.library.custom_op("increlora::see_gradients", mutates_args=())
def see_gradients(grad: Tensor, x: Tensor, watcher: int) -> Tensor:
    """∂L/∂y, once the watcher has seen it."""
    _watchers[watcher].see_gradients(x.detach(), grad.detach())
    return grad.clone()


@torch.library.custom_op("increlora::tap_input", mutates_args=())
def tap_input(A: Tensor, x: Tensor, watcher: int) -> Tensor:
    """A; in the backward pass the watcher sees x."""
    return A.clone()


@torch.library.custom_op("increlora::see_inputs", mutates_args=())
def see_inputs(grad: Tensor, x: Tensor, watcher: int) -> Tensor:
    """∂L/∂A, once the watcher has seen x."""
    _watchers[watcher].see_inputs(x.detach())
    return grad.clone()


def _like_the_first(first: Tensor, x: Tensor, watcher: int) -> Tensor:
    return torch.empty_like(first)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.watcher = inputs[2]


for operation in (tap_output, see_gradients, tap_input, see_inputs):
    operation.register_fake(_like_the_first)
tap_output.register_autograd(
    lambda ctx, grad: (see_gradients(grad, *ctx.saved_tensors, ctx.watcher), None, None), setup_context=_keep
)
tap_input.register_autograd(
    lambda ctx, grad: (see_inputs(grad, *ctx.saved_tensors, ctx.watcher), None, None), setup_context=_keep
)
