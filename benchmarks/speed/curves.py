"""How cost grows: over models and batches, ranks, capacities, numbers of modules. See docs/performance.md."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from .measure import WARM_UP, Setting, calls, saved_bytes, settled, timed
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
        if setting.threads:
            torch.set_num_threads(setting.threads)
        sessions = {subject: settled(subject, replace(setting, steps=RUN)) for subject in subjects}
        yield {"at": label} | {subject: median(s) * 1e3 for subject, s in alternating(sessions, setting).items()}


def alternating(sessions: Mapping[str, Session], setting: Setting) -> dict[str, list[float]]:
    """Seconds of single steps, one subject after the other; the order turns, and the first steps do not count."""
    names = list(sessions)
    found: dict[str, list[float]] = {name: [] for name in names}
    for step in range(WARM_UP + setting.steps):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            found[name].append(timed(sessions[name], setting.device))
    return {name: seconds[WARM_UP:] for name, seconds in found.items()}


def counts() -> list[dict[str, Any]]:
    """Operations of a step, and what it keeps for its backward pass, of every method, at the end of its run."""
    setting = Setting(batch=8, steps=RUN)
    floor = calls("floor", setting), saved_bytes("floor", setting)
    rows = []
    for name in METHODS:
        more = calls(name, setting) - floor[0], saved_bytes(name, setting) - floor[1]
        rows.append({"method": name, "operations": more[0], "MiB kept": more[1] / 2**20})
    return rows
