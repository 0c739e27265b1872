"""What methods with a fixed rank share: r and α by module name, and one block that is active from the start."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .base import Made, Site, in_blocks, matching
from .scaling import fixed, scale_of


def rank_and_scale(settings: Any, name: str) -> tuple[int, Callable[[int], float]]:
    """r and s = α/r (or α/√r) of a module: the settings' own, or those of the first pattern that matches its name."""
    rank = matching(settings.rank_pattern, name) or settings.r
    alpha = matching(settings.alpha_pattern, name) or settings.lora_alpha
    return rank, partial(fixed, scale_of(alpha, rank, rslora=settings.use_rslora))


def one_block(make: Callable[..., Made], settings: Any, site: Site, rank: int, **parts: Any) -> Made:
    """A delta with one active block of `rank` ranks; see `in_blocks`."""
    return in_blocks(make, settings, site, [rank], **parts)
