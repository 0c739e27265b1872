"""How ΔW is built: trainable maps that know torch only (no base layer, no adapter name, no optimizer)."""

from .base import Delta, Status, Stored
from .beside import Pending, computed
from .block_diagonal import BlockDiagonalDelta
from .blocks import BlockDelta, Init
from .four_factor import FourFactorDelta
from .inputs import Inputs, Patches, Tokens, Vectors
from .lowrank import LowRankDelta
from .square import Form, SquareDelta
from .tensor import TensorBank, TensorDelta
from .triplet import TripletDelta

__all__ = [
    "BlockDelta", "BlockDiagonalDelta", "Delta", "Form", "FourFactorDelta", "Init", "Inputs", "LowRankDelta", "Patches",
    "Pending", "SquareDelta", "Status", "Stored", "TensorBank", "TensorDelta", "Tokens", "TripletDelta", "Vectors",
    "computed",
]  # fmt: skip
