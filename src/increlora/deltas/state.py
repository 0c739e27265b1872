"""What a resumed run needs of one module beside its parameters, as one float64 vector that travels in the state dict.

    3, step, n, status…, born…, reserved…, settled, k, flags…, m, (length, values…)…

n blocks, k ranks (0 where whole ranks are not pruned), m rules. The flag of a rank: 1 it counts, 0 it does not, −1 it
is not even computed any more. float64 holds float32 statistics without loss.
Formats 1 and 2, of earlier versions, are read: they had the averages of growth at a fixed place, and one rule at most.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..errors import CheckpointError

STATE = "lora_state"  # its name on disk
STATE_FORMAT = 3
vector = partial(torch.tensor, dtype=torch.float64)


@dataclass
class ModuleState:
    """One module.

    Attributes:
        step: optimizer steps of the run so far.   status, born, reserved: of each block.
        kept: of each rank, whether it counts; empty where ranks are not pruned.   settled: that is final.
        closed: of each rank, whether it is out of the forward pass; empty where none is.
        statistics: what each rule remembers, flat.
    """

    step: int
    status: list[int]
    born: list[int]
    reserved: list[int]
    kept: list[bool] = field(default_factory=list)
    settled: bool = False
    closed: list[bool] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)

    def pack(self) -> Tensor:
        """The vector, on the CPU."""
        closed = self.closed or [False] * len(self.kept)
        flags = [float(k) - float(c) for k, c in zip(self.kept, closed, strict=True)]
        blocks = [*self.status, *self.born, *self.reserved]
        parts = [vector([STATE_FORMAT, self.step, len(self.status), *blocks, self.settled, len(flags), *flags,
                         len(self.statistics)])]  # fmt: skip
        for values in self.statistics:
            parts += [vector([len(values)]), values.detach().to("cpu", torch.float64)]
        return torch.cat(parts)


def unpack(state: Tensor) -> ModuleState:
    """The state out of its vector. Raises CheckpointError if it is not a whole one, or newer than this version."""
    if state.dim() != 1 or state.dtype != torch.float64:
        raise damaged(f"{state.dtype}, shape {tuple(state.shape)}")
    left = state

    def take(count: int) -> Tensor:
        """So many numbers from the front of what is left."""
        nonlocal left
        if not 0 <= count <= len(left):
            raise damaged(f"{len(state)} entries")
        part, left = left[:count], left[count:]
        return part

    def whole(count: int) -> list[int]:
        values = take(count).tolist()
        if not all(map(float.is_integer, values)):
            raise damaged(f"{values} are no whole numbers")
        return [int(value) for value in values]

    def one() -> int:
        return whole(1)[0]

    version, step = whole(2)
    if version not in (1, 2, STATE_FORMAT):
        raise CheckpointError(
            f"{STATE}: written in format {version}, this version reads {STATE_FORMAT}; upgrade increlora"
        )
    growth = [] if version == STATE_FORMAT else [take(2)]  # sensitivity, uncertainty
    count = len(left) // 3 if version == 1 else one()
    status, born, reserved = (whole(count) for _ in range(3))
    if count == 0 or not set(status) <= {0, 1, 2, 3}:
        raise damaged(f"states of blocks {status}")
    found = ModuleState(step, status, born, reserved, statistics=[values for values in growth if values.any()])
    if version > 1:
        found.settled, flags = bool(one()), whole(one())
        found.kept, closed = [flag > 0 for flag in flags], [flag < 0 for flag in flags]
        found.closed = closed if any(closed) else []
        found.statistics = [take(len(left))] if version == 2 else [take(one()) for _ in range(one())]
    if len(left):
        raise damaged(f"{len(state)} entries")
    return found


def damaged(what: str) -> CheckpointError:
    return CheckpointError(f"{STATE} ({what}): the adapter file is damaged; restore it from a copy")


def without_statistics(state: Tensor, slots: Container[int]) -> Tensor:
    """The vector without what the rules at these places remember, which cannot change anything any more."""
    found = unpack(state)
    found.statistics = [values[:0] if i in slots else values for i, values in enumerate(found.statistics)]
    return found.pack()
