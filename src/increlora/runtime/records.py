"""What a step looked like: in short for the files of a run, in full for tests and papers."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..deltas import BlockDelta, Status
from .births import created

if TYPE_CHECKING:
    from .controller import Controller


def snapshot(controller: "Controller") -> dict[str, dict[str, Any]]:
    """Rank and importance of every module now: {name: {"rank", "importance"}}.

    importance = sensitivity · uncertainty, the moving averages that allocators see (they stand still once the budget
    is spent); None for methods that score nothing.
    """
    scored = controller.method.score is not None
    importance = (controller.sensitivity * controller.uncertainty).tolist()
    return {
        name: {"rank": delta.rank, "importance": importance[i] if scored else None}
        for i, (name, delta) in enumerate(zip(controller.names, controller.deltas, strict=True))
    }


def birth_factors(controller: "Controller") -> dict[int, float]:
    """{created: factor} for the tensors born during the run that the last step moved.

    created: optimizer step after which they entered training.   factor: their learning rate in that step, in units of
    the host's peak (`published` clock) or of the host's current rate (`ramp`). It depends on nothing but the birth.
    """
    births, step = controller.births, controller.step - 1
    if births is None:
        return {}
    known = {
        created(delta, i, letter)
        for delta in controller.deltas
        for i in delta.indices(Status.ACTIVE, Status.RESERVE)
        for letter in delta.letters
    }
    return {born: births.factors(born, step)[0] for born in sorted(known) if 0 <= born < step}


def record(controller: "Controller", ranks_before: dict[str, int], scores: Tensor | None) -> dict[str, Any]:
    """One entry of `controller.records`.

        {"step": g, "modules": {name: {"score", "sensitivity", "uncertainty", "importance", "rank", "grown",
                                       "lr_factor": {"lora_A0": …, …}}}}

    score: of this step, None where none was taken.   importance: with this step's score.
    rank: after this step's event.   grown: ranks added by it.   lr_factor: learning rate with which this step moved
    each live tensor, in units of the host's peak (`published` clock) or of the host's current rate (`ramp`).
    """
    sensitivity, uncertainty = controller.sensitivity.tolist(), controller.uncertainty.tolist()
    values = None if scores is None else scores.tolist()
    modules = {
        name: now
        | {
            "score": None if values is None else values[i],
            "sensitivity": sensitivity[i],
            "uncertainty": uncertainty[i],
            "grown": now["rank"] - ranks_before[name],
            "lr_factor": _factors(controller, controller.deltas[i]),
        }
        for i, (name, now) in enumerate(snapshot(controller).items())
    }
    return {"step": controller.step, "modules": modules}


def _factors(controller: "Controller", delta: BlockDelta) -> dict[str, float]:
    step, births = controller.step, controller.births
    return {
        f"lora_{letter}{i}": births.factors(created(delta, i, letter), step)[0] if births else 1.0
        for i in delta.indices(Status.ACTIVE, Status.RESERVE)
        for letter in delta.letters
    }
