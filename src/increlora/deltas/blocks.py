"""Rank that lives in blocks of fixed parameters.

    ΔW = Σ_blocks s · B_i diag(e_i) A_i        A_i (k, in)   e_i (k, 1)   B_i (out, k)

A block is born once and never reshaped: dormant → reserve → active, or retired. Only active and reserve blocks are
computed; a dormant block has no gradient, hence no optimizer state, and cannot move. Pruning works within blocks: it
says which ranks count (`kept`) and sets the others to zero.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BudgetError, CheckpointError
from ..ops.fused_linear import Pending, computed
from ..ops.parallel import ZeroGate, in_process_group
from ..seeding import generator_of
from .base import Delta, Status, check_known, check_shape
from .inputs import VECTORS, Inputs
from .state import STATE, ModuleState, unpack, without_statistics

Init = Callable[[tuple[int, int], torch.Generator, int], Tensor]

FEW = 8  # statistics of a module that stay where nobody trains; averages of every entry are not


class Derived(NamedTuple):
    """What follows from the `state` of the blocks: which are computed, the active rank, names of frozen parameters."""

    state: object
    live: list[int]
    rank: int
    frozen: list[str]


class BlockDelta(Delta):
    """Abstract delta whose rank lives in blocks; subclasses name the parameters of a block in `letters`.

    Args:
        sizes: ranks of each block, in the order of birth.
        init: per letter, (shape, generator, block index) → initial values. The generator is seeded by `seed`, module
            and block alone, so every process and every order of construction draws the same numbers.
        scale: active rank → s.
        name: full module name; part of the seed.   inputs: what the module reads.
    Attributes:
        kept: of each rank, whether it counts, where ranks are pruned; else empty.   settled: this will not change.
        closed: of each rank, whether it is left out of the forward pass; empty: none is. Its e is zero for good.
        statistics: what each rule has to remember, while training.   idle_slots: those that files leave out.
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
        inputs: Inputs = VECTORS,
    ) -> None:
        super().__init__(in_features, out_features, name=name, dropout=dropout, inputs=inputs)
        self.init, self.scale_of, self.seed = init, scale, seed
        self.sizes: list[int] = []
        self._names: list[list[tuple[str, str]]] = []  # of the parameters of every block, by letter
        self._derived: Derived | None = None
        self.status: list[Status] = []
        self.born: list[int] = []  # step after which the block became active; -1: with the model
        self.reserved: list[int] = []  # step after which it entered the reserve, else as `born`
        self.kept: list[bool] = []
        self.settled = False
        self.closed: list[bool] = []
        self.statistics: list[Tensor] = []
        self.idle_slots: frozenset[int] = frozenset()
        self._check_size(sizes)
        for size in sizes:
            self._append_block(size, dtype or torch.get_default_dtype())

    # -- structure -----------------------------------------------------------------------------------------------

    def _check_size(self, sizes: Sequence[int]) -> None:
        """Raise BudgetError for blocks that no matrix of this shape can use: whatever an option or a file says, an
        adapter takes memory in proportion to the model."""
        m, n = self.in_features, self.out_features
        numbers = sum(count * prod(self.shape(a, size)) for size, count in Counter(sizes).items() for a in self.letters)
        if numbers > max(1024 * (m + n), 4 * m * n) or len(sizes) > max(1024, m, n):
            raise BudgetError(
                f"{self.name}: {sum(sizes)} ranks in {len(sizes)} blocks would take {numbers:,} numbers beside a "
                f"matrix ({n}, {m}): lower `r`, `capacity` or what else says so"
            )

    def shape(self, letter: str, size: int) -> tuple[int, int]:
        """Shape of one parameter of a block of `size` ranks."""
        return {"A": (size, self.in_features), "E": (size, 1), "B": (self.out_features, size)}[letter]

    def size_of(self, A: Tensor) -> int:
        """Ranks of the block whose first parameter this is: the inverse of `shape`."""
        return A.shape[0]

    def block(self, index: int) -> dict[str, nn.Parameter]:
        """Parameters of a block by letter; empty for a block that was loaded without them."""
        own: Any = self._parameters
        return {letter: own[name] for letter, name in self._names[index] if name in own}

    def _append_block(self, size: int, dtype: torch.dtype) -> None:
        index = len(self.sizes)
        self.sizes.append(size)
        self._names.append([(letter, f"lora_{letter}{index}") for letter in self.letters])
        self.status.append(Status.DORMANT)
        self.born.append(-1)
        self.reserved.append(-1)
        self._make_parameters(index, dtype)

    def _make_parameters(self, index: int, like: torch.dtype | Tensor) -> None:
        for letter, name in self._names[index]:
            setattr(self, name, nn.Parameter(self.draw(letter, index).to(like)))

    def draw(self, letter: str, index: int) -> Tensor:
        """Initial values of one parameter, the same on every machine."""
        generator = generator_of(f"{self.seed}/{self.name}/{letter}{index}")
        return self.init[letter](self.shape(letter, self.sizes[index]), generator, index)

    def indices(self, *wanted: Status) -> list[int]:
        """Indices of the blocks in one of the given states, in the order of birth."""
        return [i for i, status in enumerate(self.status) if status in wanted]

    @property
    def live(self) -> list[int]:
        """Blocks that are computed: active, and the reserve if it learns."""
        return self._current().live

    @property
    def free(self) -> list[int]:
        """Blocks that may still become active, in the order of birth."""
        return self.indices(Status.RESERVE, Status.DORMANT)

    @property
    def rank(self) -> int:
        return self._current().rank

    def _current(self) -> Derived:
        """Every use of the module asks, so it is derived anew only when something has changed. A graph that is being
        compiled keeps nothing: it would be compiled again for what it has kept."""
        if torch.compiler.is_compiling():
            return self._derive(None)
        state = tuple(self.status), tuple(self.sizes), tuple(self.kept), tuple(self.closed), self.reserve_learns
        if self._derived is None or self._derived.state != state:
            self._derived = self._derive(state)
        return self._derived

    def _derive(self, state: object) -> Derived:
        active = self.indices(Status.ACTIVE)
        live = self.indices(Status.ACTIVE, Status.RESERVE) if self.reserve_learns else active
        if self.closed and all(self.closed):
            live = []
        frozen = [name for i, names in enumerate(self._names) if i not in live for _, name in names]
        reserve = [i for i in live if self.status[i] == Status.RESERVE]
        frozen += [name for i in reserve for letter, name in self._names[i] if letter == "E"]
        return Derived(state, live, sum(self.sizes[i] for i in active) - self.kept.count(False), frozen)

    @property
    def reserve(self) -> int:
        return sum(self.sizes[i] for i in self.indices(Status.RESERVE))

    @property
    def capacity(self) -> int:
        return sum(self.sizes[i] for i in range(len(self.sizes)) if self.status[i] != Status.RETIRED)

    @property
    def scale(self) -> float:
        """s for the current active rank."""
        return self.scale_of(self.rank)

    def copy_state_from(self, other: "BlockDelta") -> None:
        """Take over what of `other` is no parameter and decides what is computed."""
        self.status, self.settled = list(other.status), other.settled
        self.kept, self.closed = list(other.kept), list(other.closed)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that must not move now: all of dormant and retired blocks, e of the reserve."""
        own: Any = self._parameters
        return [own[name] for name in self._current().frozen if name in own]

    def block_parameters(self) -> list[nn.Parameter]:
        """Parameters of all blocks."""
        return [p for p in self._parameters.values() if p is not None]

    def reserve_statistics(self, slot: int, size: int, dtype: torch.dtype) -> None:
        """Have `size` numbers for the rule at place `slot`, zeros unless there are so many already."""
        self.statistics += [torch.zeros(0)] * (slot + 1 - len(self.statistics))
        if len(self.statistics[slot]) != size:
            self.statistics[slot] = torch.zeros(size, dtype=dtype)

    # -- computation ---------------------------------------------------------------------------------------------

    def add_to(self, y: Tensor | Pending, x: Tensor) -> Tensor:
        if not self.live:
            y = computed(y)
            return y + self._gate(y.new_zeros(()))
        A, B = self._operands()
        B = self._gate(B)
        observer = self.observer if B.requires_grad and torch.is_grad_enabled() else None
        wanted = observer is not None and observer.wants_gradients()
        if observer is not None:
            A = observer.tap_input(A, x)
        x = self.inputs.dropped(x, self.dropout)
        y = self._add_product(y, x, A, B)  # the same arithmetic, observed or not: resuming must not change a bit
        return observer.tap_output(y, x) if observer is not None and wanted else y

    def _operands(self) -> tuple[Tensor, Tensor]:
        """What `_add_product` multiplies x with; a delta with structure has a cheaper form of it than its factors."""
        raise NotImplementedError

    def _add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """y + ΔW x."""
        raise NotImplementedError

    def _gate(self, value: Tensor) -> Tensor:
        """`value`, with every idle parameter made part of the graph where a process group may insist on it."""
        if not (torch.is_grad_enabled() and in_process_group()):
            return value
        idle = [p for p in self.frozen_parameters() if p.requires_grad]
        return ZeroGate.apply(value, *idle) if idle else value

    # -- checkpoints: parameters of active and reserve blocks, and the state; tensors say everything -------------------

    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        idle = {name for i in self.indices(Status.DORMANT, Status.RETIRED) for _, name in self._names[i]}
        written = {name: value for name, value in values.items() if name not in idle}
        if STATE in written:
            written[STATE] = without_statistics(written[STATE], self.idle_slots)
        return written

    def check(self, found: Mapping[str, Tensor]) -> None:
        if STATE not in found:
            raise CheckpointError(f"{STATE} is missing: the adapter file is incomplete or not increlora's")
        state = unpack(found[STATE])
        if self.kept and not state.kept:
            raise CheckpointError(f"{STATE} does not say which ranks count: it belongs to another method")
        self._check_size([1] * len(state.status))
        present = [i for i, s in enumerate(state.status) if s in (Status.ACTIVE, Status.RESERVE)]
        entries = {f"lora_{letter}{i}" for i in present for letter in self.letters}
        check_known(found, entries | {STATE} | self._buffers.keys())
        for i in present:
            first = f"lora_{self.letters[0]}{i}"
            if first not in found:
                raise CheckpointError(f"{first}: expected a tensor, found nothing; the adapter file is incomplete")
            size = max(1, self.size_of(found[first])) if found[first].dim() == 2 else self.sizes[0]
            for letter in self.letters:
                check_shape(f"lora_{letter}{i}", self.shape(letter, size), found)

    def fit(self, found: Mapping[str, Tensor], *, keep_dormant: bool) -> None:
        first = f"lora_{self.letters[0]}"
        sizes = {int(name[len(first) :]): self.size_of(t) for name, t in found.items() if name.startswith(first)}
        like = next(iter(self.parameters()))
        while len(self.sizes) < len(unpack(found[STATE]).status):
            self._append_block(sizes.get(len(self.sizes), 1), like.dtype)
        for i, size in sizes.items():
            if not self.block(i) or self.sizes[i] != size:
                self.sizes[i] = size
                self._make_parameters(i, like)
        for i in set(range(len(self.sizes))) - set(sizes) if not keep_dormant else ():
            for _, name in self._names[i]:
                self._parameters.pop(name, None)
        for p in self.parameters():
            p.requires_grad_(like.requires_grad)

    @torch.no_grad()
    def left_out(self, given: Container[str]) -> dict[str, Tensor]:
        """Parameters of blocks: unchanged, or freshly drawn if they lie on the meta device or have been trained."""
        found = {}
        for i, status in enumerate(self.status):
            for letter, p in self.block(i).items():
                drawn = status != Status.DORMANT or p.is_meta
                if f"lora_{letter}{i}" not in given:
                    found[f"lora_{letter}{i}"] = self.draw(letter, i).to(p.dtype) if drawn else p.detach()
        return found

    def get_extra_state(self) -> Tensor:
        """All that a resumed run needs beside the parameters, see `state`. It travels inside the state dict, so any way
        of saving a model saves it."""
        steps = self.observer.step if self.observer is not None else self.steps
        status = [int(s) for s in self.status]
        pruned = self.kept, self.settled, self.closed
        return ModuleState(steps, status, self.born, self.reserved, *pruned, self.statistics).pack()

    def set_extra_state(self, state: Tensor) -> None:
        found = unpack(state)
        spare = len(self.sizes) - len(found.status)  # blocks that the checkpoint did not know
        self.status = [Status(s) for s in found.status] + [Status.DORMANT] * spare
        self.born, self.reserved = found.born + [-1] * spare, found.reserved + [-1] * spare
        self.kept, self.settled, self.closed = found.kept, found.settled, found.closed
        for slot, own in enumerate(self.statistics):  # there are some while somebody trains here
            given = found.statistics[slot] if slot < len(found.statistics) else own[:0]
            self.statistics[slot] = given.to(own, copy=True) if len(given) else torch.zeros_like(own)
        if not self.statistics and 0 < max(map(len, found.statistics), default=0) <= FEW:
            self.statistics = [values.clone() for values in found.statistics]  # for who trains on, or saves it again
        self.steps = found.step
        if self.observer is not None:
            self.observer.loaded(found.step)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts as one tensor; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
