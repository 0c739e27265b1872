"""SoRA's published code, quirk by quirk; each is a switch, so that each can be turned off.

    ΔW = s · B diag(e) A,   s = α / init_r
    e ← 0 unless |v| ≥ 2ξ, else v − ξ sign(v)            v: the host's step on e; ξ is given

Source: SoRA (arXiv 2311.11696), its published code.   Differs: docs/methods/sora.md
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from ..decide.projections import published_shrink, soft_threshold
from .base import Method, Penalty
from .sora import SoraOptions


@dataclass(frozen=True)
class SoraPaper(SoraOptions):
    """SoRA as published: the options of SoRA, and the switches that only its published code has.

    Switches of the published code
        operator: `published` (its dead zone is 2ξ wide), or the `exact` soft threshold.
        scaling: α / init_r, the rank of every module at the start (`initial_rank`), or α / average rank at the end
            (`constant`).
        penalty_place: whether gradient clipping sees the penalty (in your own loop: see `regularization_loss`).
    """

    operator: Literal["exact", "published"] = "published"
    scaling: Literal["constant", "initial_rank"] = "initial_rank"
    penalty_place: Literal["after_clipping", "before_clipping"] = "before_clipping"

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published code, step by step; `overrides` are further options by name.

        Unless given, threshold = 3e-4, gate_penalty = 10 and lora_alpha = 16 (its STS-B script), and ranks are counted
        every 100 steps, which changes nothing in training."""
        script = {
            "r": r, "lora_alpha": 16, "threshold": 3e-4, "warmup_steps": 0, "settle_steps": 1, "interval_steps": 100,
            "close_after": None, "gate_penalty": 10.0,
        }  # fmt: skip
        return cls(**script | overrides)

    def method(self, sites: int, uniform_parameters: int) -> Method:
        return self.shrinking(
            sites, uniform_parameters, operator={"exact": soft_threshold, "published": published_shrink}[self.operator],
            penalty=Penalty(self.gate_penalty, "l1", self.penalty_place), average=self.scaling == "constant",
        )  # fmt: skip
