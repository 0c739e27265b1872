"""A delta whose state is a buffer, and how it comes and goes in state dicts.

Everything that is derived from the state is derived anew when the buffer has changed, whoever has written into it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import NAMES, Delta, Status
from .inputs import Inputs
from .state import STATE, STATISTICS, ModuleState, is_old, pack_statistics, unpack, unpack_old, unpack_statistics

UNKNOWN = -2  # version of a buffer that has to be read again
FEW = 8  # statistics of a module that stay where nobody trains; averages of every entry are not


class StatefulDelta(Delta):
    """Abstract delta with ranks in blocks, whose states travel in `lora_state`.

    Args:
        scale: active rank → s.   Further arguments as for `Delta`.
    Attributes:
        lora_state: the `state` of blocks and ranks, as integers.   sizes: ranks of each block, in the order of birth.
        statistics: what each rule has to remember, while training.   idle_slots: those that files leave out.
        constant: is there but one state for it, which its tensors need not bring?
    """

    lora_state: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: Callable[[int], float],
        name: str,
        dropout: float,
        inputs: Inputs,
    ) -> None:
        super().__init__(in_features, out_features, name=name, dropout=dropout, inputs=inputs)
        self.scale_of = scale
        self.sizes: list[int] = []
        self.statistics: list[Tensor] = []
        self.idle_slots: frozenset[int] = frozenset()
        self.constant = False
        self._state = ModuleState(0, (), (), ())
        with torch.inference_mode(False):
            self.register_buffer(STATE, torch.empty(0, dtype=torch.int32, device="cpu"))
        self._given: tuple[Any, ...] = None, (), None  # what was unpacked last: versions, tensors, result
        self._read = self.lora_state, 0  # what `_state` was read from: the buffer and its version

    @property
    def state(self) -> ModuleState:
        """States of blocks and ranks, and how far the run is. It is read again when the buffer has changed.

        Raises CheckpointError if somebody wrote into the buffer what is no state of this module."""
        if torch.compiler.is_compiling():  # graphs read no tensors; they are compiled anew for another state
            return self._state
        buffer: Any = self._buffers[STATE]  # every use of the module asks, and this is quicker than the attribute
        read, version = self._read  # never a tensor of inference mode, which has no version
        if (buffer is read and read._version == version) or not readable(buffer):
            return self._state
        if buffer.is_inference():  # it would not tell that somebody has written into it
            with torch.inference_mode(False):
                buffer = self._buffers[STATE] = buffer.clone()
        self._state, self._read = self._read_again(buffer), (buffer, version_of(buffer))
        return self._state

    def _read_again(self, buffer: Tensor) -> ModuleState:
        """What the buffer says. An average of states says nothing: there who drives the module knows, or for a copy the
        module that it is a copy of."""
        try:
            with self._named_errors():
                self.check_state(state := unpack(buffer), self.sizes)
                return state
        except CheckpointError:
            source = self.observer.source() if self.observer is not None else None
            if not isinstance(source, StatefulDelta):
                raise
            return self._state if source is self else source.state

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:  # `tensor.data` can be written into without a trace
            self._read = self._read[0], UNKNOWN
        return super().train(mode)

    @torch.inference_mode(False)
    @torch.no_grad()
    def assign(self, **changes: Any) -> None:
        """Change the state, by the names of `ModuleState`. The buffer stays the same tensor while its length does."""
        state = self.state
        changed: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in changes.items()}
        state = replace(state, **({"step": self.steps} | changed)).padded(len(self.sizes))
        self._state = replace(state, scale=self.scale_of(max(1, state.rank_of(self.sizes))))
        packed, buffer = self._state.pack(), self.lora_state
        if buffer.shape == packed.shape and readable(buffer):
            buffer.copy_(packed)
        else:
            self.lora_state = packed.to(buffer.device)
        self._read = self.lora_state, version_of(self.lora_state)

    def become(self, block: int, status: Status, step: int | None = None) -> None:
        """Change the state of one block. step: after which it became active, or entered the reserve."""
        state = self.state
        entries = {"status": status}
        if step is not None:
            entries["born" if status is Status.ACTIVE else "reserved"] = step  # type: ignore[assignment]
        self.assign(**{name: with_entry(getattr(state, name), block, value) for name, value in entries.items()})

    def check_state(self, state: ModuleState, sizes: Sequence[int]) -> None:
        """Raise CheckpointError, beginning with the state's name, if blocks of these sizes cannot have it here."""
        if bool(state.kept) != bool(self._state.kept):
            says = "says" if state.kept else "does not say"
            raise CheckpointError(f"{STATE} {says} which ranks count: it belongs to another method")
        if not (rank := state.rank_of(sizes)) >= 0 or len(state.kept) not in (0, sum(sizes)):
            raise CheckpointError(f"{STATE} counts {len(state.kept)} ranks, its tensors have {sum(sizes)}")
        here = self.scale_of(max(1, rank))
        if state.scale is not None and not math.isclose(state.scale, here, rel_tol=1e-4):
            raise CheckpointError(
                f"{STATE} was written with the scale {state.scale:.6g}, here it is {here:.6g}: give the same `r` and "
                f"`lora_alpha`, or start a new adapter from it with `warm_start`"
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}.{error}") from error

    @property
    def steps(self) -> int:
        known = None if self.observer is None else self.observer.step
        return self.state.step if known is None else known

    def copy_state_from(self, other: "StatefulDelta") -> None:
        """Take over what of `other` is no parameter and decides what is computed."""
        state = other.state
        self.assign(status=state.status, kept=state.kept, settled=state.settled, closed=state.closed)

    def reserve_statistics(self, slot: int, size: int, dtype: torch.dtype) -> None:
        """Have `size` numbers for the rule at place `slot`, zeros unless there are so many already."""
        self.statistics += [torch.zeros(0)] * (slot + 1 - len(self.statistics))
        if len(self.statistics[slot]) != size:
            self.statistics[slot] = torch.zeros(size, dtype=dtype)

    # -- state dicts -------------------------------------------------------------------------------------------------

    def given(self, found: Mapping[str, Tensor]) -> tuple[ModuleState, list[Tensor]]:
        """State and statistics among these entries. Raises CheckpointError, beginning with the entry's name."""
        if STATE not in found:
            raise CheckpointError(
                f"{STATE} is missing: save every entry that has `lora_` in its name, buffers too, or use "
                f"get_peft_model_state_dict; a file without it is incomplete or not increlora's"
            )
        tensors = [found[name] for name in (STATE, STATISTICS) if name in found]
        key = [(id(tensor), version_of(tensor)) for tensor in tensors]
        if self._given[0] != key:  # several checks ask, before the values are loaded
            self._given = key, tensors, unpacked(*tensors)
        return self._given[2]

    def note_step(self) -> None:
        """Have the state say how far the run is."""
        if self.steps != self.state.step:
            self.assign()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._read = self._read[0], UNKNOWN
        self.assign()  # what is written is a state
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # for copy.deepcopy, too
        self.note_step()
        return self.__dict__.copy()

    def get_extra_state(self) -> Tensor:
        """What the rules remember; always of the same length, which distributed checkpoints need."""
        return pack_statistics(self.statistics)

    def set_extra_state(self, packed: Tensor) -> None:
        found = unpack_statistics(packed)
        for slot, own in enumerate(self.statistics):  # there are some while somebody trains here
            given = found[slot] if slot < len(found) else own[:0]
            self.statistics[slot] = given.to(own, copy=True) if len(given) else torch.zeros_like(own)
        if not self.statistics and 0 < max(map(len, found), default=0) <= FEW:
            self.statistics = [values.clone() for values in found]  # for who trains on, or saves it again

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        found = entries_at(prefix, state_dict)
        state, statistics = self.arriving(found)
        if state is None:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        packed = state.padded(len(self.sizes)).pack()
        if packed.shape != self.lora_state.shape:
            self.lora_state = torch.zeros_like(packed, device=self.lora_state.device)
        found = self.laid_out(found) | {STATE: packed, STATISTICS: pack_statistics(statistics)}
        super()._load_from_state_dict(keys_at(prefix, found), prefix, *args)
        self._given = None, (), None
        if self.observer is not None:
            self.observer.loaded(state.step)

    def arriving(self, found: dict[str, Tensor]) -> tuple[ModuleState | None, list[Tensor]]:
        """State and statistics among the entries that a state dict has for this module; None: they say nothing of it.

        Raises CheckpointError if tensors come without the state that they belong to, or with one that does not fit."""
        if STATE not in found and is_old(found.get(STATISTICS)):
            found[STATE] = found.pop(STATISTICS)
        if STATE not in found and (not found or self.constant):
            return None, []
        with self._named_errors():
            self.check_entries(found)
            state, statistics = self.given(found)
            if len(state.status) > len(self.sizes):
                raise CheckpointError(
                    f"{STATE} is of {len(state.status)} blocks, here are {len(self.sizes)}: give the same `capacity`"
                )
        return state, statistics

    def check_entries(self, found: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError, beginning with the entry's name, if these lack what their state needs."""
        raise NotImplementedError

    def laid_out(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """These entries of a state dict in the shapes that they have here."""
        return found


def unpacked(packed: Tensor, statistics: Tensor | None = None) -> tuple[ModuleState, list[Tensor]]:
    """State and statistics, of whatever version."""
    if is_old(packed):
        return unpack_old(packed)
    return unpack(packed), [] if statistics is None else unpack_statistics(statistics)


def entries_at(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a state dict has for the module with this prefix, by the names on disk."""
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    return {NAMES.get(name, name): value for name, value in own.items()}


def keys_at(prefix: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `entries_at`."""
    names = {entry: name for name, entry in NAMES.items()}
    return {prefix + names.get(entry, entry): value for entry, value in entries.items()}


def with_entry(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def version_of(buffer: Tensor) -> int:
    """Changes whenever somebody writes into it; tensors of inference mode do not tell."""
    return -1 if buffer.is_inference() else buffer._version


def readable(buffer: Tensor) -> bool:
    """Has it values? Shapes alone, fake tensors and those of `torch.func` have none."""
    return type(buffer) is Tensor and not buffer.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(buffer)
