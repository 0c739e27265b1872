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


@torch.library.custom_op("increlora::tap", mutates_args=())
def tap(y: Tensor, x: Tensor, watcher: int) -> Tensor:
    """y; in the backward pass the watcher is told of x and ∂L/∂y."""
    return y.clone()


@torch.library.custom_op("increlora::tell", mutates_args=())
def tell(grad: Tensor, x: Tensor, watcher: int) -> Tensor:
    """∂L/∂y, once the watcher has seen it."""
    found = _watchers[watcher]
    if found.controller.tapping:  # a graph has the tap in it for as long as scores may be due
        found.collect(found.controller.deltas[found.index], x.detach(), grad.detach())
    return grad.clone()


@torch.library.custom_op("increlora::see", mutates_args=())
def see(A: Tensor, x: Tensor, watcher: int) -> Tensor:
    """A; in the backward pass the watcher is told of x."""
    return A.clone()


@torch.library.custom_op("increlora::tell_input", mutates_args=())
def tell_input(grad: Tensor, x: Tensor, watcher: int) -> Tensor:
    """∂L/∂A, once the watcher has seen x."""
    _watchers[watcher].collect_input(x.detach())
    return grad.clone()


def _like_the_first(first: Tensor, x: Tensor, watcher: int) -> Tensor:
    return torch.empty_like(first)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.watcher = inputs[2]


def _told(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return tell(grad, ctx.saved_tensors[0], ctx.watcher), None, None


def _told_input(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return tell_input(grad, ctx.saved_tensors[0], ctx.watcher), None, None


for operation in (tap, tell, see, tell_input):
    operation.register_fake(_like_the_first)
tap.register_autograd(_told, setup_context=_keep)
see.register_autograd(_told_input, setup_context=_keep)
