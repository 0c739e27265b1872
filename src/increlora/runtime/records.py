"""What a step looked like: in short for the files of a run, in full for tests and papers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .births import births_of

if TYPE_CHECKING:
    from .controller import Controller


def snapshot(controller: "Controller") -> dict[str, dict[str, Any]]:
    """Rank and importance of every module now: {name: {"rank", "importance"}}.

    importance: what allocators see (it no longer changes once the budget is spent); None for methods without scores.
    """
    importance: Sequence[float | None] = controller.importance() or [None] * len(controller.names)
    return {
        name: {"rank": delta.rank, "importance": value}
        for name, delta, value in zip(controller.names, controller.deltas, importance, strict=True)
    }


def birth_factors(controller: "Controller") -> dict[int, float]:
    """{created: factor} for the tensors born during the run that the last step moved.

    created: optimizer step after which they entered training.   factor: their learning rate in that step, in units of
    the host's peak (`published` clock) or of the host's current rate (`ramp`). It depends on nothing but the birth.
    """
    births, step = controller.births, controller.step - 1
    if births is None:
        return {}
    known = {born for delta in controller.deltas for born in births_of(delta).values()}
    return {born: births.factors(born, step)[0] for born in sorted(known) if 0 <= born < step}


def record(controller: "Controller", ranks_before: dict[str, int]) -> dict[str, Any]:
    """One entry of `controller.records`.

        {"step": g, "modules": {name: {"rank", "grown", "importance", "lr_factor": {"lora_A0": …, …},
                                       "score", "sensitivity", "uncertainty"}}}

    rank: after this step's event.   grown: ranks added by it.   lr_factor: learning rate with which this step moved
    each live tensor, in units of the host's peak (`published` clock) or of the host's current rate (`ramp`).
    score: of this step, None where none was taken; like the averages only there if a rule scores modules.
    """
    step, births, modules = controller.step, controller.births, snapshot(controller)
    details = {key: values for rule in controller.rules for key, values in rule.details().items()}
    for i, (name, now) in enumerate(modules.items()):
        now["grown"] = now["rank"] - ranks_before[name]
        born = births_of(controller.deltas[i])
        now["lr_factor"] = {tensor: births.factors(b, step)[0] if births else 1.0 for tensor, b in born.items()}
        now |= {key: values[i] for key, values in details.items()}
    return {"step": step, "modules": modules}
