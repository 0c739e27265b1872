"""MELoRA: many mini adapters on the diagonal have a high rank for the parameters of one low rank.

    ΔW = (α/r) · diag(B_1 A_1, …, B_n A_n)       A_i (r, in/n) Kaiming-uniform (a = √5), B_i (out/n, r) = 0
    rank(ΔW) ≤ n r          parameters r (in + out), whatever n is
    lora_A0 (n r, in/n): A_1 above A_2 above …        lora_B0 (out, r): B_1 above B_2 above …

Slice i of the input reaches slice i of the output alone. n = 1 is LoRA.

Source: MELoRA (arXiv 2402.17263) and its published code. Differs: docs/methods/melora.md
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ..decide.budget import Budget
from ..deltas import BlockDelta, LowRankDelta, Vectors
from ..deltas.blocks import joined
from ..errors import ConfigError
from ..methods.base import Method, Site, in_blocks, matching
from ..methods.initial import gaussian, kaiming, zeros
from ..methods.options import Count, LoraOptions
from ..methods.scaling import rank_and_scale
from ..ops.fused_linear import Pending, computed, matched


class BlockDiagonalDelta(BlockDelta):
    """ΔW = s diag(B_i A_i) over the live blocks, computed as one batched product; s is folded into the smaller factor.

    The width of A says what n was: an adapter of another n does not fit.

    Args:
        minis: n ≥ 1; divides `in_features` and `out_features`.   sizes: ranks of each mini adapter, per block.
            Further arguments as for `BlockDelta`.
    """

    letters = ("A", "B")

    def __init__(self, in_features: int, out_features: int, *args: Any, minis: int, **options: Any) -> None:
        assert in_features % minis == out_features % minis == 0
        self.minis = minis
        super().__init__(in_features, out_features, *args, **options)

    def shape(self, letter: str, size: int) -> tuple[int, int]:
        return {"A": (self.minis * size, self.in_features // self.minis), "B": (self.out_features, size)}[letter]

    def size_of(self, A: Tensor) -> int:
        return A.shape[0] // self.minis

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self._operands()
        return torch.block_diag(*A), torch.block_diag(*B)

    def weight(self) -> Tensor:
        A, B = self._operands()
        return torch.block_diag(*torch.bmm(B, A))

    def _operands(self) -> tuple[Tensor, Tensor]:
        """A (n, r, in/n) and B (n, out/n, r) of all mini adapters."""
        blocks = [self.block(i) for i in self.live]
        A, B = ([b[letter].unflatten(0, (self.minis, -1)) for b in blocks] for letter in self.letters)
        a, b = joined(A, 1), joined(B, 2)
        if self.in_features <= self.out_features:
            return a * self.scale, b
        return a, b * self.scale

    def _add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        slices = matched(x, A).reshape(-1, self.minis, A.shape[2]).transpose(0, 1)  # views: nothing is copied
        added = torch.bmm(torch.bmm(slices, A.mT), B.mT)
        y = computed(y)
        return y + added.transpose(0, 1).reshape(y.shape).to(y.dtype)


@dataclass(frozen=True)
class MeLora(LoraOptions):
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

    minis: Count = 2
    use_rslora: bool = False
    minis_pattern: Mapping[str, Count] = field(default_factory=dict)
    rank_pattern: Mapping[str, Count] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published GLUE script: minis = 2, lora_alpha = 16, lora_dropout = 0.05, unless given."""
        return cls(**{"r": r, "minis": 2, "lora_alpha": 16, "lora_dropout": 0.05} | overrides)

    def method(self, sites: int, uniform_parameters: int) -> Method:
        uniform = Budget(self.r * sites, self.r * uniform_parameters)
        return Method("melora", self._delta, Budget(None) if self.rank_pattern else uniform)

    def _delta(self, site: Site) -> BlockDelta:
        rank, scale = rank_and_scale(self, site.name)
        minis = matching(self.minis_pattern, site.name) or self.minis
        check_divides(minis, site)
        make: Callable[..., BlockDelta] = LowRankDelta if minis == 1 else partial(BlockDiagonalDelta, minis=minis)
        init = {"A": kaiming, "B": zeros if self.init_lora_weights else gaussian}
        return in_blocks(make, self, site, [rank], init=init, scale=scale)


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
