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
def tap(value: Tensor, x: Tensor, watcher: int, sight: str) -> Tensor:
    """A layer's output (sight: "gradients") or A ("inputs"); in the backward pass the watcher sees what `see` shows."""
    return value.clone()


@torch.library.custom_op("increlora::see", mutates_args=())
def see(grad: Tensor, x: Tensor, watcher: int, sight: str) -> Tensor:
    """The gradient of what was tapped, once the watcher has seen it together with x ("gradients"), or x ("inputs")."""
    if sight == "gradients":
        _watchers[watcher].see_gradients(x.detach(), grad.detach())
    else:
        _watchers[watcher].see_inputs(x.detach())
    return grad.clone()


def _like_the_first(first: Tensor, x: Tensor, watcher: int, sight: str) -> Tensor:
    return torch.empty_like(first)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return see(grad, *ctx.saved_tensors, *ctx.rest), None, None, None


tap.register_fake(_like_the_first)
see.register_fake(_like_the_first)
tap.register_autograd(_backward, setup_context=_keep)
