"""Entries of A that are set to zero by their size and the inputs they meet (PRILoRA). Ranks never change.

    backward pass     sums of squares of every module's input, see `input_norms`
    after the step    zeros held at zero, if they may not regrow · N · pruning due? least |A_ij| · N_j become 0

Nothing here waits for the device.
Statistics of a module: N, and whether it was ever used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..decide.allocation import Holding
from ..decide.budget import Budget
from ..decide.projections import Group, nonzero_marks, zero_least
from ..decide.schedules import Multiples, Run
from ..decide.scores import weighted_magnitude
from ..ops.parallel import full, laid_out_like, local
from .base import Change, Deltas, Forecast, Rule, Runner, Sight, Step, finished
from .input_norms import InputNorms


@dataclass(frozen=True)
class Entries(Rule):
    """Set the entries of A to zero that matter least for the inputs there are, again and again; ranks stay.

    Attributes:
        schedule: run → when.   share: of the entries of each `group`, in [0, 1).
        beta: moving average of the input norms.   interval: of its updates, in steps.
        regrow: the optimizer may move a zero until the next pruning; otherwise zeros are held.
    """

    nonnegative = True

    schedule: Callable[[Run], Multiples]
    share: float
    group: Group
    beta: float
    interval: int
    regrow: bool

    def bind(self, deltas: Deltas, budget: Budget, slot: int) -> "EntryPruner":
        return EntryPruner(self, deltas, slot)


class EntryPruner(Runner):
    """Runner of `Entries`, for one-block deltas."""

    forgets = True
    wants: frozenset[Sight] = frozenset({"inputs"})

    def __init__(self, rule: Entries, deltas: Deltas, slot: int) -> None:
        super().__init__(deltas, slot)
        self.rule = rule
        self.norms = InputNorms(self.deltas, slot, beta=rule.beta)
        self.sound = True  # the step in progress has gradients
        self.marks: list[Tensor] = []  # during a step with held zeros: 1 where A is not zero
        self.reserve_statistics(self.norms.sizes)

    def forecast(self, holdings: Sequence[Holding], run: Run, first: int = 0) -> Forecast:
        self.rule.schedule(run)
        return Forecast((), tuple(holdings))

    def start(self, run: Run, first: int) -> None:
        self.schedule, self.steps = self.rule.schedule(run), run.steps
        self.check_statistics(self.norms.sizes)
        self.norms.lay_out(afresh=first == 0)
        self.parameters: list[nn.Parameter] = [delta.block(0)["A"] for delta in self.deltas]
        self.alike: dict[object, list[int]] = {}
        for i, A in enumerate(self.parameters):
            self.alike.setdefault((A.shape, A.dtype, A.device), []).append(i)
        self._settle(first - 1)

    def _settle(self, step: int) -> None:
        """Is anything left to be done once this step is over, and do the inputs of the next one count?"""
        over = self.schedule.over(step)
        for delta in self.deltas:
            if delta.state.settled != over:
                delta.assign(settled=over)
        last = self.steps is not None and step + 1 >= self.steps  # what comes now may be a new run
        wanted = last or (not over and (step + 1) % self.rule.interval == 0)
        self.wants = frozenset({"inputs"}) if wanted else frozenset()

    def see_inputs(self, module: int, x: Tensor) -> None:
        self.norms.collect(module, x)

    def forget(self, module: int | None = None) -> None:
        self.norms.forget()

    def restored(self) -> None:
        self.wants = frozenset({"inputs"})  # until `start` says otherwise

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        self.sound = any(p.grad is not None for p in self.parameters)  # a step that was judged bad has none
        held = not self.rule.regrow and step.number > self.schedule.first
        self.marks = nonzero_marks(self._values()) if held else []

    @torch.no_grad()
    def after_step(self, step: int) -> list[Change]:
        done = self.done
        if self.marks:
            torch._foreach_mul_(self._values(), self.marks)
        if not self.schedule.over(step - 1) and self.sound and step % self.rule.interval == 0:
            self.norms.update()
        if self.schedule.due(step):
            self._prune()
        self._settle(step)
        return finished(self.deltas) if self.done and not done else []

    def _values(self) -> list[Tensor]:
        """A of every module, this process's part of it."""
        return [local(A.detach()) for A in self.parameters]

    def pruned(self) -> list[Tensor]:
        return self._values()

    def _prune(self) -> None:
        """One pass over all modules of a shape; a module that was never used stays as it is."""
        for members in self.alike.values():
            A = torch.stack([full(self.parameters[i].detach()) for i in members])
            N = torch.stack([self.deltas[i].statistics[self.slot] for i in members]).to(A.device).unsqueeze(1)
            importance = weighted_magnitude(A, N[..., :-1])
            pruned = zero_least(A, importance, share=self.rule.share, group=self.rule.group)
            pruned = torch.where(N[..., -1:] > 0, pruned, A)
            parts = [local(laid_out_like(part, self.parameters[i])) for i, part in zip(members, pruned, strict=True)]
            torch._foreach_copy_([local(self.parameters[i].detach()) for i in members], parts)
