"""The interface of every delta, and of whatever else of an adapter goes into a checkpoint."""

from collections.abc import Container, Iterable, Mapping
from enum import IntEnum
from typing import Protocol

from torch import Tensor, nn

from ..errors import CheckpointError
from ..ops.fused_linear import Pending
from .inputs import VECTORS, Inputs, Vectors


class Status(IntEnum):
    """What a block is for at this moment; the values are written to checkpoints."""

    DORMANT = 0
    RESERVE = 1
    ACTIVE = 2
    RETIRED = 3


class Observer(Protocol):
    """What the runtime installs on a delta while a run is driven.

    wants_gradients: called at every use in training; should the gradient of the output be tapped?   rests: called
    instead where all that is computed is frozen.
    tap_input: identity on A that sees the input x, before dropout.   tap_output: identity on the layer's output y that
    sees x and ∂L/∂y.   step: optimizer steps so far, None if it cannot know.   loaded: a checkpoint of step `step` was
    loaded.   copied: does it watch a copy, whose state somebody may write into between any two uses?
    source: the module whose state counts where somebody has averaged states, which is none; None: there is none left.
    """

    copied: bool

    def wants_gradients(self) -> bool: ...
    def rests(self) -> None: ...
    def tap_input(self, A: Tensor, x: Tensor) -> Tensor: ...
    def tap_output(self, y: Tensor, x: Tensor) -> Tensor: ...
    @property
    def step(self) -> int | None: ...
    def loaded(self, step: int) -> None: ...
    def source(self) -> "Delta | None": ...


class Stored(nn.Module):
    """What a checkpoint holds of a module. An entry has the name it has in the module's state dict (`lora_…`); the
    extra state is called `lora_statistics`. By default that is all of it, in the shapes it has here."""

    def entries(self) -> dict[str, tuple[int, ...]]:
        """Shape of every entry; empty: a checkpoint holds nothing of this module."""
        return {NAMES.get(name, name): tuple(value.shape) for name, value in self.state_dict().items()}

    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the entries with these values those that are worth writing."""
        return dict(values)

    def check(self, found: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError, beginning with the entry's name, unless these entries can be loaded here."""
        for name, shape in self.entries().items():
            check_shape(name, shape, found)
        check_known(found, self.entries())

    def fit(self, found: Mapping[str, Tensor], *, keep_dormant: bool) -> None:
        """Take the shapes of these entries, which are loaded next; what they leave out is dropped unless
        `keep_dormant` (training goes on)."""

    def left_out(self, given: Container[str]) -> dict[str, Tensor]:
        """Values of the entries that a checkpoint with the `given` ones leaves out."""
        return {}


NAMES = {"_extra_state": "lora_statistics"}  # in a state dict → on disk


def check_shape(name: str, shape: tuple[int, ...], found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `found` has an entry of this name and shape."""
    there = tuple(found[name].shape) if name in found else None
    if there != shape:
        raise CheckpointError(
            f"{name}: expected {shape}, found {'nothing' if there is None else there}; the adapter is damaged or of "
            f"another model"
        )


def check_known(found: Iterable[str], known: Container[str]) -> None:
    """Raise CheckpointError for an entry that is none of the known ones."""
    if strange := sorted(name for name in found if name not in known):
        raise CheckpointError(f"{strange[0]} is not expected there; the adapter is damaged or of another model")


class Delta(Stored):
    """Abstract trainable map for ΔW of shape (out_features, in_features).

    Attributes:
        name: full name of the module it belongs to.   inputs: what the module reads: vectors, tokens, patches.
        observer: set by the runtime while a run is driven, else None.
        reserve_learns: blocks in reserve are part of the forward pass; otherwise they only wait.
        steps: optimizer steps of the run so far.
    """

    def __init__(
        self, in_features: int, out_features: int, *, name: str = "", dropout: float = 0.0, inputs: Inputs = VECTORS
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.in_features, self.out_features, self.name = in_features, out_features, name
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.observer: Observer | None = None
        self.reserve_learns = True

    @property
    def rank(self) -> int:
        """Active rank: what counts against a budget."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        return 0

    @property
    def reserve(self) -> int:
        """Ranks that learn already but do not count yet."""
        return 0

    @property
    def capacity(self) -> int:
        """The most ranks this module can have."""
        return self.rank

    @property
    def cost(self) -> int:
        """Parameters of one rank, those that merging absorbs left out; shared ones count elsewhere."""
        return self.in_features + self.out_features

    @property
    def export_rank(self) -> int | None:
        """Rank to which an export as plain LoRA truncates ΔW, where its rank is too high to be written as it is; None:
        the factors are written."""
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = B @ A exactly, every scale folded in; A (R, in), B (out, R)."""
        raise NotImplementedError

    def add_to(self, y: Tensor | Pending, x: Tensor) -> Tensor:
        """y + ΔW x, with y (…, out), computed or not, and x (…, in) or as `inputs` says."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """ΔW x for vectors x (…, in); by hand and in tests: layers call `add_to`, whose y says the shape."""
        assert isinstance(self.inputs, Vectors)
        return self.add_to(x.new_zeros(*x.shape[:-1], self.out_features), x)

    def weight(self) -> Tensor:
        """The dense ΔW (out, in) as the forward pass applies it, reserve included."""
        A, B = self.factors()
        return B @ A
