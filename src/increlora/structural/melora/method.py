"""MELoRA: many mini adapters on the diagonal have a high rank for the parameters of one low rank.

    ΔW = (α/r) · diag(B_1 A_1, …, B_n A_n)       A_i (r, in/n) Kaiming-uniform (a = √5), B_i (out/n, r) = 0
    rank(ΔW) ≤ n r          parameters r (in + out), whatever n is

Slice i of the input reaches slice i of the output alone. n = 1 is LoRA.

Source: MELoRA (arXiv 2402.17263) and its published code. Differs: docs/methods/melora.md
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from ...decide.budget import Budget
from ...deltas import BlockDelta, LowRankDelta, Vectors
from ...errors import ConfigError
from ...methods.base import Method, Settings, Site, matching
from ...methods.checks import check_counts, check_patterns, check_shares
from ...methods.fixed_rank import one_block, rank_and_scale
from ...methods.initial import gaussian, kaiming, zeros
from .delta import BlockDiagonalDelta


@dataclass(frozen=True)
class MeLora(Settings):
    """Settings of MELoRA; by name or its ending (regex, first match) a module may have its own.

    Attributes:
        r: rank of every mini adapter, ≥ 1: the parameters are those of LoRA of this rank, the rank of ΔW is minis · r.
        minis: mini adapters per module, n ≥ 1; divides the module's in and out features.   minis_pattern: other n.
        lora_alpha: numerator of the scale α/r, r that of one mini adapter.   lora_dropout: on the branch's input.
        use_rslora: scale α/√r, r that of one mini adapter.
        rank_pattern, alpha_pattern: other ranks r ≥ 1 and α.
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    """

    reads = (Vectors,)

    r: int = 8
    minis: int = 2
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool = True
    minis_pattern: Mapping[str, int] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published GLUE script: minis = 2, lora_alpha = 16, lora_dropout = 0.05, unless given."""
        return cls(**{"r": r, "minis": 2, "lora_alpha": 16, "lora_dropout": 0.05} | overrides)

    def __post_init__(self) -> None:
        check_counts(self, ("r", "minis"))
        check_shares(self, ("lora_dropout",))
        check_patterns(self, ("rank_pattern", "minis_pattern"))

    def method(self, sites: int, uniform_parameters: int) -> Method:
        uniform = Budget(self.r * sites, self.r * uniform_parameters)
        return Method("melora", self._delta, Budget(None) if self.rank_pattern else uniform)

    def _delta(self, site: Site) -> BlockDelta:
        rank, scale = rank_and_scale(self, site.name)
        minis = matching(self.minis_pattern, site.name) or self.minis
        check_divides(minis, site)
        make: Callable[..., BlockDelta] = LowRankDelta if minis == 1 else partial(BlockDiagonalDelta, minis=minis)
        init = {"A": kaiming, "B": zeros if self.init_lora_weights else gaussian}
        return one_block(make, self, site, rank, init=init, scale=scale)


def check_divides(minis: int, site: Site) -> None:
    """Raise ConfigError unless the module can be cut into so many equal slices, with the nearest number that can."""
    common = math.gcd(site.in_features, site.out_features)
    if common % minis == 0:
        return
    nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: (abs(n - minis), n))
    raise ConfigError(
        f"{site.name}: minis={minis} does not divide both in={site.in_features} and out={site.out_features}; the "
        f"nearest that does is {nearest}: set it for this module by minis_pattern={{{site.name!r}: {nearest}}}, for "
        f"all by minis={nearest}, or leave the module out of `target_modules`"
    )
