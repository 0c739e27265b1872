"""How ΔW is built: trainable maps that know torch only (no base layer, no adapter name, no optimizer)."""

from .base import Delta, Status, Stored
from .blocks import BlockDelta, Init
from .inputs import Inputs, Patches, Tokens, Vectors
from .lowrank import LowRankDelta, TripletDelta
from .state import ModuleState

__all__ = [
    "BlockDelta", "Delta", "Init", "Inputs", "LowRankDelta", "ModuleState", "Patches", "Status", "Stored", "Tokens",
    "TripletDelta", "Vectors",
]  # fmt: skip
