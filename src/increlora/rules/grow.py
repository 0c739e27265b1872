"""Growth: blocks are born where importance is highest, until the budget is spent (IncreLoRA).

    S = Σ|ΔW ∘ ∂L/∂ΔW| / √(mn)                          score of a module, in the steps before an event
    I ← β₁ I + (1−β₁) S    U ← β₂ U + (1−β₂)|I − S|      importance I · U
    event due?  importance, holdings → allocate → blocks become active; the block next in line enters the reserve
    budget spent?  the reserve retires, or is kept without effect; nothing is scored any more

Statistics of a module: I, U.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..decide.allocation import Holding, Plan, granted, parameters_used, ranks_used
from ..decide.budget import Budget
from ..decide.feasibility import check_growth
from ..decide.schedules import GrowthSteps, Run
from ..decide.scores import Norm, delta_sensitivity, signed_sensitivity, smooth
from ..decide.selection import spent
from ..deltas import BlockDelta, Status
from ..ops.parallel import full, mean_over_processes
from .base import Change, Deltas, Expected, Forecast, Runner, Sight, Step, dtype_of, finished, holding_of


@dataclass(frozen=True)
class Score:
    """How a module's importance is measured.

    Attributes:
        kind: `delta` (entry-wise |ΔW∘G|, in the backward pass) or `signed` (|⟨B, ∂L/∂B⟩|, from gradients alone).
        norm: see `scores.normaliser`.   beta, beta_uncertainty: moving averages, see `scores.smooth`.
        window: only the last `window` steps before an event are scored; None: every step.
        accumulate: over micro-batches and repeated uses of a module: `mean` of their scores, `last` backward pass (as
            published), or `exact` (inputs and output gradients are kept until the step: the score of the whole batch).
    """

    kind: Literal["delta", "signed"] = "delta"
    norm: Norm = "sqrt_numel"
    beta: float = 0.85
    beta_uncertainty: float = 0.85
    window: int | None = None
    accumulate: Literal["mean", "last", "exact"] = "mean"


@dataclass(frozen=True)
class Grow:
    """Add blocks where importance is highest.

    Attributes:
        schedule: (run, holdings, first step) → events. Raises ScheduleError if they cannot spend the budget.
        allocate: (importance, holdings) → grants.   score: how importance is measured.
        reserve: the block next in line of every module is `trained` before it is born, or held `frozen` (it counts in
            the penalty alone), or there is `none`.
        on_finish: what happens to the reserve when the budget is spent: `retire` it, or `keep` training it with e = 0.
    """

    nonnegative = True

    schedule: Callable[[Run, Sequence[Holding], int], GrowthSteps]
    allocate: Callable[[Sequence[float], Sequence[Holding]], Plan]
    score: Score = field(default_factory=Score)
    reserve: Literal["trained", "frozen", "none"] = "none"
    on_finish: Literal["retire", "keep"] = "retire"

    def check(self, holdings: Sequence[Holding], budget: Budget) -> None:
        check_growth(holdings, budget)

    def bind(self, deltas: Deltas, budget: Budget, slot: int) -> "Grower":
        return Grower(self, deltas, budget, slot)


class Grower(Runner):
    """Runner of `Grow`."""

    wants: frozenset[Sight] = frozenset({"gradients"})

    def __init__(self, rule: Grow, deltas: Deltas, budget: Budget, slot: int) -> None:
        super().__init__(deltas, slot)
        self.rule, self.budget = rule, budget
        self.schedule: GrowthSteps | None = None
        self.scores: Tensor | None = None  # of the step in progress
        # by module, of each backward pass since the last step: its score; for exact scores (x, ∂L/∂y)
        self.seen: list[list[Any]] = [[] for _ in self.deltas]
        self.reserve_statistics([2] * len(self.deltas))
        fresh = all(delta.indices(Status.ACTIVE) == [0] for delta in self.deltas)
        if fresh or not self.done:  # a start above the budget is done, and an error
            rule.check(self.holdings(), budget)

    def holdings(self) -> list[Holding]:
        return [holding_of(delta) for delta in self.deltas]

    @property
    def done(self) -> bool:
        if self.budget.ranks is not None:  # asked several times a step, also of a thousand modules
            return sum(delta.rank for delta in self.deltas) >= self.budget.ranks
        return spent(self.holdings(), self.budget)

    @property
    def may_want(self) -> frozenset[Sight]:
        waiting = self.schedule is not None and not self.done
        return frozenset({"gradients"}) if waiting else frozenset()

    # -- one run -------------------------------------------------------------------------------------------------

    def forecast(self, holdings: Sequence[Holding], run: Run, first: int = 0) -> Forecast:
        """Even growth: of all modules with the same rank the earlier ones first."""
        if spent(holdings, self.budget):
            return Forecast((), tuple(holdings))
        schedule, events = self.rule.schedule(run, holdings, first), []
        step = schedule.next(first)
        while run.steps is not None and step < run.steps and not spent(holdings, self.budget):
            even = [1 / (1 + h.rank + i / len(holdings)) for i, h in enumerate(holdings)]
            plans = list(self._plans(even, holdings, schedule.count(step, run.steps)))
            if not plans[0].grants:
                break
            for plan in plans:
                holdings = granted(holdings, plan)
            modules = {grant.module for plan in plans for grant in plan.grants}
            events.append(Expected(step, len(modules), ranks_used(holdings), parameters_used(holdings)))
            step = schedule.next(step + 1)
        return Forecast(tuple(events), tuple(holdings))

    def start(self, run: Run, first: int) -> None:
        self.check_statistics([2] * len(self.deltas))
        self.schedule = None if self.done else self.rule.schedule(run, self.holdings(), first)
        self.steps = run.steps
        self._lay_out(next(self.deltas[0].parameters()).device)
        self._listen(first)

    def restored(self) -> None:
        self.wants = frozenset({"gradients"})  # until `start` says otherwise

    def _lay_out(self, device: torch.device) -> None:
        """Have the statistics of all modules in one tensor, and every module hold its row of it."""
        self.averages = torch.stack(self.statistics()).to(device, dtype_of(self.deltas[0]))
        for delta, row in zip(self.deltas, self.averages, strict=True):
            delta.statistics[self.slot] = row

    def _listen(self, step: int) -> None:
        """Say what has to be seen for this step."""
        scored = self.rule.score.kind == "delta" and self.score_due(step)
        self.wants = frozenset({"gradients"}) if scored else frozenset()

    def score_due(self, step: int) -> bool:
        """Can the scores of this step still influence an event?"""
        if self.schedule is None or self.done:
            return False
        window, event = self.rule.score.window, self.schedule.next(step)
        return window is None or (event - step < window and (self.steps is None or event < self.steps))

    # -- scores --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def see_gradients(self, module: int, x: Tensor, grad: Tensor) -> None:
        delta, seen, score = self.deltas[module], self.seen[module], self.rule.score
        if score.kind != "delta":
            return
        x, grad = delta.inputs.rows(x), delta.inputs.gradients(grad)
        if score.accumulate == "last":
            seen.clear()
        exact = score.accumulate == "exact"
        seen.append((x, grad) if exact else sensitivity(delta, *delta.factors(), x, grad, norm=score.norm))

    def forget(self, module: int | None = None) -> None:
        for seen in self.seen if module is None else [self.seen[module]]:
            seen.clear()

    @torch.no_grad()
    def observe(self, step: Step) -> None:
        self.scores = None
        if self.score_due(step.number):
            signed = self.rule.score.kind == "signed"
            measure = self._signed if signed else self.module_score
            found = [measure(i) for i in range(len(self.deltas))]
            device = next((s.device for s in found if s is not None), torch.device("cpu"))
            missing = torch.full((), torch.nan, dtype=self.averages.dtype, device=device)
            scores = torch.stack([missing if s is None else s.to(missing) for s in found])
            # signed scores come from `.grad`, the others from inside the backward pass
            scores = scores / (step.gradient_scale if signed else step.loss_scale())
            self.scores = mean_over_processes(torch.where(step.finite.to(device), scores, torch.nan))

    def module_score(self, module: int) -> Tensor | None:
        """Score since the last step; None if the module took no part."""
        seen, delta, score = self.seen[module], self.deltas[module], self.rule.score
        if not seen:
            return None
        if score.accumulate == "exact":  # outside the backward pass, where parameters may be sharded
            x, grad = (torch.cat(parts) for parts in zip(*seen, strict=True))
            A, B = map(full, delta.factors())
            return sensitivity(delta, A, B, x, grad, norm=score.norm)
        return seen[-1] if score.accumulate == "last" else sum(seen[1:], seen[0]) / len(seen)

    def _signed(self, module: int) -> Tensor | None:
        delta = self.deltas[module]
        pairs = [(b["B"], b["B"].grad) for b in map(delta.block, delta.live)]
        known = [(full(B.detach()), full(grad)) for B, grad in pairs if grad is not None]
        if not known:
            return None
        return signed_sensitivity(torch.cat([B for B, _ in known], 1), torch.cat([grad for _, grad in known], 1))

    def importance(self) -> list[float]:
        averages = torch.stack(self.statistics())
        return (averages[:, 0] * averages[:, 1]).tolist()

    def details(self) -> dict[str, list[float] | list[None]]:
        scores = [None] * len(self.deltas) if self.scores is None else self.scores.tolist()
        sensitivity, uncertainty = self.averages.t().tolist()
        return {"score": scores, "sensitivity": sensitivity, "uncertainty": uncertainty}

    # -- events --------------------------------------------------------------------------------------------------

    def after_step(self, step: int) -> list[Change]:
        changes: list[Change] = []
        if not self.done:
            self._smooth()
            changes += self._fill_reserve(step)
            if self.schedule is not None and self.schedule.due(step):
                changes += self._allocate(step, self.schedule)
        self._listen(step + 1)
        return changes

    def _smooth(self) -> None:
        if self.scores is None:
            return
        if self.averages.device != self.scores.device:
            self._lay_out(self.scores.device)
        averages = smooth(
            self.averages[:, 0], self.averages[:, 1], self.scores,
            beta=self.rule.score.beta, beta_uncertainty=self.rule.score.beta_uncertainty,
        )  # fmt: skip
        self.averages.copy_(torch.stack(averages, dim=1))

    def _fill_reserve(self, step: int) -> list[Change]:
        if self.rule.reserve == "none":
            return []
        changes = []
        for i, delta in enumerate(self.deltas):
            waiting = delta.indices(Status.DORMANT)
            if waiting and not delta.indices(Status.RESERVE):
                delta.become(waiting[0], Status.RESERVE, step)
                changes.append(Change(i, 0, kind="reserve"))
        return changes

    def _plans(self, importance: Sequence[float], holdings: Sequence[Holding], events: int | None) -> Iterator[Plan]:
        """What one of the last so many events does (None: not known): one plan, and further ones of the same kind until
        the rest of an exact budget fits into the events after it. Full modules and small blocks make one plan smaller
        than its schedule counts on."""
        least = 1
        if self.budget.ranks is not None and self.budget.exact and events is not None:
            least = math.ceil((self.budget.ranks - ranks_used(holdings)) / max(1, events))
        while least > 0:
            plan = self.rule.allocate(importance, holdings)
            yield plan
            if plan.spent or not plan.grants:
                return
            holdings, least = granted(holdings, plan), least - sum(grant.ranks for grant in plan.grants)

    def _allocate(self, step: int, schedule: GrowthSteps) -> list[Change]:
        importance = self.importance()
        plans = list(self._plans(importance, self.holdings(), self.steps and schedule.count(step, self.steps)))
        changes = [Change(i, 0, importance[i], "saturation") for i in plans[0].saturated]
        for grant in (grant for plan in plans for grant in plan.grants):
            delta = self.deltas[grant.module]
            block = delta.free[grant.block]
            delta.become(block, Status.ACTIVE, step)
            changes.append(Change(grant.module, grant.ranks, importance[grant.module]))
        changes += self._fill_reserve(step)
        return changes + self._finish() if plans[-1].spent else changes

    @torch.no_grad()
    def _finish(self) -> list[Change]:
        for delta in self.deltas:
            for block in delta.indices(Status.RESERVE):
                if self.rule.on_finish == "retire":
                    delta.become(block, Status.RETIRED)
                elif "E" in delta.letters:
                    delta.block(block)["E"].mul_(0)
        return finished(self.deltas)


def sensitivity(delta: BlockDelta, A: Tensor, B: Tensor, X: Tensor, D: Tensor, *, norm: Norm) -> Tensor:
    """`delta_sensitivity` of a module, on the columns that its input meets."""
    A, X_used, D = delta.inputs.used_columns(A, X, D)
    return delta_sensitivity(A, B, X_used, D, norm=norm, numel=delta.in_features * delta.out_features)
