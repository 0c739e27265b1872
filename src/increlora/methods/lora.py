"""LoRA: the yardstick, and the simplest row of the frame.

    ΔW = (α/r) B A        A Kaiming-uniform (a = √5), B = 0; rank fixed: r everywhere, or as `rank_pattern` says

Source: LoRA, section 4.1. Differs: nothing (equal to peft's LoRA step by step from equal initial values).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..decide.budget import Budget
from ..deltas import LowRankDelta
from .base import Method, Site, in_blocks
from .initial import lora_start
from .options import Count, LoraOptions
from .scaling import rank_and_scale


@dataclass(frozen=True)
class PlainLora(LoraOptions):
    """Settings of LoRA, named as in peft.

    Attributes:
        r: rank of every module, ≥ 1.   lora_alpha: numerator of the scale α/r.   lora_dropout: on the branch's input.
        use_rslora: scale α/√r.
        rank_pattern, alpha_pattern: other ranks ≥ 1 and α, by module name or its ending (regex, first match).
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    """

    use_rslora: bool = False
    rank_pattern: Mapping[str, Count] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def method(self, sites: int, uniform_parameters: int) -> Method:
        uniform = Budget(self.r * sites, self.r * uniform_parameters)
        return Method("lora", self._delta, Budget(None) if self.rank_pattern else uniform)

    def _delta(self, site: Site) -> LowRankDelta:
        rank, scale = rank_and_scale(self, site.name)
        init = lora_start(site.inputs, random=not self.init_lora_weights)
        return in_blocks(LowRankDelta, self, site, [rank], init=init, scale=scale)
