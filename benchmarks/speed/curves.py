"""How cost grows: over models and batches, ranks, capacities, numbers of modules. See docs/performance.md."""

from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from .measure import Setting, calls, in_turn, saved_bytes, settled
from .subjects import SUBJECTS, Session

PAIR = ("floor", "peft LoRA", "LoRA", "IncreLoRA")
METHODS = [name for name in SUBJECTS if "r = " not in name and "capacity" not in name and name != "floor"]

# curve → (label, setting, subjects); the first subject is the floor, and `steps` are those that are measured
CURVES: dict[str, list[tuple[str, Setting, tuple[str, ...]]]] = {
    "models": [
        (f"{model}, {batch} × {length}", Setting(model, batch, length, steps=steps), PAIR)
        for model, batch, length, steps in (
            ("minilm", 8, 64, 20), ("minilm", 8, 256, 10), ("minilm", 32, 256, 6), ("bert", 8, 64, 10),
            ("bert", 8, 256, 6), ("llama", 8, 64, 12), ("llama", 8, 256, 8),
        )
    ],
    "rank": [
        (f"minilm, 8 × 64, r = {r}", Setting("minilm", 8, 64, steps=20),
         ("floor", f"peft LoRA, r = {r}", f"LoRA, r = {r}"))
        for r in (1, 2, 16, 64)
    ],
    "modules": [
        (f"{n} modules", Setting(f"chain-{n}", 1, 1, steps=40, threads=1), PAIR) for n in (36, 250, 1000)
    ],
}  # fmt: skip
RUN = 20  # steps of a whole run, in which ranks become final


def curve(name: str) -> Iterator[dict[str, Any]]:
    """Rows of one curve, as they are measured: medians of steps with the final ranks, in ms."""
    for label, setting, subjects in CURVES[name]:
        found = in_turn(subjects, setting, start=at_the_end)
        yield {"at": label} | {subject: median(times.seconds) * 1e3 for subject, times in found.items()}


def at_the_end(name: str, setting: Setting) -> Session:
    """Of a run of its own, whatever number of steps is measured."""
    return settled(name, replace(setting, steps=RUN))


def counts() -> list[dict[str, Any]]:
    """Operations of a step, and what it keeps for its backward pass, of every method, at the end of its run."""
    setting = Setting(batch=8, steps=RUN)
    floor = calls("floor", setting), saved_bytes("floor", setting)
    rows = []
    for name in METHODS:
        more = calls(name, setting) - floor[0], saved_bytes(name, setting) - floor[1]
        rows.append({"method": name, "operations": more[0], "MiB kept": more[1] / 2**20})
    return rows
