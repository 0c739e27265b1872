"""How ΔW is built: trainable maps that know torch only (no base layer, no adapter name, no optimizer)."""

from .base import Delta, Status, Stored
from .block_diagonal import BlockDiagonalDelta
from .blocks import BlockDelta
from .lowrank import LowRankDelta
from .triplet import TripletDelta

__all__ = ["BlockDelta", "BlockDiagonalDelta", "Delta", "LowRankDelta", "Status", "Stored", "TripletDelta"]
