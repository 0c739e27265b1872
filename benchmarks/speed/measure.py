"""Time, calls, bytes: of several subjects in turn, in one process, so that what disturbs one disturbs all."""

import gc
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adalora_calls import Calls

from .subjects import SUBJECTS, Session
from .workloads import WORKLOADS

WARM_UP = 2  # steps that are made, and not counted


@dataclass(frozen=True)
class Setting:
    """Where subjects are compared.   steps: length of the run.   threads: 0: torch's default."""

    workload: str = "minilm"
    batch: int = 32
    length: int = 64
    steps: int = 60
    device: str = "cpu"
    threads: int = 0


@dataclass
class Times:
    """Seconds of the steps that were measured, the phase each belongs to, its number, and its optimizer's share."""

    seconds: list[float] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def of(self, phase: str) -> list[float]:
        return [s for s, p in zip(self.seconds, self.phases, strict=True) if phase in ("all", p)]

    def beside(self, other: "Times", phase: str = "all") -> tuple[list[float], list[float]]:
        """Both at the steps that both have, where ours is in this phase."""
        theirs = dict(zip(other.steps, other.seconds, strict=True))
        rows = zip(self.seconds, self.phases, self.steps, strict=True)
        pairs = [(s, theirs[step]) for s, p, step in rows if step in theirs and phase in ("all", p)]
        return [one for one, _ in pairs], [two for _, two in pairs]


def started(name: str, setting: Setting) -> Session:
    workload = WORKLOADS[setting.workload]
    batch = workload.batch(setting.batch, setting.length, setting.device)
    return SUBJECTS[name](workload, batch, setting.steps)


def settled(name: str, setting: Setting) -> Session:
    """With the ranks of the end of its run: all steps but one are made, on a batch so small that they cost little."""
    session = started(name, setting)
    asked, session.batch = session.batch, WORKLOADS[setting.workload].batch(1, 4, setting.device)
    for _ in range(setting.steps - 1):
        session.step()
    session.batch = asked
    return session


def in_turn(
    names: Sequence[str],
    setting: Setting,
    progress: Any = None,
    *,
    every: int = 1,
    start: Callable[[str, Setting], Session] = started,
) -> dict[str, Times]:
    """A whole run of each subject, one step of each after the other; the order turns with every step.

    `start`: makes the sessions that are measured.   `every`: of all but the last subject one step in so many is made,
    of a run that is shorter by as much; for those whose steps are all alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads or threads)
    for name in names:  # what is made once per process is made now
        session = started(name, setting)
        for _ in range(WARM_UP):
            session.step()
    rare = dict.fromkeys(names[:-1] if every > 1 else (), every)
    runs = {name: replace(setting, steps=setting.steps // rare.get(name, 1)) for name in names}
    sessions = {name: start(name, runs[name]) for name in names}
    found = {name: Times() for name in names}
    gc.collect()
    gc.disable()  # a collection would fall on whoever comes next
    for step in range(setting.steps):
        for place in range(len(names)):
            name = names[(step + place) % len(names)]
            if step % rare.get(name, 1):
                continue
            found[name].seconds.append(timed(sessions[name], setting.device))
            found[name].phases.append(sessions[name].phase())
            found[name].steps.append(step)
            found[name].optimizer.append(sessions[name].optimizing)
        if progress is not None:
            progress()
    gc.enable()
    torch.set_num_threads(threads)
    return found


def timed(session: Session, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    session.step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Ratio of medians, and the quartiles of the ratios of pairs where both are of one length."""
    found = {"ratio": statistics.median(one) / statistics.median(other)}
    if len(one) == len(other) > 3:
        low, _, high = statistics.quantiles([a / b for a, b in zip(one, other, strict=True)], n=4)
        found |= {"low": low, "high": high}
    return found


# -- what does not depend on the machine -------------------------------------------------------------------------------


def calls(name: str, setting: Setting) -> int:
    """Operations of a step at the end of the run."""
    session = settled(name, setting)
    with Calls() as counted:
        session.step()
    return counted.count


def saved_bytes(name: str, setting: Setting) -> int:
    """What one forward pass, at the end of the run, keeps for its backward pass; parameters left out."""
    session = settled(name, setting)
    known = {t.untyped_storage().data_ptr() for t in (*session.model.parameters(), *session.model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = session.model(**session.batch).loss
    loss.backward()
    return sum(found.values())


# -- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(name: str, setting: Setting) -> int:
    """Bytes at the peak of a run, of a process of its own: resident memory, or the accelerator's allocator."""
    context = mp.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, setting))


def _peak(name: str, setting: Setting) -> int:
    session = started(name, setting)
    for _ in range(setting.steps):
        session.step()
    if setting.device != "cpu":
        return torch.cuda.max_memory_allocated()
    # not getrusage: what the parent had in memory when it forked counts there
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def summary(found: Mapping[str, Times]) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds, quartiles, number of steps and median seconds of the optimizer; by subject and phase."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, times in found.items():
        table[name] = {}
        for phase in ["all", *sorted(set(times.phases))]:
            own = times.of(phase)
            low, middle, high = statistics.quantiles(own, n=4) if len(own) > 1 else own * 3
            row = {"median": middle, "low": low, "high": high, "steps": len(own), "sum": sum(own)}
            spent = [o for o, p in zip(times.optimizer, times.phases, strict=True) if phase in ("all", p)]
            table[name][phase] = row | {"optimizer": statistics.median(spent)}
    return table
