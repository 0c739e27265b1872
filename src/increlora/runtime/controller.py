"""The one object with side effects: it follows an optimizer by two hooks and calls the rules; parameters' shapes, their
groups and the loss stay what they are.

    before the step   overflow, or no backward pass of ours? leave · clear gradients of frozen parameters · rules
                      observe · health · penalty · birth rates · rules
    the step          the host's optimizer, untouched
    after the step    birth rates · rules → changes → events
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from ..decide.allocation import Event, Kind
from ..decide.schedules import Run
from ..deltas import BlockDelta
from ..errors import ConfigError, DriveError
from ..methods import Method
from ..ops.parallel import all_finite
from ..rules import Expected, Forecast, Rule, Runner, Step, holding_of
from . import amp
from .births import BirthRates, unmoved
from .exchange import keep_zeros
from .health import Health
from .ownership import NOT_HELD, are_parts, check_optimizer, holder_of, may_hold_copies, may_hold_flat
from .penalty import add_penalty
from .records import record
from .taps import Watcher


class Controller:
    """Drives the adaptive blocks of one adapter; made by the host when the adapter is injected.

    Attributes:
        names, deltas: adapted modules in model order.   rules: the method's rules at work, in its order.
        events: what happened so far.   records: one entry per step while `recording` (see `records.record`).
        step: optimizer steps of this run so far.   run: its length, once known.
        sees_inputs, sees_gradients: what backward passes hand to the rules before the next step.
        may_see_gradients: the same for the rest of the run, for compiled graphs.
        refusal: why nobody may train the adapter; empty: it can be trained.
    """

    def __init__(
        self,
        method: Method,
        deltas: Mapping[str, BlockDelta],
        *,
        on_change: Callable[[], None] | None = None,
        refusal: str = "",
    ) -> None:
        self.method = method
        self.names, self.deltas = list(deltas), list(deltas.values())
        self.on_change, self.refusal = on_change or (lambda: None), refusal
        self.events: list[Event] = []
        self.records: list[dict[str, object]] = []
        self.recording = False
        self.step = self.restored_step = max(d.steps for d in self.deltas)
        self.expected_steps: int | None = None
        self.expected_start: int | None = None
        self.run = Run(method.total_steps)
        self.births: BirthRates | None = None
        self.health = Health()
        self.used = self.rested = False  # a forward pass since the last step: of what is trained, of what is frozen
        self.penalty_given = False  # the penalty's gradient of this step is already there
        self.stepping = False  # between the two hooks of a step; still so if the optimizer raised
        self.restoring = False  # a checkpoint was loaded since a run was begun
        self.trainer_step: int | None = None
        self._neglected = False  # others have stepped since a backward pass of ours
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._former: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.rules: list[Runner] = [bound(rule, deltas, method, slot) for slot, rule in enumerate(method.rules)]
        if sum(rule.forgets for rule in self.rules) > 1:  # both would take `settled` of a module for theirs
            raise ConfigError(f"{method.name}: one rule at most may prune: leave out one of {method.rules}")
        self.watchers = [Watcher(self, i) for i in range(len(self.names))]
        for delta, watcher in zip(self.deltas, self.watchers, strict=True):
            delta.observer = watcher
        self._look()

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def driven(self) -> bool:
        """Does an optimizer hold our parameters, as far as we have seen?"""
        return self._optimizer is not None

    @property
    def finished(self) -> bool:
        """Is nothing left to decide? The budget is then met."""
        return all(rule.done for rule in self.rules)

    def parameter(self, index: int) -> nn.Parameter:
        return next(iter(self.deltas[index].block(0).values()))

    def parameters(self) -> Iterator[nn.Parameter]:
        for delta in self.deltas:
            yield from delta.block_parameters()

    @property
    def ranks(self) -> dict[str, int]:
        """Active rank per module."""
        return {name: delta.rank for name, delta in zip(self.names, self.deltas, strict=True)}

    def pruned(self) -> list[Tensor]:
        """Tensors in which the rules have decided where zeros are."""
        return [tensor for rule in self.rules for tensor in rule.pruned()]

    def importance(self) -> list[float] | None:
        """Importance of every module now; None for a method that knows none."""
        return next((found for rule in self.rules if (found := rule.importance()) is not None), None)

    def forecast(self, steps: int) -> Forecast:
        """What the rules will do in a run of so many steps. Raises ScheduleError if a schedule does not fit it."""
        run, holdings, exact = Run(steps), tuple(map(holding_of, self.deltas)), True
        events: list[Expected] = []
        for rule in self.rules:
            expected = rule.forecast(holdings, run)
            events += expected.events
            holdings, exact = expected.holdings, exact and expected.exact
        return Forecast(tuple(sorted(events, key=lambda event: event.step)), holdings, exact)

    # -- attaching -----------------------------------------------------------------------------------------------

    def expect(self, *, total_steps: int, start: int = 0) -> None:
        """Told by a trainer before its first step: length of the run and where it starts."""
        self.expected_steps, self.expected_start = total_steps, start

    def attach(self, optimizer: Optimizer, *, total_steps: int | None = None, record: bool = False) -> "Controller":
        """Follow this optimizer from now on; a new optimizer starts a new run on what is there.

        Raises: DriveError for LBFGS, an optimizer followed before, or one that holds only some of our parameters, and
        for an adapter that nobody may train; ScheduleError if the schedule does not fit the run.
        """
        if self.refusal:
            raise DriveError(f"{self.names[0]}: {self.refusal}")
        check_optimizer(optimizer, dict(zip(self.names, self.deltas, strict=True)), self._former)
        again = self.follows(optimizer)
        total = total_steps or self.expected_steps or (self.run.steps if again else None) or self.method.total_steps
        start = self._first_step(optimizer, total)
        run = Run(total)
        for rule in self.rules:
            rule.start(run, start)
        self.run, self.step = run, start
        self.births = BirthRates(self.method.clock, run, optimizer) if self.method.clock else None
        for delta in self.deltas if start == 0 else ():  # in a new run every live tensor belongs to the model
            delta.assign(born=[-1] * len(delta.sizes), reserved=[-1] * len(delta.sizes))
        previous = self._optimizer() if self._optimizer is not None else None
        if previous is not None and previous is not optimizer:
            self._former.add(previous)
        self._optimizer = weakref.ref(optimizer)
        if not again:
            keep_zeros(optimizer, weakref.WeakMethod(self.pruned))
        self.expected_steps = self.expected_start = self.trainer_step = None
        self.restored_step, self.stepping, self.restoring = 0, False, False
        self.health = self.health if again else Health()
        self.recording = self.recording or record
        self._look()
        self.on_change()
        return self

    def _first_step(self, optimizer: Optimizer, total: int | None) -> int:
        """Where the run begins: as a trainer says; where we are, if the optimizer is followed already; where a loaded
        checkpoint was; at 0 if that run was finished."""
        if self.expected_start is not None:
            return self.expected_start
        start = self.step if self.follows(optimizer) else self.restored_step
        return 0 if total is not None and start >= total else start

    def follows(self, optimizer: Optimizer) -> bool:
        return self._optimizer is not None and self._optimizer() is optimizer

    def loaded(self, step: int, module: int) -> None:
        """A checkpoint was loaded, and this module of it; the run goes on from there at the next step, and what was
        begun is not taken. All modules say so; of a thousand the first and the last are listened to."""
        self.step = self.restored_step = step
        self.used = self.penalty_given = self.stepping = False
        if self.restoring and module < len(self.deltas) - 1:
            return
        self.restoring = True
        for rule in self.rules:
            rule.restored()
        if self.driven:
            self.expected_steps, self._optimizer = self.expected_steps or self.run.steps, None
        self._look()
        self.on_change()

    def stepped_by(self, other: Optimizer) -> None:
        """An optimizer that holds nothing of ours steps. Raises DriveError if it steps a copy of our parameters."""
        if self.driven or not any(watcher.passes for watcher in self.watchers):
            return
        flat = may_hold_flat(other, self.deltas)
        if not flat and not may_hold_copies(other, self.parameters()):  # it trains something else meanwhile
            for watcher in self.watchers:
                watcher.passes = 0
            return
        self._neglected = True
        if flat and (are_parts(self.parameters()) or self.passed_over()):
            raise DriveError(f"{self.names[0]}: backward passes and no step {NOT_HELD}")

    def passed_over(self) -> bool:
        """Has another optimizer stepped since a backward pass of ours, while there is none that could follow?"""
        self._neglected = self._neglected and holder_of(self.parameters()) is None
        return self._neglected

    # -- one optimizer step --------------------------------------------------------------------------------------

    def begin_step(self, number: int) -> None:
        """A trainer begins its step `number`: forget what a step that was never taken left behind."""
        if number != self.trainer_step:
            self._clear()
            self.trainer_step = number

    def before_step(self, optimizer: Optimizer) -> bool:
        """First hook; returns whether this is a real step of ours.

        It comes again in the same step if the optimizer raised and steps anew, or calls the `step` of its base class:
        what would then count twice is left out."""
        again = self.stepping
        if self.rested and not self.finished:
            self._check_trained()
        if not self.used or not (again or any(p.grad is not None for p in self.parameters())):
            return False
        self._check_newborn()
        if amp.overflowed(optimizer):
            self._clear()
            return False
        for delta in self.deltas:
            for p in delta.frozen_parameters():
                p.grad = None
        finite = all_finite([grad for p in self.parameters() if (grad := p.grad) is not None])
        step = Step(self.step, optimizer, finite, amp.gradient_scale(optimizer), amp.loss_scale)
        for rule in self.rules if not again else ():
            rule.observe(step)
        if again:
            pass
        elif not self.health.judge(finite, self.names[0]):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None  # nothing moves in this step: clipping and the loss spread NaN to all parameters
        elif self.method.penalty and not self.penalty_given:
            add_penalty(self.deltas, self.method.penalty, scale=step.gradient_scale)
        self.stepping = True
        if self.births is not None:
            self.births.remember(self.deltas, self.step)
        for rule in self.rules:
            rule.before_step(step)
        return True

    def _check_trained(self) -> None:
        """Raise DriveError if nothing of ours can learn any more while there is something to decide."""
        if not any(p.requires_grad for p in self.parameters()):
            raise DriveError(
                f"{self.names[0]} and all other modules of this adapter are frozen at step {self.step}, before its "
                f"ranks are decided (now {sum(self.ranks.values())}): set requires_grad of its parameters again "
                f"(`model.set_adapter`), or train the rest by an optimizer that does not hold them"
            )

    def _check_newborn(self) -> None:
        """Raise DriveError if a block that was just born cannot learn, though its module does."""
        for event in itertools.takewhile(lambda event: event.step == self.step - 1, reversed(self.events)):
            delta = self.deltas[self.names.index(event.module)]
            blocks = {i: any(p.requires_grad for p in delta.block(i).values()) for i in delta.live}
            frozen = [i for i, learns in blocks.items() if not learns and delta.state.born[i] == event.step]
            if frozen and any(blocks.values()):
                raise DriveError(
                    f"{event.module}: block {frozen[0]} was born after step {event.step}, but is frozen: leave "
                    f"requires_grad of blocks that are not used yet as it is, they move only once they are born"
                )

    def after_step(self) -> None:
        """Second hook: the optimizer has moved our parameters."""
        if self.births is not None:
            self.births.apply()
        before = self.ranks if self.recording else {}
        for rule in self.rules:
            self._act(rule)
        if self.recording:
            self.records.append(record(self, before))
        self._clear()
        self.step += 1
        self._look()

    def _look(self) -> None:
        """Note what rules want to see in the next step, as plain values: every module asks in every forward pass, and
        compiled graphs are compiled again when they change. Until it is driven, backward passes are counted."""
        wants = frozenset().union(*(rule.wants for rule in self.rules))
        self.sees_inputs = "inputs" in wants
        self.sees_gradients = "gradients" in wants or not self.driven
        self.may_see_gradients = any("gradients" in rule.may_want for rule in self.rules) or not self.driven
        idle = frozenset(rule.slot for rule in self.rules if rule.forgets and rule.done)
        if idle != self.deltas[0].idle_slots:
            for delta in self.deltas:
                delta.idle_slots = idle

    def _act(self, rule: Runner) -> None:
        """Have a rule act, and log what it changed."""
        try:
            changes = rule.after_step(self.step)
        except BaseException:
            self.on_change()  # whatever it has done already
            raise
        for change in changes:
            kind: Kind = change.kind or ("birth" if change.ranks > 0 else "retirement")
            name, rank = self.names[change.module], self.deltas[change.module].rank
            self.events.append(Event(self.step, kind, name, change.ranks, rank, change.importance))
        if changes:
            for delta in self.deltas:
                delta.note_step()  # who copies buffers now copies states of one step
            self.on_change()
            self.health.read()

    def forget_fake_step(self, optimizer: Optimizer) -> None:
        """torch's checkpoint loader steps once with zero gradients everywhere to invent optimizer states: tensors that
        may not move, or have not yet, must not have one, or a resumed run would differ from a straight one."""
        for delta in self.deltas:
            for p in [*delta.frozen_parameters(), *unmoved(delta, self.step)]:
                optimizer.state.pop(p, None)

    def _clear(self) -> None:
        self.used = self.rested = self.penalty_given = self.stepping = False
        self.forget()

    def forget(self) -> None:
        """What backward passes have shown since the last step leads to no step."""
        for watcher in self.watchers:
            watcher.seen = False
        for rule in self.rules:
            rule.forget()


def bound(rule: Rule, deltas: Mapping[str, BlockDelta], method: Method, slot: int) -> Runner:
    """The runner of a rule. Raises ConfigError for what is none: the adapter would train as if its ranks were fixed."""
    runner = rule.bind(deltas, method.budget, slot) if hasattr(rule, "bind") else None
    if not isinstance(runner, Runner):
        raise ConfigError(f"{method.name}: {rule!r} is no rule: its `bind` must return a `rules.Runner`")
    if unknown := set(runner.wants) - {"gradients", "inputs"}:
        raise ConfigError(f"{method.name}: {rule!r} wants {sorted(unknown)}: backward passes show gradients and inputs")
    return runner
