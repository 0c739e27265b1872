"""The scale s of ΔW, which every method with an α has."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from .base import matching


def scale_of(alpha: float, rank: float, *, rslora: bool) -> float:
    """s = α/r as LoRA has it, or rank-stabilised, α/√r: moves of ΔW then keep their size whatever r is.

    Args:
        rank: r > 0, in ranks; an average need not be whole.
    Source: rsLoRA (arXiv 2312.03732), its main theorem.   Differs: r may be an average, which the method names."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def fixed(scale: float, active: int) -> float:
    """A scale whatever the active rank is; `partial(fixed, scale)` can be pickled."""
    return scale


def rank_and_scale(settings: Any, name: str) -> tuple[int, Callable[[int], float]]:
    """r and s = α/r (or α/√r) of a module: the settings' own, or those of the first pattern that matches its name."""
    rank = matching(settings.rank_pattern, name) or settings.r
    alpha = matching(settings.alpha_pattern, name) or settings.lora_alpha
    return rank, partial(fixed, scale_of(alpha, rank, rslora=settings.use_rslora))
