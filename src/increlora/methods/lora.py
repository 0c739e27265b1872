"""LoRA: the yardstick, and the simplest row of the frame.

    ΔW = (α/r) B A        A Kaiming-uniform (a = √5), B = 0; rank r everywhere, fixed

Source: LoRA, section 4.1. Differs: nothing (equal to peft's LoRA step by step from equal initial values).
"""

from dataclasses import dataclass

from ..budget import Budget
from ..deltas import LowRankDelta, Status
from ..errors import ConfigError
from .base import Method, Site
from .initial import gaussian, kaiming, zeros


@dataclass(frozen=True)
class Lora:
    """Settings of LoRA, named as in peft.

    Attributes:
        r: rank of every module, ≥ 1.   lora_alpha: numerator of the scale α/r.   lora_dropout: on the branch's input.
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r={self.r}: the rank must be at least 1")

    def method(self, sites: int, uniform_parameters: int) -> Method:
        return Method("lora", self._delta, Budget(self.r * sites, self.r * uniform_parameters))

    def _delta(self, site: Site) -> LowRankDelta:
        delta = LowRankDelta(
            site.in_features, site.out_features, [self.r],
            init={"A": kaiming, "B": zeros if self.init_lora_weights else gaussian},
            scale=lambda rank: self.lora_alpha / self.r,
            name=site.name, seed=self.seed, dropout=self.lora_dropout, dtype=site.dtype,
        )  # fmt: skip
        delta.status[0] = Status.ACTIVE
        return delta
