"""What one module has beside its parameters; it travels in every state dict.

    lora_state        a buffer of integers: what decides the function, and how far the run is. Whatever copies buffers
                      copies it: averages of weights, `deepcopy`, federated learning, distributed checkpoints
    lora_statistics   float64, the extra state: what the rules remember

    lora_state = 16 · (4, step, settled, rounds, mantissa, exponent, n, status…, born…, reserved…, k, flags…, check ×6)

n blocks, k ranks (0 where whole ranks are not pruned). The flag of a rank: 1 it counts, 0 it does not, −1 it is not
even computed any more. The scale is mantissa · 10^exponent.
An average of equal integers may be off by one, hence the factor. An average of different states is no state, but can
look like one, hence the checksum: three bytes, and 255 minus each, since averages of integers get stuck going up.
"""

import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import Status

STATE, STATISTICS = "lora_state", "lora_statistics"  # their names on disk
STATE_FORMAT = 4
FACTOR, TOLERANCE = 16, 3
HEAD = 7  # numbers before those of the blocks
MOST_STEPS, LARGEST = 1 << 26, torch.finfo(torch.float32).max
DAMAGED = "the adapter file is damaged; restore it from a copy"
vector = partial(torch.tensor, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class ModuleState:
    """One module.

    Attributes:
        step: optimizer steps of the run so far.   status, born, reserved: of each block.
        kept: of each rank, whether it counts; empty where ranks are not pruned.   settled: that is final.
        closed: of each rank, whether it is out of the forward pass; empty where none is.
        rounds: finished rounds, of a method that restarts.   scale: s at this rank; None: an earlier version wrote it.
    """

    step: int
    status: tuple[Status, ...]
    born: tuple[int, ...]
    reserved: tuple[int, ...]
    kept: tuple[bool, ...] = ()
    settled: bool = False
    closed: tuple[bool, ...] = ()
    rounds: int = 0
    scale: float | None = None

    def rank_of(self, sizes: Sequence[int]) -> int:
        """The active rank of blocks of these sizes."""
        states = zip(sizes, self.status, strict=False)
        return sum(size for size, status in states if status is Status.ACTIVE) - self.kept.count(False)

    @property
    def closed_flags(self) -> tuple[bool, ...]:
        """`closed`, a flag of each rank."""
        return self.closed or (False,) * len(self.kept)

    def pack(self) -> Tensor:
        """The integers, int32, on the CPU."""
        flags = [int(k) - int(c) for k, c in zip(self.kept, self.closed_flags, strict=True)]
        values = [STATE_FORMAT, self.step, int(self.settled), self.rounds, *decimal(self.scale or 0.0),
                  len(self.status), *self.status, *self.born, *self.reserved, len(flags), *flags]  # fmt: skip
        values = [int(value) for value in values]
        return torch.tensor([FACTOR * v for v in (*values, *checksum(values))], dtype=torch.int32, device="cpu")

    def padded(self, blocks: int) -> "ModuleState":
        """The same with dormant blocks behind, so that there are at least so many."""

        def longer(values: tuple[Any, ...], new: int) -> tuple[Any, ...]:
            return (*values, *[new] * (blocks - len(values)))

        status, born = longer(self.status, Status.DORMANT), longer(self.born, -1)
        return replace(self, status=status, born=born, reserved=longer(self.reserved, -1))


def unpack(state: Tensor) -> ModuleState:
    """The state out of its integers. Raises CheckpointError if these are no state, or of a newer version."""
    if state.dim() != 1 or not state.numel() or state.is_complex():
        raise damaged(f"{state.dtype}, shape {tuple(state.shape)}")
    if state.dtype in (torch.float16, torch.bfloat16):
        raise damaged(f"as {state.dtype}, which cannot hold it: cast entries of floating-point numbers alone")
    values = whole(state)
    if values[0] != STATE_FORMAT:
        raise newer(values[0])
    blocks = values[HEAD - 1] if len(values) >= HEAD else 0
    ranks = len(values) - HEAD - 3 * blocks - 7
    if blocks < 1 or ranks < 0 or values[HEAD + 3 * blocks] != ranks:
        raise damaged(f"{len(values)} entries")
    if values[-6:] != checksum(values[:-6]):
        raise averaged("its checksum is wrong")
    _, step, settled, rounds, mantissa, exponent, _ = values[:HEAD]
    status, born, reserved = (tuple(values[HEAD + i * blocks : HEAD + (i + 1) * blocks]) for i in range(3))
    found = of_numbers(step, status, born, reserved, bool(settled), values[-6 - ranks : -6])
    return replace(found, rounds=rounds, scale=mantissa * 10.0**exponent if mantissa else None)


def of_numbers(
    step: int, status: Sequence[int], born: Sequence[int], reserved: Sequence[int], settled: bool, flags: Sequence[int]
) -> ModuleState:
    """The state with these numbers. Raises CheckpointError for numbers that no run leaves behind."""
    if not status or not set(status) <= set(Status):
        raise damaged(f"states of blocks {list(status)}")
    if not 0 <= step <= MOST_STEPS or not all(-1 <= number <= step for number in (*born, *reserved)):
        raise damaged(f"step {step}, blocks made at {list(born)} and {list(reserved)}")
    if not set(flags) <= {-1, 0, 1}:
        raise damaged(f"flags of ranks {list(flags)}")
    closed = tuple(flag < 0 for flag in flags) if -1 in flags else ()
    states = tuple(Status(s) for s in status)
    return ModuleState(step, states, tuple(born), tuple(reserved), tuple(f > 0 for f in flags), settled, closed)


def whole(state: Tensor) -> list[int]:
    """The integers behind `lora_state`."""
    codes = state.detach().to("cpu", torch.float64)
    numbers = (codes / FACTOR).round()
    if not (fits := (codes - FACTOR * numbers).abs() <= TOLERANCE).all():
        value = codes[~fits][0]
        raise averaged(f"{value:g} is no whole number of it")
    return [int(number) for number in numbers.tolist()]


def checksum(values: Sequence[int]) -> list[int]:
    """Three bytes that change with the values, and not linearly; and their complements."""
    check = zlib.crc32(repr(list(values)).encode()).to_bytes(4, "big")[:3]
    return [*check, *(255 - byte for byte in check)]


def decimal(scale: float) -> tuple[int, int]:
    """(m, e) with scale ≈ m · 10^e to six digits."""
    digits, _, exponent = f"{scale:.5e}".partition("e")
    return round(float(digits) * 10**5), int(exponent) - 5


def is_old(packed: Tensor | None) -> bool:
    """Is it a vector of formats 1 to 3?"""
    return packed is not None and packed.dtype == torch.float64 and packed.dim() == 1 and packed[:1].tolist() < [4.0]


def damaged(what: str) -> CheckpointError:
    return CheckpointError(f"{STATE} ({what}): {DAMAGED}")


def averaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"{STATE} ({what}, as in an average of adapters whose ranks differ): average entries of floating-point numbers "
        f"alone, and copy {STATE} as it is; a file with it is damaged, restore it from a copy"
    )


