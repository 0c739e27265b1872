"""How ΔW is built: trainable maps that know torch only (no base layer, no adapter name, no optimizer)."""

from .base import Delta, Status, Stored
from .blocks import BlockDelta, Init
from .inputs import Inputs, Patches, Tokens, Vectors
from .lowrank import LowRankDelta, TripletDelta

__all__ = [
    "BlockDelta", "Delta", "Init", "Inputs", "LowRankDelta", "Patches", "Status", "Stored", "Tokens", "TripletDelta",
    "Vectors",
]  # fmt: skip
