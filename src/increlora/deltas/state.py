"""What a resumed run needs of one module beside its parameters, as one vector that travels in the state dict.

    1, step, sensitivity, uncertainty, status…, born…, reserved…                             where nothing is pruned
    2, step, sensitivity, uncertainty, n, status…, born…, reserved…, settled, k, kept…, statistics…     where pruning is

All float64: float32 statistics lose nothing. n blocks, k ranks (0 where whole ranks are not pruned); kept is 1 for a
rank that counts, 0 for one that does not, −1 for one that is not even computed any more.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCKS, PRUNED = 1, 2  # formats
STATE_FORMAT = PRUNED  # the newest that is read


@dataclass
class ModuleState:
    """One module.   own: step, sensitivity, uncertainty.   status, born, reserved: of each block.

    kept: of each rank, whether it counts; empty where ranks are not pruned.   settled: that will not change any more.
    closed: of each rank, whether it is out of the forward pass; empty where none is.
    statistics: what pruning has to remember, as a flat tensor; empty where that is nothing.
    """

    own: list[float]
    status: list[int]
    born: list[int]
    reserved: list[int]
    kept: list[bool] = field(default_factory=list)
    settled: bool = False
    statistics: Tensor = field(default_factory=lambda: torch.zeros(0))
    closed: list[bool] = field(default_factory=list)

    def pack(self) -> Tensor:
        """The vector, float64, on the CPU."""
        blocks = [*self.status, *self.born, *self.reserved]
        if not self.kept and not len(self.statistics):
            return vector([BLOCKS, *self.own, *blocks])
        closed = self.closed or [False] * len(self.kept)
        flags = [float(k) - float(c) for k, c in zip(self.kept, closed, strict=True)]
        head = [PRUNED, *self.own, len(self.status), *blocks, self.settled, len(flags), *flags]
        return torch.cat([vector(head), self.statistics.detach().to("cpu", torch.float64)])


def unpack(state: Tensor) -> ModuleState:
    """The state out of its vector. Raises ValueError if it is not a whole one."""
    if int(state[0]) == BLOCKS:
        own, blocks, rest = state[1:4].tolist(), state[4:].tolist(), state[:0]
        count = len(blocks) // 3
    else:
        own, count = state[1:4].tolist(), int(state[4])
        blocks, rest = state[5 : 5 + 3 * count].tolist(), state[5 + 3 * count :]
    if len(own) != 3 or len(blocks) != 3 * count or count == 0:
        raise ValueError(f"{len(state)} entries")
    status, born, reserved = ([int(v) for v in blocks[i * count : (i + 1) * count]] for i in range(3))
    if not len(rest):
        return ModuleState(own, status, born, reserved)
    ranks = int(rest[1])
    flags = rest[2 : 2 + ranks].tolist()
    if len(flags) != ranks:
        raise ValueError(f"{len(flags)} of {ranks} ranks")
    kept, closed = [v > 0 for v in flags], [v < 0 for v in flags]
    return ModuleState(
        own, status, born, reserved, kept, bool(rest[0]), rest[2 + ranks :], closed if any(closed) else []
    )


def without_idle_statistics(state: Tensor) -> Tensor:
    """The vector as it is worth writing to a file: statistics only while they can still change something."""
    found = unpack(state)
    return state[: len(state) - len(found.statistics)] if found.settled else state


def vector(values: list[float]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)
