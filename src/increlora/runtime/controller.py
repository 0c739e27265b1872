"""The one object with side effects: it follows an optimizer by two hooks and changes block states, never parameters'
shapes, groups or the loss.

    before the step   overflow, or no backward of ours? leave · scores · penalty · silence idle blocks
    the step          the host's optimizer, untouched
    after the step    birth learning rates · pruning · moving averages · due? scores → plan → apply → events
"""

import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..decide.allocation import Event, Holding, Kind
from ..decide.schedules import GrowthSteps, Run
from ..decide.scores import smooth
from ..decide.selection import spent
from ..deltas import BlockDelta, Status
from ..methods import Method
from ..ops.parallel import all_finite, mean_over_processes
from . import amp, scoring
from .births import BirthRates, unmoved
from .health import Health
from .ownership import check_optimizer
from .penalty import add_penalty
from .pruning import Pruner, pruner_of
from .records import record
from .taps import Watcher


class Controller:
    """Drives the adaptive blocks of one adapter; made by the host when the adapter is injected.

    Attributes:
        names, deltas: adapted modules in model order.   events: what happened so far.
        records: one entry per step while `recording` (see `records.record`).
        step: optimizer steps of this run so far.   run: its length and number of modules, once known.
        sensitivity, uncertainty: moving averages of the scores, shape (modules,).
    """

    def __init__(
        self, method: Method, deltas: Mapping[str, BlockDelta], *, on_change: Callable[[], None] | None = None
    ) -> None:
        self.method = method
        self.names, self.deltas = list(deltas), list(deltas.values())
        self.on_change = on_change or (lambda: None)
        self.events: list[Event] = []
        self.records: list[dict[str, object]] = []
        self.recording = False
        self.step, self.restored_step = 0, 0
        self.expected_steps: int | None = None
        self.expected_start: int | None = None
        self.run = Run(method.total_steps, len(self.names))
        self.growth: GrowthSteps | None = None
        self.births: BirthRates | None = None
        self.pruner = pruner_of(method, deltas)
        self.health = Health()
        self.used = False  # a forward pass of ours since the last step
        self.penalty_given = False  # the penalty's gradient of this step is already there
        self.stepping = False  # between the two hooks of a step
        self.trainer_step: int | None = None
        self.tapping = True  # before the first step: to count backward passes
        self.watching = True  # the same, or a score may still be due: what compiled graphs go by
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._former: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        dtype = torch.float64 if self.parameter(0).dtype == torch.float64 else torch.float32
        self.sensitivity = torch.zeros(len(self.names), dtype=dtype)
        self.uncertainty = torch.zeros(len(self.names), dtype=dtype)
        self.watchers = [Watcher(self, i) for i in range(len(self.names))]
        for delta, watcher in zip(self.deltas, self.watchers, strict=True):
            watcher.load_state(delta.remembered if delta.observer is None else delta.observer.state())  # a copy's
            delta.observer = watcher
        fresh = method.allocate is not None and all(d.indices(Status.ACTIVE) == [0] for d in self.deltas)
        if fresh or not self.finished:  # a start above the budget counts as finished, and is an error all the same
            scoring.check_budget(self.holdings(), method.budget)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def driven(self) -> bool:
        """Does an optimizer hold our parameters, as far as we have seen?"""
        return self._optimizer is not None

    @property
    def finished(self) -> bool:
        """Is the budget spent?"""
        return self.method.allocate is None or spent(self.holdings(), self.method.budget)

    def parameter(self, index: int) -> nn.Parameter:
        return next(iter(self.deltas[index].block(0).values()))

    def parameters(self) -> Iterator[nn.Parameter]:
        for delta in self.deltas:
            yield from delta.held()

    def holdings(self) -> list[Holding]:
        """What every module holds, as allocators see it."""
        return [
            Holding(name, d.rank, tuple(d.sizes[i] for i in self._free(d)), d.in_features + d.out_features)
            for name, d in zip(self.names, self.deltas, strict=True)
        ]

    def _free(self, delta: BlockDelta) -> list[int]:
        return delta.indices(Status.RESERVE, Status.DORMANT)

    @property
    def ranks(self) -> dict[str, int]:
        """Active rank per module."""
        return {name: delta.rank for name, delta in zip(self.names, self.deltas, strict=True)}

    # -- attaching -----------------------------------------------------------------------------------------------

    def expect(self, *, total_steps: int, start: int = 0) -> None:
        """Told by a trainer before its first step: length of the run and where it starts."""
        self.expected_steps, self.expected_start = total_steps, start

    def attach(self, optimizer: Optimizer, *, total_steps: int | None = None, record: bool = False) -> "Controller":
        """Follow this optimizer from now on; a new optimizer starts a new run on what is there.

        Raises: DriveError for LBFGS, an optimizer followed before, or one that holds only some of our parameters;
        ScheduleError if the schedule does not fit the run.
        """
        check_optimizer(optimizer, dict(zip(self.names, self.deltas, strict=True)), self._former)
        again = self.follows(optimizer)
        total = total_steps or self.expected_steps or (self.run.steps if again else None) or self.method.total_steps
        start = self._first_step(optimizer, total)
        run = Run(total, len(self.names))
        growth = None
        if self.method.events is not None and not self.finished:
            growth = self.method.events(run, self.holdings(), start)
        if self.pruner is not None:
            self.pruner.start(run, first=start)
            self.on_change()
        self.growth, self.run, self.step = growth, run, start
        self.births = BirthRates(self.method.clock, run, optimizer) if self.method.clock else None
        if start == 0:
            self._forget_births()
        previous = self._optimizer() if self._optimizer is not None else None
        if previous is not None and previous is not optimizer:
            self._former.add(previous)
        self._optimizer = weakref.ref(optimizer)
        self.expected_steps = self.expected_start = self.trainer_step = None
        self.restored_step, self.stepping = 0, False
        self.health = self.health if again else Health()
        self.recording = self.recording or record
        self.tapping, self.watching = self._score_due(), growth is not None
        return self

    def _first_step(self, optimizer: Optimizer, total: int | None) -> int:
        """Where the run begins: as a trainer says; where we are, if the optimizer is followed already; where a loaded
        checkpoint was; at 0 if that run was finished."""
        if self.expected_start is not None:
            return self.expected_start
        start = self.step if self.follows(optimizer) else self.restored_step
        return 0 if total is not None and start >= total else start

    def _forget_births(self) -> None:
        """In a new run every live tensor belongs to the model from the start."""
        for delta in self.deltas:
            delta.born = [-1] * len(delta.sizes)
            delta.reserved = [-1] * len(delta.sizes)

    def follows(self, optimizer: Optimizer) -> bool:
        return self._optimizer is not None and self._optimizer() is optimizer

    # -- one optimizer step --------------------------------------------------------------------------------------

    def begin_step(self, number: int) -> None:
        """A trainer begins its step `number`: forget what a step that was never taken left behind."""
        if number != self.trainer_step:
            self._clear()
            self.trainer_step = number

    def before_step(self, optimizer: Optimizer) -> bool:
        """First hook; returns whether this is a real step of ours."""
        if not self.used or not any(p.grad is not None for p in self.parameters()):
            return False
        if amp.overflowed(optimizer):
            self._clear()
            return False
        self._silence()
        finite = all_finite([grad for p in self.parameters() if (grad := p.grad) is not None])
        self._scores = self._collect(finite, optimizer)
        if not self.health.judge(finite, self.names[0]):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None  # nothing moves in this step: clipping and the loss spread NaN to all parameters
        elif self.method.penalty and not self.penalty_given:
            add_penalty(self.deltas, self.method.penalty, scale=amp.gradient_scale(optimizer))
        if self.births is not None:
            self.births.remember(self.deltas, self.step)
        if self.pruner is not None:
            self.pruner.before_step(self.step, optimizer, scale=amp.gradient_scale(optimizer))
        self.stepping = True
        return True

    def after_step(self) -> None:
        """Second hook: the optimizer has moved our parameters."""
        if self.births is not None:
            self.births.apply()
        growing = not self.finished
        if growing and self._scores is not None:
            rule = self.method.score
            assert rule is not None
            self.sensitivity, self.uncertainty = smooth(
                self.sensitivity.to(self._scores), self.uncertainty.to(self._scores), self._scores,
                beta=rule.beta, beta_uncertainty=rule.beta_uncertainty,
            )  # fmt: skip
        before = self.ranks if self.recording else {}
        if self.pruner is not None:
            self._prune(self.pruner)
        if growing:
            self._fill_reserve()
            if self.growth is not None and self.growth.due(self.step):
                self._allocate()
        if self.recording:
            self.records.append(record(self, before, self._scores))
        self._clear()
        self.stepping = False
        self.step += 1
        self.tapping = self._score_due()
        self.watching = self.growth is not None and not self.finished

    def forget_fake_step(self, optimizer: Optimizer) -> None:
        """torch's checkpoint loader steps once with zero gradients everywhere to invent optimizer states: tensors that
        may not move, or have not yet, must not have one, or a resumed run would differ from a straight one."""
        for delta in self.deltas:
            for p in [*delta.still(), *unmoved(delta, self.step)]:
                optimizer.state.pop(p, None)

    def _silence(self) -> None:
        for delta in self.deltas:
            for p in delta.still():
                p.grad = None

    def _clear(self) -> None:
        self.used = self.penalty_given = False
        for watcher in self.watchers:
            watcher.clear()
        if self.pruner is not None:
            self.pruner.forget()

    def forget_inputs(self) -> None:
        """The backward passes so far led to no step."""
        for watcher in self.watchers:
            watcher.inputs = 0
        if self.pruner is not None:
            self.pruner.forget()

    # -- scores and events ---------------------------------------------------------------------------------------

    def _score_due(self) -> bool:
        rule = self.method.score
        if rule is None or self.growth is None or self.finished:
            return False
        event = self.growth.next(self.step)
        if rule.window is None:
            return True
        return event - self.step < rule.window and (self.run.steps is None or event < self.run.steps)

    def _collect(self, finite: Tensor, optimizer: Optimizer) -> Tensor | None:
        if not self._score_due():
            return None
        scores = scoring.module_scores(self.deltas, self.watchers, self.method.score, self.sensitivity.dtype)
        assert self.method.score is not None
        # signed scores come from `.grad`, the others from inside the backward pass
        scores = scores / (amp.gradient_scale(optimizer) if self.method.score.kind == "signed" else amp.loss_scale())
        return mean_over_processes(torch.where(finite.to(scores.device), scores, torch.nan))

    def _fill_reserve(self) -> None:
        if self.method.reserve == "none":
            return
        for delta in self.deltas:
            waiting = delta.indices(Status.DORMANT)
            if waiting and not delta.indices(Status.RESERVE):
                delta.status[waiting[0]] = Status.RESERVE
                delta.reserved[waiting[0]] = self.step

    def _allocate(self) -> None:
        assert self.method.allocate is not None
        self.health.read()
        importance = (self.sensitivity * self.uncertainty).tolist()
        plan = self.method.allocate(importance, self.holdings())
        for i in plan.saturated:
            self._note("saturation", i, 0, importance[i])
        for grant in plan.grants:
            delta = self.deltas[grant.module]
            free = self._free(delta)
            for position in grant.blocks:
                delta.status[free[position]] = Status.ACTIVE
                delta.born[free[position]] = self.step
            self._note("birth", grant.module, grant.ranks, importance[grant.module])
        self._fill_reserve()
        if plan.spent:
            self._finish()
        self.on_change()

    def _prune(self, pruner: Pruner) -> None:
        settled = pruner.settled
        changes = pruner.after_step(self.step)
        for change in changes:
            kind: Kind = change.kind or ("birth" if change.ranks > 0 else "retirement")
            self._note(kind, change.module, change.ranks, change.score)
        if pruner.settled and not settled:
            self.health.read()
            for i in range(len(self.deltas)):
                self._note("finish", i, 0, None)
        if changes:
            self.on_change()

    def _finish(self) -> None:
        for i, delta in enumerate(self.deltas):
            for block in delta.indices(Status.RESERVE):
                if self.method.on_finish == "retire":
                    delta.status[block] = Status.RETIRED
                elif "E" in delta.letters:
                    with torch.no_grad():
                        delta.block(block)["E"].mul_(0)
            self._note("finish", i, 0, None)

    def _note(self, kind: Kind, module: int, ranks: int, importance: float | None) -> None:
        name, rank = self.names[module], self.deltas[module].rank
        self.events.append(Event(self.step, kind, name, ranks, rank, importance))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def module_state(self, index: int) -> list[float]:
        """Clock and averages of one module, for its extra state."""
        return [float(self.step), float(self.sensitivity[index]), float(self.uncertainty[index])]

    def load_module_state(self, index: int, values: list[float]) -> None:
        """What a checkpoint says; the run goes on from there at the next step."""
        self.step = self.restored_step = int(values[0])
        if self.pruner is not None:
            self.pruner.restored()
        self.sensitivity[index], self.uncertainty[index] = values[1], values[2]
        if self.driven:
            self.expected_steps, self._optimizer = self.expected_steps or self.run.steps, None
        self.on_change()
