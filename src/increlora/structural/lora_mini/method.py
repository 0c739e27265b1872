"""LoRA-Mini: of four factors the two outer ones are random and frozen, and only the small inner pair is trained.

    ΔW = (α/r) · B_aux B A A_aux       A_aux (a, in), B_aux (out, b) frozen; A (r, a), B (b, r) trained, B = 0 at first
    parameters r (a + b)               LoRA: r (in + out)               rank(ΔW) ≤ min(r, a, b)

`matched`: A_aux ~ N(0, 1/a), B_aux ~ N(0, 1/b), A ~ U(±1/√in). So A A_aux starts as large as LoRA's A, and a step of
Adam moves A A_aux and B_aux B as much as it would move LoRA's A and B, entry by entry.

Source: LoRA-Mini (arXiv 2411.15804), of which the abstract and one file of the published code could be read.
Differs: docs/methods/lora_mini.md
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ...decide.budget import Budget
from ...deltas import Vectors
from ...errors import ConfigError
from ...methods.base import Method, Site, in_blocks
from ...methods.initial import Shape, gaussian, kaiming, zeros
from ...methods.options import Count, LoraOptions
from ...methods.scaling import rank_and_scale
from .delta import FourFactorDelta


@dataclass(frozen=True)
class LoraMini(LoraOptions):
    """Settings of LoRA-Mini. The published ones are not known: every default is ours.

    Attributes:
        r: rank of the inner pair, ≥ 1.   lora_alpha: numerator of the scale α/r.   lora_dropout: on the branch's input.
        use_rslora: scale α/√r.
        inner_in: a, rows of A_aux, from 1 to the module's in features.   inner_out: b, columns of B_aux, from 1 to its
            out features. Default of both: a twentieth of the smaller of in and out, but at least r, and at most what
            the module has.
        reduction: ρ ≥ 1, instead of inner sizes: a = in/ρ and b = out/ρ, rounded, so that ρ times fewer parameters than
            LoRA's are trained.
        init: outer factors N(0, 1/a) and N(0, 1/b), a start and steps of LoRA's size (`matched`); N(0, 1), as in the
            published file (`official_aux`); orthonormal rows of A_aux and columns of B_aux (`orthonormal`). B starts at
            zero, A never.
        forward: multiply the weights first (`composed`), send the input through four factors and keep only a numbers of
            each token for the backward pass (`sequential`), or what takes fewer multiplications (`auto`).
        save_projection: write the outer factors to adapter files; False: draw them again on loading, and compare.
        rank_pattern, alpha_pattern: other ranks r ≥ 1 and α, by module name or its ending (regex, first match).
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    """

    reads = (Vectors,)

    use_rslora: bool = False
    inner_in: Count | None = None
    inner_out: Count | None = None
    reduction: float | None = None
    init: Literal["matched", "official_aux", "orthonormal"] = "matched"
    forward: Literal["auto", "composed", "sequential"] = "auto"
    save_projection: bool = True
    rank_pattern: Mapping[str, Count] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction is not None and not 1 <= self.reduction < float("inf"):
            raise ConfigError(
                f"reduction={self.reduction!r}: give a number of at least 1 (LoRA's parameters ÷ trained)"
            )
        if self.reduction is not None and (self.inner_in or self.inner_out):
            raise ConfigError(f"reduction={self.reduction!r} beside inner_in or inner_out: give one of the two")

    def method(self, sites: int, uniform_parameters: int) -> Method:
        most = None if self.rank_pattern else self.r * uniform_parameters
        return Method("lora_mini", partial(self._delta, warned=set()), Budget(None, most))

    def _delta(self, site: Site, *, warned: set[tuple[int, ...]]) -> FourFactorDelta:
        rank, scale = rank_and_scale(self, site.name)
        inner = self._inner(site, rank)
        if (rank, *inner) not in warned:  # once for all modules alike
            warned.add((rank, *inner))
            warn_of_sizes(site.name, rank, *inner)
        outer, narrower = LAWS[self.init], math.sqrt(inner[0] / site.in_features) if self.init == "matched" else 1.0
        init = {"aux_A": outer, "aux_B": outer, "A": partial(narrowed, narrower),
                "B": zeros if self.init_lora_weights else gaussian}  # fmt: skip
        return in_blocks(
            FourFactorDelta, self, site, [rank],
            init=init, scale=scale, inner=inner, path=self.forward, save_projection=self.save_projection,
        )  # fmt: skip

    def _inner(self, site: Site, rank: int) -> tuple[int, int]:
        """(a, b) of one module. Raises ConfigError for sizes above the module's."""
        ends = site.in_features, site.out_features
        if self.reduction is not None:
            a, b = (max(1, round(end / self.reduction)) for end in ends)
            return a, b
        for side, most in zip(("in", "out"), ends, strict=True):
            size = getattr(self, f"inner_{side}")
            if size is not None and size > most:
                raise ConfigError(
                    f"{site.name}: inner_{side}={size} is above {side}={most}; give at most {most}, or `reduction`, "
                    f"which follows the shape of each module, or leave the module out of `target_modules`"
                )
        usual = max(rank, round(min(ends) / 20))
        return self.inner_in or min(usual, ends[0]), self.inner_out or min(usual, ends[1])


def warn_of_sizes(name: str, r: int, a: int, b: int) -> None:
    """Warn of an inner pair that holds more numbers than the matrix B A it makes, or that cannot have rank r."""
    if min(a, b) < r:
        text = f"the rank of ΔW is at most {min(a, b)}: lower r to that, or raise the inner sizes to r"
    elif r * (a + b) > a * b:
        text = f"{r * (a + b)} numbers make a matrix of {a * b}: lower r, or raise the inner sizes (2 r is enough)"
    else:
        return
    warnings.warn(f"{name} and modules like it: r={r} with inner sizes a={a}, b={b}: {text}", stacklevel=2)


# -- initial values: the shape is (a, in) or (out, b), and no inner size is above its outer one ------------------------


def narrowed(factor: float, shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """`kaiming`, `factor` times as wide."""
    return kaiming(shape, generator, block) * factor


def spread(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """N(0, 1/inner size)."""
    return unit(shape, generator, block) / math.sqrt(min(shape))


def unit(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """N(0, 1), whatever torch's default dtype is: a file may rely on drawing the same again."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def orthonormal(shape: Shape, generator: torch.Generator, block: int) -> Tensor:
    """Orthonormal rows or columns, those there are fewer of."""
    return nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64), generator=generator)


LAWS = {"matched": spread, "official_aux": unit, "orthonormal": orthonormal}
