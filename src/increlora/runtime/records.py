"""The full trace of a step, for tests and papers."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..deltas import BlockDelta, Status
from .births import created

if TYPE_CHECKING:
    from .controller import Controller


def record(controller: "Controller", ranks_before: dict[str, int], scores: Tensor | None) -> dict[str, Any]:
    """One entry of `controller.records`.

        {"step": g, "modules": {name: {"score", "sensitivity", "uncertainty", "importance", "rank", "grown",
                                       "lr_factor": {"lora_A0": …, …}}}}

    score: of this step, None where none was taken.   importance = sensitivity · uncertainty, with this step's score.
    rank: after this step's event.   grown: ranks added by it.   lr_factor: learning rate with which this step moved
    each live tensor, in units of the host's peak (`published` clock) or of the host's current rate (`ramp`).
    """
    sensitivity, uncertainty = controller.sensitivity.tolist(), controller.uncertainty.tolist()
    values = None if scores is None else scores.tolist()
    modules = {
        name: {
            "score": None if values is None else values[i],
            "sensitivity": sensitivity[i],
            "uncertainty": uncertainty[i],
            "importance": sensitivity[i] * uncertainty[i],
            "rank": delta.rank,
            "grown": delta.rank - ranks_before[name],
            "lr_factor": _factors(controller, delta),
        }
        for i, (name, delta) in enumerate(zip(controller.names, controller.deltas, strict=True))
    }
    return {"step": controller.step, "modules": modules}


def _factors(controller: "Controller", delta: BlockDelta) -> dict[str, float]:
    step, births = controller.step, controller.births
    return {
        f"lora_{letter}{i}": births.factors(created(delta, i, letter), step)[0] if births else 1.0
        for i in delta.indices(Status.ACTIVE, Status.RESERVE)
        for letter in delta.letters
    }
