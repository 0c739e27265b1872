"""Learning rates of newborn tensors inside the optimizer's groups: scale the update, not the group.

    new = old + m (new − old)        m = (own clock) / (the host's clock)

Exact for every optimizer whose update is proportional to its learning rate: torch's AdamW (decoupled decay included),
Adam, SGD, RMSprop, Adagrad. Not for schedule-free optimizers, nor for bf16 adapter weights, where small moves are lost.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..decide.schedules import Run
from ..deltas import BlockDelta, Status
from ..methods.base import Clock

PROPORTIONAL = {"AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta"}


class BirthRates:
    """Remembers newborn tensors before the optimizer step and shortens (or stretches) their move after it."""

    def __init__(self, clock: Clock, run: Run, optimizer: Optimizer) -> None:
        self.clock, self.run, self.optimizer_name = clock, run, type(optimizer).__name__
        self.first = optimizer.param_groups[0]
        self.groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        clock(0, -1, run)  # a share of a run of unknown length is refused here, before anything moves
        self._moved: list[tuple[float, nn.Parameter, Tensor]] = []
        self._warned = False

    def factors(self, created: int, step: int, p: nn.Parameter | None = None) -> tuple[float, float]:
        """(own factor, multiplier of the host's move) of a tensor created at `created`; in the group of `p`, or in the
        first one.

        The peak learning rate is what torch's schedulers note in the group; without one the host is taken to follow the
        published schedule. (The first rate seen would not do: a resumed run starts with another one.)"""
        own, host = self.clock(step, created, self.run)
        if created < 0:
            return own, 1.0
        if host is None:
            return own, own
        group = self.groups.get(id(p), self.first)
        peak, rate = group.get("initial_lr"), float(group["lr"])
        if peak is not None:
            return own, own * peak / rate if rate > 0 else 0.0
        return own, own / host if host > 0 else 0.0

    def remember(self, deltas: Sequence[BlockDelta], step: int) -> None:
        self._moved = []
        grown: dict[int, bool] = {-1: True}  # is the warm-up of what was created then over?
        for delta in deltas:
            for i in delta.indices(Status.ACTIVE, Status.RESERVE):
                for letter, p in delta.block(i).items():
                    born = created(delta, i, letter)
                    if born not in grown:
                        grown[born] = self.clock(step, born, self.run) == (1.0, None)
                    if not grown[born] and p.grad is not None:
                        m = self.factors(born, step, p)[1]
                        if m != 1.0:
                            self._moved.append((m, p, p.detach().clone()))
        if self._moved and not self._warned:
            self._warn()

    @torch.no_grad()
    def apply(self) -> None:
        for m in {m for m, _, _ in self._moved}:
            now: list[Tensor] = [p for k, p, _ in self._moved if k == m]
            torch._foreach_lerp_(now, [old for k, _, old in self._moved if k == m], 1 - m)
        self._moved = []

    def _warn(self) -> None:
        self._warned = True
        if self.optimizer_name not in PROPORTIONAL:
            message = (
                f"the birth learning rate is exact for {sorted(PROPORTIONAL)}, not known for {self.optimizer_name}"
            )
        elif self._moved[0][1].dtype in (torch.bfloat16, torch.float16):
            message = (
                f"adapter weights in {self._moved[0][1].dtype} lose the small moves of newborn ranks; keep float32"
            )
        else:
            return
        warnings.warn(message, stacklevel=2)


def created(delta: BlockDelta, index: int, letter: str) -> int:
    """Step after which a tensor entered training: A and B of a learning reserve on entering it, all else at birth."""
    learnt_in_reserve = delta.reserve_learns and letter != "E"
    state = delta.state
    return state.reserved[index] if learnt_in_reserve and state.reserved[index] >= 0 else state.born[index]


def births_of(delta: BlockDelta) -> dict[str, int]:
    """{tensor: `created`} of the blocks that are computed or in reserve."""
    blocks = delta.indices(Status.ACTIVE, Status.RESERVE)
    return {f"lora_{letter}{i}": created(delta, i, letter) for i in blocks for letter in delta.letters}


def unmoved(delta: BlockDelta, step: int) -> list[nn.Parameter]:
    """Newborn tensors that no optimizer step has moved when `step` of them are done."""
    blocks = [(i, letter, p) for i in delta.live for letter, p in delta.block(i).items()]
    return [p for i, letter, p in blocks if created(delta, i, letter) >= max(0, step - 1)]
