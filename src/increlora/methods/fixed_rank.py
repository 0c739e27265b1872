"""What methods with a fixed rank share: r and α by module name, and one block that is active from the start."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ..deltas import BlockDelta, Status
from .base import Site, matching
from .scaling import fixed, scale_of

Made = TypeVar("Made", bound=BlockDelta)


def rank_and_scale(settings: Any, name: str) -> tuple[int, Callable[[int], float]]:
    """r and s = α/r (or α/√r) of a module: the settings' own, or those of the first pattern that matches its name."""
    rank = matching(settings.rank_pattern, name) or settings.r
    alpha = matching(settings.alpha_pattern, name) or settings.lora_alpha
    return rank, partial(fixed, scale_of(alpha, rank, rslora=settings.use_rslora))


def one_block(make: Callable[..., Made], settings: Any, site: Site, rank: int, **parts: Any) -> Made:
    """A delta with one active block of `rank` ranks; `parts` are `init`, `scale` and what this kind of delta adds."""
    delta = make(
        site.in_features, site.out_features, [rank],
        name=site.name, seed=settings.seed, dropout=settings.lora_dropout, dtype=site.dtype, inputs=site.inputs,
        **parts,
    )  # fmt: skip
    delta.status[0] = Status.ACTIVE
    return delta
