"""Schedules: shares of a run in steps, the steps of events, and the learning-rate clocks of new tensors.

Steps are 0-based optimizer steps. A time is an int (steps) or a float in [0, 1] (a share of the run).
"""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ScheduleError

Time = int | float


@dataclass(frozen=True)
class Run:
    """Known only when training starts: the number of optimizer steps (None if unknown)."""

    steps: int | None


def in_steps(time: Time, run: Run, *, name: str, least: int = 0) -> int:
    """Number of optimizer steps that `time` means in this run, at least `least`.

    Raises: ScheduleError if a share is given and the length of the run is unknown, or the value is out of range.
    """
    if isinstance(time, bool) or time < 0 or (isinstance(time, float) and time > 1):
        raise ScheduleError(f"{name}={time!r}: give steps as an int ≥ 0, or a share of the run as a float in [0, 1]")
    if isinstance(time, int):
        return max(least, time)
    if run.steps is None:
        raise ScheduleError(
            f"{name}={time} is a share of the run, and the length of the run is unknown: set `total_steps` in the "
            f"config, call `increlora.attach(model, optimizer, total_steps=…)`, or train with the Hugging Face Trainer"
        )
    return max(least, round(time * run.steps))


@dataclass(frozen=True)
class GrowthSteps:
    """Events at the multiples of `interval` strictly after `warmup`. Source: IncreLoRA, published trainer."""

    warmup: int
    interval: int

    def due(self, step: int) -> bool:
        """Whether there is an event at this step."""
        return step > self.warmup and step % self.interval == 0

    def next(self, step: int) -> int:
        """First event at or after `step`."""
        start = max(step, self.warmup + 1)
        return -(-start // self.interval) * self.interval

    def count(self, start: int, stop: int) -> int:
        """Number of events in start ≤ step < stop."""
        first = self.next(start)
        return 0 if first >= stop else (stop - 1 - first) // self.interval + 1


@dataclass(frozen=True)
class CubicDecay:
    """Budget that falls from `start` to `end` ranks along a cubic, then holds.

        b(t) = ⌊ end + (start − end) · (1 − (t − warmup)/(total − settle − warmup))³ ⌋      warmup < t ≤ total − settle

    The cut to b(t) takes place at multiples of `interval`; after the step `last_cut` nothing changes.

    Args: ranks over all modules, start ≥ end.   warmup, settle: steps at `start` before, at `end` after.
        interval ≥ 1.   total: steps of the run.   late: the last cut comes one step later if total − settle is not a
        multiple of `interval`, as in the published code.
    Raises: ScheduleError if the phases overlap or the last cut would come after the end of the run.
    Source: AdaLoRA's published code; the paper's equation 14 exceeds `start` after the warm-up and misses `end`.
    """

    start: int
    end: int
    warmup: int
    settle: int
    interval: int
    total: int
    late: bool = False

    def __post_init__(self) -> None:
        if self.warmup + self.settle >= self.total or self.last_cut >= self.total:
            raise ScheduleError(
                f"the schedule (warmup_steps={self.warmup}, settle_steps={self.settle}) leaves no step between them in "
                f"a run of {self.total} steps: shorten one of them, or train longer"
            )

    @property
    def last_cut(self) -> int:
        """Step of the last cut; the kept ranks are fixed from then on."""
        falls_until = self.total - self.settle
        return falls_until + (self.late and falls_until % self.interval != 0)

    def ranks(self, step: int) -> int:
        """Ranks that may stay after this step."""
        if step <= self.warmup:
            return self.start
        if step >= self.total - self.settle:
            return self.end
        left = 1 - (step - self.warmup) / (self.total - self.settle - self.warmup)
        return int(self.end + (self.start - self.end) * left**3)

    def due(self, step: int) -> bool:
        """Whether there is a cut at this step. True from the last cut on, so a missed last cut is made up for."""
        return self.warmup < step and (step % self.interval == 0 or step >= self.last_cut)

    def next(self, step: int) -> int:
        """First cut after this step; the step must be at or after the end of the warm-up and before the last cut."""
        return min((step // self.interval + 1) * self.interval, self.last_cut)

    def observed(self, step: int) -> bool:
        """Whether the scores of this step count."""
        return step < self.total - self.settle

    def cuts(self, first: int = 0) -> list[int]:
        """Steps of all cuts from `first` on, including the last cut."""
        return [step for step in range(max(first, self.warmup + 1), self.last_cut + 1) if self.due(step)]


@dataclass(frozen=True)
class Levels:
    """A value that rises in phases: `values[0]` while step < warmup, then the others in phases of equal length up to
    `until`; 0 from then on.

    Source: SoRA, algorithm 1 (the published script trains each phase anew, at a learning rate that has reached 0)."""

    values: tuple[float, ...]
    warmup: int
    until: int

    def at(self, step: int) -> float:
        """The value at this step."""
        if step < self.warmup:
            return self.values[0]
        if step >= self.until:
            return 0.0
        phase = (step - self.warmup) * (len(self.values) - 1) // (self.until - self.warmup)
        return self.values[1 + phase]


def rising(first: float, last: float, count: int, spacing: Literal["linear", "geometric", "log_linear"]) -> list[float]:
    """`count` ≥ 2 values from `first` to `last`, both included.

    linear       equal differences           geometric    equal ratios (first > 0)
    log_linear   log of equally spaced exponentials, as in SoRA's published code
    """
    if count == 2:
        return [first, last]
    if spacing == "geometric" and first <= 0:
        raise ScheduleError(f"spacing='geometric' cannot start from {first}: give a first value above 0, or 'linear'")
    shares = [i / (count - 1) for i in range(count)]
    if spacing == "linear":
        return [first + (last - first) * share for share in shares]
    if spacing == "geometric":
        return [first * (last / first) ** share for share in shares]
    return [math.log(math.exp(first) + (math.exp(last) - math.exp(first)) * share) for share in shares]


@dataclass(frozen=True)
class Multiples:
    """Events after optimizer steps number `interval`, 2 · `interval`, …, counted from 1.

    There is none in the first `warmup` steps, and none in the last `settle` of `total` (None if unknown; then none is
    held back).   Source: PRILoRA (interval); the phases are ours.
    """

    interval: int
    warmup: int = 0
    settle: int = 0
    total: int | None = None

    @property
    def first(self) -> int:
        """0-based step of the first event."""
        return (self.warmup // self.interval + 1) * self.interval - 1

    @property
    def last(self) -> int | None:
        """0-based step of the last event; None in a run of unknown length, before `first` in a run without any."""
        return None if self.total is None else (self.total - self.settle) // self.interval * self.interval - 1

    @property
    def count(self) -> int:
        """How many events there are; 0 where that is not known."""
        return 0 if self.last is None else max(0, (self.last - self.first) // self.interval + 1)

    def due(self, step: int) -> bool:
        """Whether there is an event after this 0-based step."""
        return (step + 1) % self.interval == 0 and self.first <= step and not self.over(step - 1)

    def over(self, step: int) -> bool:
        """Whether the last event is done after this step."""
        return self.last is not None and step >= self.last


def linear_clock(step: int, created: int, *, warmup: int, total: int) -> float:
    """Published learning-rate factor of a tensor created in step `created` (−1: with the model), in units of the peak.

        s = step − created − 1        s / warmup                       while s < warmup
                                      (total − step) / (total − created − 1 − warmup)     afterwards, never below 0

    Returns 1 for step ≤ created (no gradient there). Source: IncreLoRA, published scheduler ("restart warm-up").
    """
    if step <= created and created >= 0:
        return 1.0
    since, remaining = step - created - 1, total - created - 1
    if since < warmup:
        return since / max(1, warmup)
    return max(0.0, (remaining - since) / max(1, remaining - warmup))


def ramp_clock(step: int, created: int, *, warmup: int) -> float:
    """Share of the optimizer's learning rate: rises to 1 over `warmup` steps after birth; 1 for the initial tensors.

    The first step after birth already moves (1/warmup). Source: ours."""
    if created < 0 or warmup <= 0:
        return 1.0
    return min(1.0, max(0, step - created) / warmup)
