"""Pruning of single entries of A by their size and the inputs they meet (PRILoRA). Ranks never change.

    backward pass     sums of squares of every module's input, see `inputs`
    after the step    zeros held at zero, if they may not regrow · N · pruning due? least |A_ij| · N_j become 0

Nothing here waits for the device.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...decide.projections import nonzero_marks, zero_dropped, zero_least
from ...decide.schedules import PruneSteps, Run
from ...decide.scores import weighted_magnitude
from ...deltas import BlockDelta
from ...methods import EntryPruning
from ...ops.parallel import full, laid_out_like, local
from .base import Change
from .inputs import InputNorms


class EntryPruner:
    """Prunes A of one-block deltas. See `EntryPruning`."""

    def __init__(self, rule: EntryPruning, deltas: Mapping[str, BlockDelta]) -> None:
        self.rule, self.deltas = rule, list(deltas.values())
        self.norms = InputNorms(deltas, beta=rule.beta)
        self.schedule: PruneSteps | None = None
        self.reads_inputs = True  # until a run says otherwise: its first step comes before `start`
        self.sound = True  # the step in progress has gradients
        self.marks: list[Tensor] = []  # during a step with held zeros: 1 where A is not zero

    @property
    def settled(self) -> bool:
        return all(delta.settled for delta in self.deltas)

    # -- one run -------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        self.rule.schedule(run)

    def start(self, run: Run, *, first: int) -> None:
        self.schedule, self.steps = self.rule.schedule(run), run.steps
        self.norms.lay_out(afresh=first == 0)
        self.parameters: list[nn.Parameter] = [delta.block(0)["A"] for delta in self.deltas]
        self.alike: dict[object, list[int]] = {}
        for i, A in enumerate(self.parameters):
            self.alike.setdefault((A.shape, A.dtype, A.device), []).append(i)
        self._settle(first - 1)

    def _settle(self, step: int) -> None:
        """Is anything left to be done once this step is over, and is the next one listened to?"""
        assert self.schedule is not None
        over = self.schedule.over(step)
        for delta in self.deltas:
            delta.settled = over
        finished = self.steps is not None and step + 1 >= self.steps  # what comes now may be a new run
        self.reads_inputs = finished or (not over and (step + 1) % self.rule.interval == 0)

    # -- one step ------------------------------------------------------------------------------------------------

    def collect(self, module: int, x: Tensor) -> None:
        self.norms.collect(module, x)

    def forget(self) -> None:
        self.norms.forget()

    def restored(self) -> None:
        self.reads_inputs = True  # until `start` says otherwise

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer, *, scale: float) -> None:
        assert self.schedule is not None
        self.sound = any(p.grad is not None for p in self.parameters)  # a step that was judged bad has none
        held = not self.rule.regrow and step > self.schedule.first
        self.marks = nonzero_marks(self._values()) if held else []

    @torch.no_grad()
    def after_step(self, step: int) -> Sequence[Change]:
        assert self.schedule is not None
        if self.marks:
            zero_dropped(self._values(), self.marks)
        if not self.schedule.over(step - 1) and self.sound and step % self.rule.interval == 0:
            self.norms.update()
        if self.schedule.due(step):
            self._prune()
        self._settle(step)
        return []

    def _values(self) -> list[Tensor]:
        """A of every module, this process's part of it."""
        return [local(A.detach()) for A in self.parameters]

    def _prune(self) -> None:
        """One pass over all modules of a shape; a module that was never heard of stays as it is."""
        for members in self.alike.values():
            A = torch.stack([full(self.parameters[i].detach()) for i in members])
            N = torch.stack([self.deltas[i].statistics for i in members]).to(A.device).unsqueeze(1)
            importance = weighted_magnitude(A, N[..., :-1])
            pruned = zero_least(A, importance, share=self.rule.share, group=self.rule.group)
            pruned = torch.where(N[..., -1:] > 0, pruned, A)
            parts = [local(laid_out_like(part, self.parameters[i])) for i, part in zip(members, pruned, strict=True)]
            torch._foreach_copy_([local(self.parameters[i].detach()) for i in members], parts)
