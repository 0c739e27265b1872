"""When: fractions of a run to steps, event steps, and the learning-rate clocks of newborn tensors.

Steps are 0-based optimizer steps. A time is an int (steps) or a float in [0, 1] (a share of the run).
"""

from dataclasses import dataclass

from .errors import ScheduleError

Time = int | float


@dataclass(frozen=True)
class Run:
    """What is known only when training starts: number of optimizer steps (None: not known), number of modules."""

    steps: int | None
    modules: int


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
        """Is there an event at this step?"""
        return step > self.warmup and step % self.interval == 0

    def next(self, step: int) -> int:
        """First event at or after `step`."""
        start = max(step, self.warmup + 1)
        return -(-start // self.interval) * self.interval

    def count(self, start: int, stop: int) -> int:
        """Number of events in start ≤ step < stop."""
        first = self.next(start)
        return 0 if first >= stop else (stop - 1 - first) // self.interval + 1


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
    """Share of the host's learning rate: rises linearly to 1 over `warmup` steps after birth; 1 for the model's own.

    The first step after birth already moves (1/warmup). Source: ours."""
    if created < 0 or warmup <= 0:
        return 1.0
    return min(1.0, max(0, step - created) / warmup)
