"""Restarts: what was learnt is put aside and stays part of the function; learning begins anew at zero (ReMoRA).

    after the step    restart due? the trained matrix joins the past of its module and becomes zero · its optimizer
                      state is dropped · its learning rate rises anew, by the method's clock

No rank changes, and neither does the function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ..decide.allocation import Holding
from ..decide.budget import Budget
from ..decide.schedules import Multiples, Run
from ..deltas import Status
from .base import Change, Deltas, Forecast, Rule, Runner, Step


@dataclass(frozen=True)
class Restart(Rule):
    """Begin a round in all modules at once, again and again.

    Attributes:
        schedule: run → when.
    """

    nonnegative = True

    schedule: Callable[[Run], Multiples]

    def bind(self, deltas: Deltas, budget: Budget, slot: int) -> "Restarter":
        return Restarter(self, deltas, slot)


class Restarter(Runner):
    """Runner of `Restart`, for deltas with a `restart()` that returns the parameter which is zero then."""

    def __init__(self, rule: Restart, deltas: Deltas, slot: int) -> None:
        super().__init__(deltas, slot)
        self.rule = rule
        self.rounds: list[Any] = self.deltas
        self.schedule: Multiples | None = None
        self.optimizer: Optimizer | None = None  # during a step
        self.step = -1
        self.reserve_statistics([0] * len(self.deltas))

    @property
    def done(self) -> bool:
        return self.schedule is not None and self.schedule.over(self.step)

    def forecast(self, holdings: Sequence[Holding], run: Run, first: int = 0) -> Forecast:
        self.rule.schedule(run)
        return Forecast((), tuple(holdings))

    def start(self, run: Run, first: int) -> None:
        self.schedule, self.step = self.rule.schedule(run), first - 1
        left = self.schedule.count - first // self.schedule.interval
        for delta in self.rounds:
            delta.make_room(delta.turns + left)

    def before_step(self, step: Step) -> None:
        self.optimizer = step.optimizer

    @torch.no_grad()
    def after_step(self, step: int) -> list[Change]:
        assert self.schedule is not None and self.optimizer is not None
        optimizer, self.optimizer = self.optimizer, None
        self.step = step
        if not self.schedule.due(step):
            return []
        for delta in self.rounds:
            optimizer.state.pop(delta.restart(), None)
            delta.become(0, Status.ACTIVE, step)
        return [Change(i, 0, kind="restart") for i in range(len(self.rounds))]
