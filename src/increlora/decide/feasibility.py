"""Can a budget be met? Checks before training, of growth and of pruning; they know shapes and schedules alone."""

import math
import warnings
from collections.abc import Sequence

from ..errors import BudgetError, ScheduleError
from .allocation import Holding, parameters_used, ranks_used
from .budget import Budget
from .schedules import GrowthSteps
from .selection import can_finish


def check_growth(holdings: Sequence[Holding], budget: Budget) -> None:
    """Raise BudgetError, saying why, if growth from these holdings cannot meet the budget."""
    used, capacity = ranks_used(holdings), sum(h.rank + sum(h.free) for h in holdings)
    if budget.ranks is None:
        if can_finish(holdings, budget):
            return
        raise BudgetError(
            f"total_parameters={budget.parameters} is below the start of {parameters_used(holdings)} (`init_r` for "
            f"each of {len(holdings)} modules): raise it or target fewer modules"
        )
    if budget.ranks < used:
        raise BudgetError(
            f"the budget of {budget.ranks} ranks is below the start of {used} (`init_r` for each of {len(holdings)} "
            f"modules): raise it or target fewer modules"
        )
    if budget.ranks > capacity:
        raise BudgetError(
            f"the budget of {budget.ranks} ranks is above the capacity of {capacity} over {len(holdings)} modules: "
            f"raise `capacity` or lower the budget"
        )
    if not budget.exact or can_finish(holdings, budget):
        return
    raise BudgetError(
        f"the budget of {budget.ranks} ranks cannot be met exactly from {used} ranks in steps of "
        f"{max((s for h in holdings for s in h.free), default=0)} and 1 over {len(holdings)} modules"
        + (f" within {budget.parameters} parameters" if budget.parameters is not None else "")
        + ": set `grow_by=1`, raise `capacity`, or give the budget as `total_ranks`"
    )


def check_pruning(holdings: Sequence[Holding], budget: Budget) -> None:
    """Raise BudgetError, saying why, if pruning from these holdings cannot meet the budget."""
    start, target = ranks_used(holdings), budget.ranks
    assert target is not None
    if target > start:
        raise BudgetError(
            f"the budget of {target} ranks is above the start of {start} over {len(holdings)} modules (`init_r` "
            f"each, at most what its shape can use): raise `init_r` or lower the budget"
        )
    least = sum(sorted(h.cost for h in holdings for _ in range(h.rank))[:target])
    if budget.parameters is not None and least > budget.parameters:
        raise BudgetError(
            f"{target} ranks cost at least {least} parameters, the budget allows {budget.parameters}: raise `init_r`, "
            f"or give the budget as `total_ranks`"
        )


def check_reachable(steps: GrowthSteps, first: int, stop: int, *, missing: int, per_event: int, strict: bool) -> None:
    """Say before training by how much a schedule falls short of its budget: an error, a warning for the published code
    (which trains on, short)."""
    events = steps.count(first, stop)
    short = missing - events * per_event
    if short <= 0:
        return
    message = (
        f"the schedule (warmup_steps={steps.warmup}, interval_steps={steps.interval}) leaves {events} growth events of "
        f"{per_event} ranks in {stop - first} steps, {math.ceil(missing / per_event)} are needed: {short} of {missing} "
        f"ranks would be missing; shorten `interval_steps` or `warmup_steps`, raise `top_h`, or train longer"
    )
    if strict:
        raise ScheduleError(message)
    warnings.warn(message, stacklevel=2)
