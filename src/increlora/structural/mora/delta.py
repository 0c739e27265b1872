"""MoRA's form: one square matrix between a map that shortens x and one that lengthens y.

    ΔW = Σ_rounds D_i M_i C_i        M_i (R, R)   C_i: in → R, or c chunks of R   D_i: back, to out; C_i, D_i fixed

    truncation   C keeps the first R inputs, D writes the first R outputs
    sharing      C sums groups of inputs, D repeats over groups of outputs
    decoupling   x is cut into chunks of R, M applied to each, the results lie end to end
    rotation     the same, chunk b turned by b · θ first

n = ⌈in/R⌉ chunks go in, m = ⌈out/R⌉ come out. If n < m they are repeated; if n > m the last n − m
are not computed (their inputs are dead), or added to chunk b mod m (`fold`). Only M of the last round is trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...deltas.base import check_shape
from ...deltas.blocks import BlockDelta
from ...deltas.state import STATE, ModuleState, is_old
from ...deltas.stateful import StatefulDelta
from ...errors import CheckpointError
from ...ops.fused_linear import Pending, computed
from ...ops.parallel import full, local
from .maps import Groups, Layout, Lengthen, Pairing, Rotate, Shorten, shuffled

Operator = Literal["truncation", "sharing", "decoupling", "rotation"]
PAST = "lora_past"


@dataclass(frozen=True)
class SquareMaps:
    """C and D of a round for one shape.

    Attributes:
        side: R.   operator, compress, expand, pairing: see above and `maps`.
        wrap: where R does not divide `in`, the first inputs fill the gap at the end, and count twice.
        fold: chunks that the output has no room for are added to others.
        shuffle: key of a random order of inputs and of outputs; empty: as they are.
    """

    in_features: int
    out_features: int
    side: int
    operator: Operator
    compress: Layout
    expand: Layout
    wrap: bool
    pairing: Pairing
    fold: bool
    shuffle: str = ""

    @property
    def chunked(self) -> bool:
        return self.operator in ("decoupling", "rotation")

    @property
    def chunks(self) -> tuple[int, int]:
        """Chunks of the input that are used, and those that the matrix is applied to."""
        if not self.chunked:
            return 1, 1
        n, m = -(-self.in_features // self.side), -(-self.out_features // self.side)
        return (n if self.fold else min(n, m)), min(n, m)

    @property
    def dead(self) -> int:
        """Inputs that reach no output because it has no room for their chunk."""
        return max(0, self.in_features - self.chunks[0] * self.side) if self.chunked else 0

    @property
    def padding(self) -> int:
        """Inputs that are missing in the last chunk or row, where the form has such."""
        strided = self.operator == "sharing" and self.compress == "stride"
        return -self.in_features % self.side if self.chunked or strided else 0

    @property
    def misfit(self) -> str | None:
        """Why a matrix of this side cannot be used, if so."""
        if self.side < 1:
            return "is empty: raise `r`, or leave the module out of `target_modules`"
        if self.operator == "rotation" and self.side % 2:
            return "cannot be turned in pairs: give an even `side`"
        if self.wrap and self.padding > self.in_features:
            return "needs more than twice the inputs there are: lower `r`, or set pad='zero'"
        return None

    @property
    def inner(self) -> Groups:
        """Groups of inputs, chunks end to end."""
        wrap = self.padding if self.wrap else 0
        if self.operator == "sharing":
            return Groups(self.in_features, self.side, self.compress, wrap)
        used = self.side * self.chunks[0]
        return Groups(min(self.in_features, used), used, wrap=wrap if used >= self.in_features else 0)

    @property
    def outer(self) -> Groups:
        """Groups of outputs."""
        if self.operator == "truncation":
            return Groups(min(self.out_features, self.side), self.side)
        return Groups(self.out_features, self.chunks[1] * self.side, self.expand)

    def shorten(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """C x: (…, in) → (…, R), or (…, chunks, R)."""
        if self.shuffle:
            x = x.index_select(-1, shuffled(f"{self.shuffle}/in", self.in_features, x.device))
        z: Tensor = Shorten.apply(x, self.inner, dtype)
        if not self.chunked:
            return z
        used, applied = self.chunks
        if self.operator == "rotation":
            z = Rotate.apply(z.unflatten(-1, (used, self.side)), self.pairing).flatten(-2)
        if used > applied:
            z = Shorten.apply(z, Groups(used * self.side, applied * self.side), z.dtype)
        return z.unflatten(-1, (applied, self.side))

    def add_lengthened(self, y: Tensor, h: Tensor) -> Tensor:
        """y + D h."""
        h = h.flatten(-2) if self.chunked else h
        if not self.shuffle:
            return Lengthen.apply(y, h, self.outer)
        order = shuffled(f"{self.shuffle}/out", self.out_features, y.device)
        added: Tensor = Lengthen.apply(torch.zeros_like(y), h, self.outer)
        return y + added.index_select(-1, order)


class SquareDelta(BlockDelta):
    """ΔW = Σ D_i M_i C_i with one trained block of R "ranks", M; rounds with the same maps are computed as one.

    Args:
        maps: (number of a round, in, out, R) → its maps.   rounds: how many will be finished, as far as is known;
            None: there is one.   sizes: [R].   Further arguments as for `BlockDelta`; there is no scale.
    Attributes:
        lora_past: (room, R, R), M at the end of each finished round, no longer trained, then zeros; None without room.
    """

    letters = ("M",)
    lora_M0: nn.Parameter
    lora_past: Tensor | None

    def __init__(
        self, *args: Any, maps: Callable[[int, int, int, int], SquareMaps], rounds: int | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.maps, self.constant = maps, rounds is None
        self.register_buffer(PAST, None)
        self.make_room(rounds or 0)

    def shape(self, letter: str, size: int) -> tuple[int, int]:
        return size, size

    @property
    def side(self) -> int:
        """R."""
        return self.sizes[0]

    @property
    def cost(self) -> int:
        return self.side

    @property
    def export_rank(self) -> int | None:
        rounds = self._rounds(self.turns, self.side)
        return self.side * len(rounds) if any(maps.chunked for maps in rounds) else None

    @property
    def turns(self) -> int:
        """Finished rounds."""
        return self.state.rounds

    def make_room(self, rounds: int) -> None:
        """Have room for so many finished rounds in all: the buffer keeps its shape from then on, so that whatever
        copies buffers can copy it."""
        missing = rounds - (0 if self.lora_past is None else len(self.lora_past))
        if missing > 0:
            M = local(self.lora_M0.detach())
            dtype = torch.promote_types(M.dtype, torch.float32)  # of parameters that are trained, whatever the base has
            room = M.new_zeros(missing, self.side, self.side, dtype=dtype)
            self.lora_past = room if self.lora_past is None else torch.cat([self.lora_past, room])

    def copy_state_from(self, other: StatefulDelta) -> None:
        super().copy_state_from(other)
        past = getattr(other, PAST)
        self.lora_past = None if past is None else past.clone()
        self.assign(rounds=other.state.rounds)

    @torch.no_grad()
    def restart(self) -> nn.Parameter:
        """Begin a round: M joins the past, and is zero. ΔW stays what it is. Returns M."""
        turns = self.turns
        self.make_room(turns + 1)
        self.lora_past[turns].copy_(full(self.lora_M0.detach()))  # type: ignore[index]
        self.assign(rounds=turns + 1)
        self.lora_M0.zero_()
        return self.lora_M0

    # -- computation ---------------------------------------------------------------------------------------------

    def _terms(self, M: Tensor) -> list[tuple[SquareMaps, Tensor]]:
        """(maps, matrix), rounds with the same maps added up."""
        alike: dict[SquareMaps, list[Tensor]] = {}
        matrices = [*(self.lora_past[: self.turns].to(M.dtype) if self.lora_past is not None else ()), M]
        for maps, matrix in zip(self._rounds(self.turns, self.side), matrices, strict=True):
            alike.setdefault(maps, []).append(matrix)
        return [(maps, reduce(torch.add, of_round)) for maps, of_round in alike.items()]

    def _rounds(self, finished: int, side: int) -> list[SquareMaps]:
        """The maps of so many finished rounds, and of the next one."""
        return [self.maps(turn, self.in_features, self.out_features, side) for turn in range(finished + 1)]

    def _operands(self) -> tuple[Tensor, Tensor]:
        return self.lora_M0, self.lora_M0

    def _add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else B.dtype
        y = computed(y)
        for maps, M in self._terms(B):
            y = maps.add_lengthened(y, nn.functional.linear(maps.shorten(x, dtype), M))
        return y

    def weight(self) -> Tensor:
        """As the forward pass applies it to the identity: with chunks far cheaper than the product of the factors."""
        M = self.lora_M0
        eye = torch.eye(self.in_features, dtype=M.dtype, device=M.device)
        return self._add_product(eye.new_zeros(self.in_features, self.out_features), eye, M, M).t()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Each chunk of R on its own: A = C, B = D M."""
        pairs = [self._pair(maps, M) for maps, M in self._terms(self.lora_M0)]
        return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)

    def _pair(self, maps: SquareMaps, M: Tensor) -> tuple[Tensor, Tensor]:
        A = maps.shorten(torch.eye(self.in_features, dtype=M.dtype, device=M.device), M.dtype)
        columns = M.t()
        if maps.chunked:
            chunks = A.shape[-2]
            columns = torch.block_diag(*[columns] * chunks).unflatten(-1, (chunks, -1))
            A = A.flatten(-2)
        return A.t(), maps.add_lengthened(M.new_zeros(len(columns), self.out_features), columns).t()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        written = super().saved(values)
        if PAST in written:
            written[PAST] = written[PAST][: self.turns].clone()
        return written if self.turns else {name: value for name, value in written.items() if name != PAST}

    def given(self, found: Mapping[str, Tensor]) -> tuple[ModuleState, list[Tensor]]:
        state, statistics = super().given(found)
        if is_old(found[STATE]) and PAST in found:
            state = replace(state, rounds=len(found[PAST]))
        return state, statistics

    def check_entries(self, found: Mapping[str, Tensor]) -> None:
        super().check_entries(found)
        side, turns = len(found["lora_M0"]), self.given(found)[0].rounds
        room = found[PAST].shape[:1] if PAST in found else ()
        if turns > sum(room):
            raise CheckpointError(f"{PAST}: {turns} finished rounds, found {sum(room)}; the adapter file is damaged")
        if PAST in found:
            check_shape(PAST, (*room, side, side), found)
        for maps in self._rounds(turns, side):
            if reason := maps.misfit:
                raise CheckpointError(f"lora_M0: side {side} {reason}; the adapter is damaged or of another model")

    def fit(self, found: Mapping[str, Tensor], *, keep_dormant: bool) -> None:
        super().fit(found, keep_dormant=keep_dormant)
        room = 0 if self.lora_past is None else len(self.lora_past)
        self.lora_past = None
        self.make_room(max(room if keep_dormant else 0, len(found.get(PAST, ()))))

    def laid_out(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        past = found.get(PAST, torch.zeros(0, self.side, self.side))
        self.make_room(len(past))
        if self.lora_past is None:
            return found
        room = past.new_zeros(len(self.lora_past) - len(past), self.side, self.side)
        return found | {PAST: torch.cat([past, room])}
