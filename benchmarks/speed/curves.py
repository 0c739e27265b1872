"""How cost grows: over models and batches, ranks, capacities, numbers of modules. See docs/performance.md."""

from statistics import median
from typing import Any

from .measure import Setting, Times, calls, in_turn, saved_bytes
from .subjects import SUBJECTS
from .targets import AFTER

PAIR = ("floor", "peft LoRA", "LoRA", "IncreLoRA")
METHODS = [name for name in SUBJECTS if "r = " not in name and "capacity" not in name and name != "floor"]

# curve → (label, setting, subjects); the first subject is the floor
CURVES: dict[str, list[tuple[str, Setting, tuple[str, ...]]]] = {
    "models": [
        (f"{model}, {batch} × {length}", Setting(model, batch, length, steps=steps), PAIR)
        for model, batch, length, steps in (
            ("minilm", 8, 64, 30), ("minilm", 8, 256, 24), ("minilm", 32, 256, 14), ("bert", 8, 64, 20),
            ("bert", 8, 256, 14), ("llama", 8, 64, 20), ("llama", 8, 256, 14),
        )
    ],
    "rank": [
        (f"r = {r}", Setting("minilm", 8, 64, steps=20), ("floor", f"peft LoRA, r = {r}", f"LoRA, r = {r}"))
        for r in (1, 2, 16, 64)
    ],
    "modules": [
        (f"{n} modules", Setting(f"chain-{n}", 1, 1, steps=40, threads=1), PAIR) for n in (36, 250, 1000)
    ],
}  # fmt: skip


def curve(name: str) -> list[dict[str, Any]]:
    """Rows of one curve: medians of steps with the final ranks, in ms."""
    rows = []
    for label, setting, subjects in CURVES[name]:
        found = in_turn(subjects, setting)
        rows.append({"at": label} | {subject: settled(times) * 1e3 for subject, times in found.items()})
    return rows


def settled(times: Times) -> float:
    """Median of the steps whose ranks are the final ones."""
    return median(times.of(AFTER) if AFTER in times.phases else times.seconds)


def counts() -> list[dict[str, Any]]:
    """Operations of a step, and what it keeps for its backward pass, of every method, at the end of its run."""
    setting = Setting(batch=8, steps=20)
    floor = calls("floor", setting), saved_bytes("floor", setting)
    rows = []
    for name in METHODS:
        more = calls(name, setting) - floor[0], saved_bytes(name, setting) - floor[1]
        rows.append({"method": name, "operations": more[0], "MiB kept": more[1] / 2**20})
    return rows