def newer(version: object) -> CheckpointError:
    return CheckpointError(
        f"{STATE}: written in format {version}, this version reads {STATE_FORMAT}; upgrade increlora"
    )


# -- statistics ----------------------------------------------------------------------------------------------------


def pack_statistics(statistics: Sequence[Tensor], idle: Container[int] = ()) -> Tensor:
    """(m, (length, values…)…) of m rules, without the values at the `idle` places."""
    parts = [vector([len(statistics)])]
    for slot, values in enumerate(statistics):
        left = values.detach().to("cpu", torch.float64)[: 0 if slot in idle else None]
        parts += [vector([len(left)]), left]
    return torch.cat(parts)


def unpack_statistics(packed: Tensor) -> list[Tensor]:
    """What each rule remembers. Raises CheckpointError if it cannot be that."""
    return Reader(packed, STATISTICS).statistics()


class Reader:
    """Numbers taken from the front of a vector. Raises CheckpointError if they are not there, or not finite."""

    def __init__(self, values: Tensor, name: str) -> None:
        self.name, self.size = name, values.numel()
        self.left = values.detach().to("cpu", torch.float64) if values.dim() == 1 else values.new_zeros(0)

    def take(self, count: int) -> Tensor:
        if not 0 <= count <= len(self.left):
            raise CheckpointError(f"{self.name} ({self.size} entries): {DAMAGED}")
        part, self.left = self.left[:count], self.left[count:]
        return part

    def whole(self, count: int) -> list[int]:
        values = self.take(count)
        numbers = values.round()  # averages of equal numbers, see above
        if not ((values - numbers).abs() <= 1e-6).all():
            raise CheckpointError(f"{self.name} ({values.tolist()} are no whole numbers): {DAMAGED}")
        return [int(number) for number in numbers.tolist()]

    def one(self) -> int:
        return self.whole(1)[0]

    def statistics(self) -> list[Tensor]:
        """All that is left."""
        count = self.one()
        found = [self.take(self.one()) for _ in range(count)] if count >= 0 else [self.take(count)]
        self.end()
        for values in found:
            if not (values.abs() <= LARGEST).all():
                raise CheckpointError(f"{self.name} (not finite, or beyond float32): {DAMAGED}")
        return found

    def end(self) -> None:
        if len(self.left):
            raise CheckpointError(f"{self.name} ({self.size} entries): {DAMAGED}")


def unpack_old(packed: Tensor) -> tuple[ModuleState, list[Tensor]]:
    """State and statistics out of the one float64 vector of formats 1 to 3; 1 and 2 had the averages of growth at a
    fixed place, and one rule at most. Raises CheckpointError."""
    reader = Reader(packed, STATE)
    version, step = reader.whole(2)
    if version not in (1, 2, 3):
        raise newer(version)
    growth = [] if version == 3 else [reader.take(2)]  # sensitivity, uncertainty
    count = len(reader.left) // 3 if version == 1 else reader.one()
    status, born, reserved = (reader.whole(count) for _ in range(3))
    settled, flags = (bool(reader.one()), reader.whole(reader.one())) if version > 1 else (False, [])
    state = of_numbers(step, status, born, reserved, settled, flags)
    if version == 3:
        return state, reader.statistics()
    rest = reader.take(len(reader.left)) if version == 2 else None
    reader.end()
    return state, [rest] if rest is not None else [values for values in growth if values.any()]
