"""What the controller expects of every pruning rule at run time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from ...decide.allocation import Kind
from ...decide.schedules import Run


@dataclass(frozen=True)
class Change:
    """A module that was changed: its index, the new rank minus the old, its mean score, and by what; by default a cut,
    which takes ranks (`retirement`) or gives them back (`birth`)."""

    module: int
    ranks: int
    score: float | None
    kind: Kind | None = None


class Pruner(Protocol):
    """The runtime side of a pruning rule; the controller calls it around every real step of the optimizer."""

    reads_inputs: bool  # wants `collect`

    @property
    def settled(self) -> bool:
        """Has everything been decided?"""
        ...

    def check(self, run: Run) -> None:
        """Raise ScheduleError if the schedule does not fit this run."""
        ...

    def start(self, run: Run, *, first: int) -> None:
        """A run begins, or goes on from a checkpoint, at step `first`. Raises ScheduleError."""
        ...

    def collect(self, module: int, x: Tensor) -> None:
        """One use of a module in a backward pass, with the input x (…, in) it had, before dropout."""
        ...

    def before_step(self, step: int, optimizer: Optimizer, *, scale: float) -> None:
        """Gradients are there, `scale` times too large."""
        ...

    def after_step(self, step: int) -> Sequence[Change]:
        """The optimizer has moved the parameters; its gradients are still there."""
        ...

    def forget(self) -> None:
        """The backward passes since the last step led to none."""
        ...

    def restored(self) -> None:
        """A state was loaded: another run goes on from here."""
        ...
