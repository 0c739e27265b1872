"""Rank that lives in blocks of fixed parameters.

    ΔW = Σ_blocks s · B_i diag(e_i) A_i        A_i (k, in)   e_i (k, 1)   B_i (out, k)

A block is born once and never reshaped: dormant → reserve → active, or retired. Only active and reserve blocks are
computed; a dormant block has no gradient, hence no optimizer state, and cannot move. Pruning works within blocks: it
says which ranks count (`kept`) and sets the others to zero.
The buffer `lora_state` says all this; whoever writes into it, an average of weights for one, changes the module.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BudgetError, CheckpointError, DriveError
from ..ops.fused_linear import Pending, computed
from ..ops.parallel import ZeroGate, in_process_group
from ..seeding import generator_of
from .base import Status, check_known, check_shape
from .inputs import VECTORS, Inputs
from .state import STATE, STATISTICS, ModuleState, pack_statistics
from .stateful import StatefulDelta

Init = Callable[[tuple[int, int], torch.Generator, int], Tensor]


def zeros(shape: tuple[int, int], generator: torch.Generator | None, block: int) -> Tensor:
    return torch.zeros(shape)


def ones(shape: tuple[int, int], generator: torch.Generator | None, block: int) -> Tensor:
    return torch.ones(shape)


CONSTANT = (zeros, ones)  # they draw nothing, and a generator costs more than they do


class Derived(NamedTuple):
    """What follows from the state of the blocks: which are computed, the active rank, names of frozen parameters."""

    state: ModuleState
    reserve_learns: bool
    live: list[int]
    rank: int
    frozen: list[str]


class BlockDelta(StatefulDelta):
    """Abstract delta whose rank lives in blocks; subclasses name the parameters of a block in `letters`.

    Args:
        sizes: ranks of each block, in the order of birth.
        init: per letter, (shape, generator, block index) → initial values. The generator is seeded by `seed`, module
            and block alone, so every process and every order of construction draws the same numbers.
        scale: active rank → s.
        name: full module name; part of the seed.   inputs: what the module reads.   active: blocks that begin active.
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
        active: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, scale=scale, name=name, dropout=dropout, inputs=inputs)
        self.init, self.seed = init, seed
        self._names: list[list[tuple[str, str]]] = []  # of the parameters of every block, by letter
        self._derived: Derived | None = None
        self._check_size(sizes)
        for size in sizes:
            self._append_block(size, dtype or torch.get_default_dtype())
        self.constant = len(self.sizes) == 1
        self.assign(status=[Status.ACTIVE] * active)

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
        return (self.out_features, size) if letter == "B" else (size, self.in_features if letter == "A" else 1)

    def size_of(self, A: Tensor) -> int:
        """Ranks of the block whose first parameter this is: the inverse of `shape`."""
        return A.shape[0]

    def block(self, index: int) -> dict[str, nn.Parameter]:
        """Parameters of a block by letter; empty for a block that was loaded without them. Raises DriveError if
        something has put other tensors in their place."""
        own: Any = self._parameters
        found = {letter: own[name] for letter, name in self._names[index] if name in own}
        if not found and any(name in self.__dict__ for _, name in self._names[index]):
            raise DriveError(
                f"{self.name}.{self._names[index][0][1]} is gone, as FSDP1 takes parameters out of modules to make one "
                f"tensor of them: use FSDP2 (`fully_shard`), DDP or one process"
            )
        return found

    def _append_block(self, size: int, dtype: torch.dtype) -> None:
        index = len(self.sizes)
        self.sizes.append(size)
        self._names.append([(letter, f"lora_{letter}{index}") for letter in self.letters])
        self._derived = None
        self._make_parameters(index, dtype)

    def _make_parameters(self, index: int, like: torch.dtype | Tensor) -> None:
        for letter, name in self._names[index]:
            drawn = self.draw(letter, index)
            # quicker than an assignment, and there may be 100,000; accelerate's `init_empty_weights` waits for it
            self.register_parameter(name, nn.Parameter(drawn if drawn.dtype is like else drawn.to(like)))

    def draw(self, letter: str, index: int) -> Tensor:
        """Initial values of one parameter, the same on every machine."""
        init, shape = self.init[letter], self.shape(letter, self.sizes[index])
        if init in CONSTANT:
            return zeros(shape, None, index) if init is zeros else ones(shape, None, index)
        return init(shape, generator_of(f"{self.seed}/{self.name}/{letter}{index}"), index)

    def indices(self, *wanted: Status) -> list[int]:
        """Indices of the blocks in one of the given states, in the order of birth."""
        return [i for i, status in enumerate(self.state.status) if status in wanted]

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
            return self._derive(self._state)
        known, (read, version), buffer = self._derived, self._read, self._buffers[STATE]
        unread = buffer is not read or read._version != version
        if unread or known is None or known.state is not self._state or known.reserve_learns != self.reserve_learns:
            known = self._derived = self._derive(self.state)
        return known

    def _derive(self, state: ModuleState) -> Derived:
        computed_states = (Status.ACTIVE, Status.RESERVE) if self.reserve_learns else (Status.ACTIVE,)
        live = [i for i, status in enumerate(state.status) if status in computed_states]
        if state.closed and all(state.closed):
            live = []
        frozen = [name for i, names in enumerate(self._names) if i not in live for _, name in names]
        reserve = [i for i in live if state.status[i] is Status.RESERVE]
        frozen += [name for i in reserve for letter, name in self._names[i] if letter == "E"]
        return Derived(state, self.reserve_learns, live, state.rank_of(self.sizes), frozen)

    @property
    def reserve(self) -> int:
        return sum(self.sizes[i] for i in self.indices(Status.RESERVE))

    @property
    def capacity(self) -> int:
        return sum(self.sizes) - sum(self.sizes[i] for i in self.indices(Status.RETIRED))

    @property
    def scale(self) -> float:
        """s for the current active rank."""
        return self.scale_of(self.rank)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that must not move now: all of dormant and retired blocks, e of the reserve."""
        own: Any = self._parameters
        return [own[name] for name in self._current().frozen if name in own]

    def block_parameters(self) -> list[nn.Parameter]:
        """Parameters of all blocks."""
        return [p for p in self._parameters.values() if p is not None]

    # -- computation ---------------------------------------------------------------------------------------------

    def add_to(self, y: Tensor | Pending, x: Tensor) -> Tensor:
        if self.observer is not None and self.observer.copied and torch.compiler.is_compiling():
            return self._add_outside_of_graphs(y, x)
        if not self.live:
            y = computed(y)
            return y + self._gate(y.new_zeros(()))
        A, B = self._operands()
        observer = self.observer if torch.is_grad_enabled() else None
        if observer is not None and not (A.requires_grad or B.requires_grad):
            observer.rests()
            observer = None
        B = self._gate(B)
        wanted = observer is not None and observer.wants_gradients()
        if observer is not None:
            A = observer.tap_input(A, x)
        x = self.inputs.dropped(x, self.dropout)
        y = self._add_product(y, x, A, B)  # the same arithmetic, observed or not: resuming must not change a bit
        return observer.tap_output(y, x) if observer is not None and wanted else y

    @torch.compiler.disable
    def _add_outside_of_graphs(self, y: Tensor | Pending, x: Tensor) -> Tensor:
        """A graph would not notice that an average of weights has got another state."""
        return self.add_to(y, x)

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
        if not values:
            return {}
        self.note_step()  # buffers go along even where somebody has picked the parameters alone
        values = {name: buffer for name, buffer in self._buffers.items() if buffer is not None} | {**values}
        idle = {name for i in self.indices(Status.DORMANT, Status.RETIRED) for _, name in self._names[i]}
        written = {name: value for name, value in values.items() if name not in idle}
        left = pack_statistics(self.statistics, self.idle_slots)
        written.pop(STATISTICS, None)
        return written | {STATISTICS: left} if len(left) > 1 + len(self.statistics) else written

    def check(self, found: Mapping[str, Tensor]) -> None:
        status = self.given(found)[0].status
        present = [i for i, s in enumerate(status) if s in (Status.ACTIVE, Status.RESERVE)]
        parameters = {f"lora_{letter}{i}" for i in present for letter in self.letters}
        check_known(found, parameters | {STATE, STATISTICS} | self._buffers.keys())
        self.check_entries(found)

    def check_entries(self, found: Mapping[str, Tensor]) -> None:
        state = self.given(found)[0]
        self._check_size([1] * len(state.status))
        for i, status in enumerate(state.status):
            if status not in (Status.ACTIVE, Status.RESERVE):
                continue
            first = f"lora_{self.letters[0]}{i}"
            if first not in found:
                raise CheckpointError(f"{first}: expected a tensor, found nothing; the adapter file is incomplete")
            size = max(1, self.size_of(found[first])) if found[first].dim() == 2 else self.sizes[0]
            for letter in self.letters:
                check_shape(f"lora_{letter}{i}", self.shape(letter, size), found)
        self.check_state(state, self.sizes_in(found))

    def sizes_in(self, found: Mapping[str, Tensor]) -> list[int]:
        """Ranks of the blocks among these entries, 0 for one that is not there."""
        first = [found.get(f"lora_{self.letters[0]}{i}") for i in range(len(self.given(found)[0].status))]
        return [0 if A is None else self.size_of(A) for A in first]

    def fit(self, found: Mapping[str, Tensor], *, keep_dormant: bool) -> None:
        first = f"lora_{self.letters[0]}"
        sizes = {int(name[len(first) :]): self.size_of(t) for name, t in found.items() if name.startswith(first)}
        like = next(iter(self.parameters()))
        while len(self.sizes) < len(self.given(found)[0].status):
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
        self._derived = None
        kept = [True] * sum(self.sizes) if self.state.kept else []
        self.assign(kept=kept, closed=[])  # some state of the new blocks; theirs is loaded next

    @torch.no_grad()
    def left_out(self, given: Container[str]) -> dict[str, Tensor]:
        """Parameters of blocks: unchanged, or freshly drawn if they lie on the meta device or have been trained."""
        found = {}
        for i, status in enumerate(self.state.padded(len(self.sizes)).status):
            for letter, p in self.block(i).items():
                drawn = status != Status.DORMANT or p.is_meta
                if f"lora_{letter}{i}" not in given:
                    found[f"lora_{letter}{i}"] = self.draw(letter, i).to(p.dtype) if drawn else p.detach()
        return found


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts as one tensor; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
