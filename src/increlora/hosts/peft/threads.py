"""Two threads that train one adapter at once are told so: torch guards neither `.grad` nor parameters against that.

One thread's optimizer frees gradients that the other's backward pass adds to, and sooner or later the process dies.
"""

import itertools
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from ...deltas import Delta
from ...errors import DriveError

if TYPE_CHECKING:
    from .handle import Handle

STEP = Optimizer.profile_hook_step(lambda self: None)  # torch wraps every optimizer's `step` in this function
AT_WORK = {f.__code__ for f in (nn.Module.__call__, torch.autograd.backward, torch.autograd.grad, STEP)}


def enter(handle: "Handle", delta: Delta) -> None:
    """A forward pass of the adapter begins, at its first module, here with gradients. Raises DriveError if another
    thread, with a forward pass since which no parameter has moved, is computing right now."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or delta is not handle.first:
        return
    if torch._C._current_graph_task_id() >= 0:  # recomputed for a backward pass, by a thread of torch's own
        return
    candidates = itertools.chain(delta.parameters(), handle.shared.parameters() if handle.shared else ())
    p = next((p for p in candidates if p.requires_grad), None)
    if p is None:
        return
    here, users = threading.get_ident(), handle.users
    others = {user for user, version in list(users.items()) if user != here and version == p._version}
    if others and any(at_work(frame) for user, frame in sys._current_frames().items() if user in others):
        raise DriveError(
            f"{delta.name}: two threads train this adapter at once, and torch is not made for that (the process would "
            f"die sooner or later): train in one, read in others under torch.no_grad(), or give each a model of its own"
        )
    users[here] = p._version


def at_work(frame: FrameType | None) -> bool:
    """Does this call stack run a module, a backward pass, or the step of an optimizer?"""
    while frame is not None and frame.f_code not in AT_WORK:
        frame = frame.f_back
    return frame is not None
