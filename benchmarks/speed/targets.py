"""The table of docs/performance.md: what is promised, and how each line of it is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from increlora.decide.schedules import Run
from increlora.methods import IncreLora

from .measure import Setting, Times, peak_memory, ratio

Found = dict[str, Any]
AFTER = "after the budget"


@dataclass(frozen=True)
class Comparison:
    """Subjects that are measured in turn.   every: see `in_turn`."""

    subjects: tuple[str, ...]
    setting: Setting
    every: int = 1


COMPARISONS = {
    "growth": Comparison(("peft LoRA", "IncreLoRA, published", "IncreLoRA"), Setting(steps=500), every=5),
    "short": Comparison(("IncreLoRA, published", "IncreLoRA"), Setting()),
    "pruning": Comparison(("peft AdaLoRA", "AdaLoRA", "AdaLoRA, penalty"), Setting()),
    "lora": Comparison(("peft LoRA", "LoRA"), Setting()),
    "fixed": Comparison(
        ("floor", "peft LoRA", "SoRA", "PRILoRA", "MELoRA", "MoRA", "MoRA, rotation"), Setting(steps=24)
    ),
    "small": Comparison(("peft LoRA, r = 2", "LoRTA", "LoRA-Mini"), Setting(steps=24)),
    "capacity": Comparison(("IncreLoRA, capacity 8", "IncreLoRA, capacity 64"), Setting(steps=40)),
    "modules": Comparison(
        ("floor", "peft LoRA", "LoRA", "IncreLoRA"), Setting("chain-1000", batch=1, length=1, steps=40, threads=1)
    ),
}  # fmt: skip
Results = Mapping[str, Mapping[str, Times]]


@dataclass(frozen=True)
class Target:
    """One line: at most (or at least) `bound`; `find` computes it from the comparisons."""

    what: str
    bound: float
    find: Callable[[Results], Found]
    at_least: bool = False

    def met(self, found: Found) -> bool:
        return found["ratio"] >= self.bound if self.at_least else found["ratio"] <= self.bound


def whole(comparison: str, one: str, other: str) -> Callable[[Results], Found]:
    """Mean step of a whole run ÷ that of another one; the spread is that of single steps."""

    def find(results: Results) -> Found:
        times, others = results[comparison][one], results[comparison][other]
        return ratio(*times.beside(others)) | {"ratio": mean(times.seconds) / mean(others.seconds)}

    return find


def steady(comparison: str, one: str, other: str) -> Callable[[Results], Found]:
    """Median step ÷ median step, of methods whose steps are all much alike."""
    return lambda results: ratio(*results[comparison][one].beside(results[comparison][other]))


def late(comparison: str, one: str, other: str) -> Callable[[Results], Found]:
    """Steps after the budget is reached ÷ the other's steps at the same moments."""
    return lambda results: ratio(*results[comparison][one].beside(results[comparison][other], AFTER))


def scoring_cost(results: Results) -> float:
    """A scored step ÷ one after the budget, less 1; each divided by the step of peft's LoRA at that moment."""
    own, other = results["growth"]["IncreLoRA"], results["growth"]["peft LoRA"]
    relative = {p: median(a / b for a, b in zip(*own.beside(other, p), strict=True)) for p in ("scored", AFTER)}
    return relative["scored"] / relative[AFTER] - 1


def scoring_share(steps: int) -> Callable[[Results], Found]:
    """Measured cost of a scored step × the number of them in a run of `steps` steps by the default schedule."""

    def find(results: Results) -> Found:
        scored = scored_steps(steps)
        cost = scored * scoring_cost(results)
        return {"ratio": cost / (steps + cost), "scored": scored}

    return find


def scored_steps(steps: int, modules: int = 36) -> int:
    """Steps with a score in a run of IncreLoRA at its defaults."""
    rule: Any = IncreLora().method(modules, modules * 1000).rules[0]
    growth, window = rule.schedule(Run(steps), [], 0), rule.score.window
    last = [s for s in range(steps) if growth.due(s)][:10][-1]
    return sum(1 for s in range(last + 1) if window is None or growth.next(s) - s < window)


def event(results: Results) -> Found:
    """How much longer a step with a growth event is than a scored one, in steps after the budget."""
    own = results["growth"]["IncreLoRA"]
    extra = median(own.of("event")) - median(own.of("scored"))
    return {"ratio": max(0.0, extra) / median(own.of(AFTER))}


def memory(one: str, other: str) -> Callable[[Results], Found]:
    """Peak of a run in a process of its own ÷ the other's; three times each, the medians."""

    def find(results: Results) -> Found:
        setting = Setting(steps=20)
        return ratio(*([peak_memory(name, setting) for _ in range(3)] for name in (one, other)))

    return find


def host(one: str) -> Callable[[Results], Found]:
    """What a step of 1,000 tiny modules takes beyond the floor's ÷ what peft's LoRA takes beyond it."""

    def find(results: Results) -> Found:
        times = results["modules"]
        phase = AFTER if AFTER in times[one].phases else "all"
        floor = median(times["floor"].seconds)
        added = {one: median(times[one].of(phase)) - floor}
        added["peft LoRA"] = median(times["peft LoRA"].seconds) - floor
        return {"ratio": added[one] / added["peft LoRA"], "microseconds per module": added[one] * 1e3}

    return find


TARGETS = [
    Target("IncreLoRA, whole run, growth included ÷ peft LoRA", 0.95, whole("growth", "IncreLoRA", "peft LoRA")),
    Target("IncreLoRA after the budget is reached ÷ peft LoRA", 0.92, late("growth", "IncreLoRA", "peft LoRA")),
    Target("published IncreLoRA (dense ΔW) ÷ ours, same schedule", 1.8,
           whole("growth", "IncreLoRA, published", "IncreLoRA"), at_least=True),
    Target("AdaLoRA, whole run ÷ peft AdaLoRA", 0.92, whole("pruning", "AdaLoRA", "peft AdaLoRA")),
    Target("LoRA ÷ peft LoRA", 0.93, steady("lora", "LoRA", "peft LoRA")),
    *(Target(f"{name} ÷ peft LoRA", 1.05, steady("fixed", name, "peft LoRA"))
      for name in ("SoRA", "PRILoRA", "MELoRA", "MoRA")),
    *(Target(f"{name} ÷ peft LoRA, r = 2", 1.10, steady("small", name, "peft LoRA, r = 2"))
      for name in ("LoRTA", "LoRA-Mini")),
    Target("scoring, share of a run of 500 steps", 0.06, scoring_share(500)),
    Target("scoring, share of a run of 10,000 steps", 0.02, scoring_share(10_000)),
    Target("a growth event, in steps", 1.0, event),
    Target("peak memory, IncreLoRA ÷ peft LoRA", 1.05, memory("IncreLoRA", "peft LoRA")),
    Target("capacity 64 ÷ capacity 8", 1.02, whole("capacity", "IncreLoRA, capacity 64", "IncreLoRA, capacity 8")),
    Target("1,000 modules: host time per module, LoRA ÷ peft LoRA", 1.0, host("LoRA")),
    Target("1,000 modules: host time per module, IncreLoRA ÷ peft LoRA", 1.0, host("IncreLoRA")),
]  # fmt: skip
