"""What methods that start rich and prune have in common: the rank they start at, and the budget that falls from it."""

import math
from typing import Any

from ..decide.schedules import CubicDecay, Run, in_steps
from ..deltas import TripletDelta
from ..errors import BudgetError
from .base import Site, in_blocks


def first_rank(average: float) -> int:
    """Rank of a module at the start when none is given: 1.5 times the average at the end, rounded up."""
    return math.ceil(1.5 * average)


def check_start(settings: Any) -> None:
    """Raise BudgetError for a start of `init_r` ranks per module that is below the end of `r`."""
    if settings.total_ranks is None and settings.init_r is not None and settings.init_r < settings.r:
        raise BudgetError(
            f"r={settings.r} is above the start of init_r={settings.init_r} ranks per module: raise `init_r`, or leave "
            f"it out for {first_rank(settings.r)}"
        )


def pruned(settings: Any, site: Site, rank: int, **parts: Any) -> TripletDelta:
    """A delta of `rank` ranks that can be dropped one by one; see `in_blocks`."""
    delta = in_blocks(TripletDelta, settings, site, [rank], **parts)
    delta.assign(kept=[True] * rank)
    delta.constant = False
    return delta


def cubic_of(settings: Any, run: Run, start: int, end: int, *, late: bool = False) -> CubicDecay:
    """The cubic from `start` to `end` ranks with the settings' `warmup_steps`, `settle_steps` and `interval_steps`.

    late: see `CubicDecay`.   Raises: ScheduleError if the run's length is not known, or leaves no step to fall in."""
    if run.steps is None:
        in_steps(1.0, run, name="the end of the schedule (settle_steps)")
    return CubicDecay(
        start,
        end,
        warmup=in_steps(settings.warmup_steps, run, name="warmup_steps"),
        settle=in_steps(settings.settle_steps, run, name="settle_steps", least=1),
        interval=in_steps(settings.interval_steps, run, name="interval_steps", least=1),
        total=run.steps or 0,
        late=late,
    )
