"""The scale s of ΔW, which every method with an α has."""

import math


def scale_of(alpha: float, rank: float, *, rslora: bool) -> float:
    """s = α/r as LoRA has it, or rank-stabilised, α/√r: moves of ΔW then keep their size whatever r is.

    Args:
        rank: r > 0, in ranks; an average need not be whole.
    Source: rsLoRA (arXiv 2312.03732), its main theorem.   Differs: r may be an average, which the method names."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def fixed(scale: float, active: int) -> float:
    """A scale whatever the active rank is; `partial(fixed, scale)` can be pickled."""
    return scale
