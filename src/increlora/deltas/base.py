"""The interface of every delta, and rank that lives in blocks of fixed parameters.

    ΔW = Σ_blocks s · B_i diag(e_i) A_i        A_i (k, in)   e_i (k, 1)   B_i (out, k)

A block is born once and never reshaped: dormant → reserve → active, or retired. Only active and reserve blocks are
computed; a dormant block has no gradient, hence no optimizer state, and cannot move. Pruning works within blocks: it
says which ranks count (`kept`) and sets the others to zero.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .state import ModuleState, unpack

Init = Callable[[tuple[int, int], torch.Generator, int], Tensor]


class Status(IntEnum):
    """What a block is for at this moment; the values are written to checkpoints."""

    DORMANT = 0
    RESERVE = 1
    ACTIVE = 2
    RETIRED = 3


class Observer(Protocol):
    """What the runtime installs on a delta: told of every use in training (`wants`), it may ask to see it (`tap`:
    identity on the layer's output; `see_input`: identity on A, for the input before dropout), and it keeps the module's
    clocks and scores."""

    def wants(self) -> bool: ...
    def see_input(self, A: Tensor, x: Tensor) -> Tensor: ...
    def tap(self, delta: "Delta", y: Tensor, x: Tensor) -> Tensor: ...
    def state(self) -> list[float]: ...
    def load_state(self, values: list[float]) -> None: ...


class Delta(nn.Module):
    """Abstract trainable map for ΔW of shape (out_features, in_features).

    Attributes:
        observer: set by the runtime while a run is driven, else None.
        reserve_learns: blocks in reserve are part of the forward pass; otherwise they only wait.
        remembered: clocks and scores read from a checkpoint (step, sensitivity, uncertainty), until an observer
            takes them over.
    """

    def __init__(self, in_features: int, out_features: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.observer: Observer | None = None
        self.reserve_learns = True
        self.remembered: list[float] = [0.0, 0.0, 0.0]

    @property
    def rank(self) -> int:
        """Active rank: what counts against a budget."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = B @ A exactly, every scale folded in; A (R, in), B (out, R)."""
        raise NotImplementedError

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + ΔW x, with y (…, out) and x (…, in); y may be overwritten."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """ΔW x for x (…, in)."""
        return self.add_to(x.new_zeros(*x.shape[:-1], self.out_features), x)

    def weight(self) -> Tensor:
        """The dense ΔW (out, in) as the forward pass applies it, reserve included."""
        A, B = self.factors()
        return B @ A


class BlockDelta(Delta):
    """Abstract delta whose rank lives in blocks; subclasses name the parameters of a block in `letters`.

    Args:
        sizes: ranks of each block, in the order of birth.
        init: per letter, (shape, generator, block index) → initial values. The generator is seeded by `seed`, module
            and block alone, so every process and every order of construction draws the same numbers.
        scale: active rank → s.
        name: full module name; part of the seed.
    Attributes:
        kept: of each rank, whether it counts, where ranks are pruned; else empty.   settled: this will not change.
        closed: of each rank, whether it is left out of the forward pass; empty: none is. Its e is zero for good.
        statistics: what pruning has to remember, flat; filled by the runtime, and only while training.
    """

    letters: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sizes: Sequence[int],
        *,
        init: Mapping[str, Init],
        scale: Callable[[int], float],
        name: str = "",
        seed: int = 0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dropout=dropout)
        self.init, self.scale_of, self.name, self.seed = init, scale, name, seed
        self.sizes: list[int] = []
        self.status: list[Status] = []
        self.born: list[int] = []  # step after which the block became active; -1: with the model
        self.reserved: list[int] = []  # step after which it entered the reserve, else as `born`
        self.kept: list[bool] = []
        self.settled = False
        self.closed: list[bool] = []
        self.statistics = torch.zeros(0)
        for size in sizes:
            self._append_block(size, dtype or torch.get_default_dtype())

    # -- structure -----------------------------------------------------------------------------------------------

    def shape(self, letter: str, size: int) -> tuple[int, int]:
        """Shape of one parameter of a block of `size` ranks."""
        return {"A": (size, self.in_features), "E": (size, 1), "B": (self.out_features, size)}[letter]

    def size_of(self, A: Tensor) -> int:
        """Ranks of the block that this A belongs to: the inverse of `shape`."""
        return A.shape[0]

    def block(self, index: int) -> dict[str, nn.Parameter]:
        """Parameters of a block by letter; empty for a block that was loaded without them."""
        names = {letter: f"lora_{letter}{index}" for letter in self.letters}
        return {letter: getattr(self, name) for letter, name in names.items() if name in self._parameters}

    def _append_block(self, size: int, dtype: torch.dtype) -> None:
        index = len(self.sizes)
        self.sizes.append(size)
        self.status.append(Status.DORMANT)
        self.born.append(-1)
        self.reserved.append(-1)
        for letter in self.letters:
            self._set_parameter(letter, index, self.draw(letter, index).to(dtype))

    def _set_parameter(self, letter: str, index: int, values: Tensor) -> None:
        setattr(self, f"lora_{letter}{index}", nn.Parameter(values))

    def draw(self, letter: str, index: int) -> Tensor:
        """Initial values of one parameter, the same on every machine."""
        key = f"{self.seed}/{self.name}/{letter}{index}".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        generator = torch.Generator().manual_seed(number)
        return self.init[letter](self.shape(letter, self.sizes[index]), generator, index)

    def indices(self, *wanted: Status) -> list[int]:
        """Indices of the blocks in one of the given states, in the order of birth."""
        return [i for i, status in enumerate(self.status) if status in wanted]

    @property
    def live(self) -> list[int]:
        """Blocks that are computed: active, and the reserve if it learns."""
        if self.closed and all(self.closed):
            return []
        return self.indices(Status.ACTIVE, Status.RESERVE) if self.reserve_learns else self.indices(Status.ACTIVE)

    @property
    def rank(self) -> int:
        return sum(self.sizes[i] for i in self.indices(Status.ACTIVE)) - self.kept.count(False)

    @property
    def capacity(self) -> int:
        return sum(self.sizes[i] for i in range(len(self.sizes)) if self.status[i] != Status.RETIRED)

    @property
    def scale(self) -> float:
        """s for the current active rank."""
        return self.scale_of(self.rank)

    def still(self) -> list[nn.Parameter]:
        """Parameters that must not move now: all of dormant and retired blocks, e of the reserve."""
        idle = [p for i in range(len(self.sizes)) if i not in self.live for p in self.block(i).values()]
        return idle + [
            self.block(i)["E"] for i in self.live if self.status[i] == Status.RESERVE and "E" in self.letters
        ]

    def fit(self, sizes: Mapping[int, int], count: int, *, keep_dormant: bool) -> None:
        """Take the block structure of a checkpoint: `count` blocks, those in `sizes` with so many ranks. Blocks it
        leaves out are dropped unless `keep_dormant` (training goes on)."""
        like = next(iter(self.parameters()))
        while len(self.sizes) < count:
            self._append_block(sizes.get(len(self.sizes), 1), like.dtype)
        for i, size in sizes.items():
            if not self.block(i) or self.sizes[i] != size:
                self.sizes[i] = size
                for letter in self.letters:
                    self._set_parameter(letter, i, self.draw(letter, i).to(like))
        for i in set(range(len(self.sizes))) - set(sizes) if not keep_dormant else ():
            for letter in self.letters:
                self._parameters.pop(f"lora_{letter}{i}", None)
        for p in self.parameters():
            p.requires_grad_(like.requires_grad)

    # -- computation ---------------------------------------------------------------------------------------------

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.live:
            return y + self._gate(y.new_zeros(()))
        A, B = self._operands()
        B = self._gate(B)
        observer = self.observer if B.requires_grad and torch.is_grad_enabled() else None
        wanted = observer is not None and observer.wants()
        if observer is not None:
            A = observer.see_input(A, x)
        x = self.dropout(x)
        y = self._add_product(y, x, A, B)  # the same arithmetic, observed or not: resuming must not change a bit
        return observer.tap(self, y, x) if observer is not None and wanted else y

    def _operands(self) -> tuple[Tensor, Tensor]:
        """What `_add_product` multiplies x with; a delta with structure has a cheaper form of it than its factors."""
        return self.factors()

    def _add_product(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return add_product(y, x, A, B)

    def _gate(self, value: Tensor) -> Tensor:
        """`value`, with every idle parameter made part of the graph where a process group may insist on it."""
        if not (torch.is_grad_enabled() and in_process_group()):
            return value
        still = [p for p in self.still() if p.requires_grad]
        return ZeroGate.apply(value, *still) if still else value

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """All that a resumed run needs beside the parameters, see `state`. It travels inside the state dict, so any way
        of saving a model saves it."""
        own = self.observer.state() if self.observer is not None else self.remembered
        status = [int(s) for s in self.status]
        pruned = self.kept, self.settled, self.statistics, self.closed
        return ModuleState(own, status, self.born, self.reserved, *pruned).pack()

    def set_extra_state(self, state: Tensor) -> None:
        found = unpack(state)
        spare = len(self.sizes) - len(found.status)  # blocks that the checkpoint did not know
        self.status = [Status(s) for s in found.status] + [Status.DORMANT] * spare
        self.born, self.reserved = found.born + [-1] * spare, found.reserved + [-1] * spare
        self.kept, self.settled, self.closed = found.kept, found.settled, found.closed
        if len(self.statistics):  # somebody trains here
            given = found.statistics.to(self.statistics, copy=True)
            self.statistics = given if len(given) else torch.zeros_like(self.statistics)
        self.remembered = found.own
        if self.observer is not None:
            self.observer.load_state(found.own)


def matched(x: Tensor, A: Tensor) -> Tensor:
    """x in the adapter's dtype; autocast sees to that itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)


def add_product(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y + x Aᵀ Bᵀ, by one fused call where the dtypes agree; the result has the dtype of y."""
    h = nn.functional.linear(matched(x, A), A)
    if not h.dtype == y.dtype == B.dtype:
        return y + nn.functional.linear(h, B).to(y.dtype)
    total = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t())
    return total if y.dim() == 2 else total.view(y.shape)  # FSDP2 distrusts views that a module returns


def in_process_group() -> bool:
    """Has torch.distributed been initialised? Then every parameter must take part in every backward pass: DDP insists,
    also in a group of one."""
    return dist.is_available() and dist.is_initialized()


class ZeroGate(torch.autograd.Function):
    """Identity that makes idle parameters part of the graph with gradient zero; the runtime clears it before a step."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *still: Tensor) -> Tensor:
        ctx.save_for_backward(*still)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *(torch.zeros_like(p) for p in ctx.saved_tensors))
