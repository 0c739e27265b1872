"""Restarts of square matrices (ReMoRA): no rank changes, and neither does the function.

    after the step    restart due? M joins the past of its module · M becomes zero · its optimizer state is dropped

The learning rate of the new round follows the method's clock, as that of a newborn block does.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...decide.schedules import RestartSteps, Run
from ...deltas import BlockDelta
from ...methods import Restarts
from ...ops.parallel import full
from ...structural.mora.delta import SquareDelta
from .base import Change


class Restarter:
    """Begins a round in all modules at once. See `Restarts`."""

    reads_inputs = False
    settled = True  # nothing is ever pruned

    def __init__(self, rule: Restarts, deltas: Mapping[str, BlockDelta]) -> None:
        self.rule = rule
        self.deltas = [delta for delta in deltas.values() if isinstance(delta, SquareDelta)]
        self.schedule: RestartSteps | None = None
        self.optimizer: Optimizer | None = None  # during a step

    def check(self, run: Run) -> None:
        self.rule.schedule(run)

    def start(self, run: Run, *, first: int) -> None:
        self.schedule = self.rule.schedule(run)

    def collect(self, module: int, x: Tensor) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        pass

    def restored(self) -> None:
        pass

    def before_step(self, step: int, optimizer: Optimizer, *, scale: float) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def after_step(self, step: int) -> Sequence[Change]:
        assert self.schedule is not None and self.optimizer is not None
        optimizer, self.optimizer = self.optimizer, None
        if not self.schedule.due(step):
            return []
        for delta in self.deltas:
            delta.restart(full(delta.lora_M0.detach()))
            delta.born[0] = step
            optimizer.state.pop(delta.lora_M0, None)
        return [Change(i, 0, None, "restart") for i in range(len(self.deltas))]
