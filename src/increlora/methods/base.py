"""A method as data: which delta, and which rules say what happens to it during a run."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import nn

from ..decide.allocation import Holding
from ..decide.budget import Budget
from ..decide.penalties import PenaltyForm
from ..decide.schedules import Run
from ..deltas import BlockDelta, Delta, Inputs, Patches, Stored, Tokens, Vectors
from ..deltas.inputs import VECTORS
from ..errors import BudgetError, ConfigError
from ..rules import Rule

Value = TypeVar("Value", int, float)
Made = TypeVar("Made", bound=BlockDelta)
LOW_RANK_READS: tuple[type[Inputs], ...] = (Vectors, Tokens, Patches)  # whatever a low-rank product can meet


@dataclass(frozen=True)
class Site:
    """One linear map, embedding or convolution that gets a delta: its full name, its shape as a matrix, and the totals
    over all sites of the model, which the host fills in.

    peers: (name, in, out) of every site in model order, for methods that look at a module's place among them.
    shared: what `Settings.make_shared` made, where the method has such.   inputs: what the module reads."""

    name: str
    in_features: int
    out_features: int
    sites: int = 0  # adapted modules in the model
    uniform_parameters: int = 0  # Σ over sites of (in + out): parameters of rank 1 everywhere
    dtype: torch.dtype | None = None  # of the adapter's parameters; default: torch's
    peers: tuple[tuple[str, int, int], ...] = ()
    shared: Stored | None = None
    inputs: Inputs = VECTORS


class Clock(Protocol):
    """Learning rate of a tensor created at `created` (−1: with the model), as (own, host).

    host None: own is a share of the host's current rate. Otherwise both are in units of its peak rate: own is what the
    tensor gets, host what the schedule the clock was made for would give the model's own tensors."""

    def __call__(self, step: int, created: int, run: Run) -> tuple[float, float | None]: ...


@dataclass(frozen=True)
class Penalty:
    """Orthogonality of the components, or size of the gates (`l1`); `when` says whether gradient clipping sees it."""

    weight: float
    form: PenaltyForm = "trainer"
    when: Literal["after_clipping", "before_clipping"] = "after_clipping"


@dataclass(frozen=True)
class Method:
    """Everything the runtime needs to know about a method. None: the method has no such part.

    Attributes:
        make_delta: site → delta.   budget: what may be active at the end.
        rules: what happens to ranks and parameters during a run, in this order.
        penalty: regulariser.   clock: learning rate of newborn tensors.
        total_steps: optimizer steps of the run, as the settings say.
    """

    name: str
    make_delta: Callable[[Site], Delta]
    budget: Budget
    rules: tuple[Rule, ...] = ()
    penalty: Penalty | None = None
    clock: Clock | None = None
    total_steps: int | None = None

    @property
    def adaptive(self) -> bool:
        """Does this method need the runtime to drive it?"""
        return bool(self.rules) or self.penalty is not None

    def check(self, holdings: Sequence[Holding]) -> None:
        """Raise BudgetError if the budget cannot be met from a fresh start with these holdings."""
        for rule in self.rules:
            if not (hasattr(rule, "check") and hasattr(rule, "bind")):
                raise ConfigError(f"{self.name}: {rule!r} is no rule: it needs `check` and `bind`, see `rules.Rule`")
            rule.check(holdings, self.budget)


class Settings:
    """Base of every method's settings: how they become a method, and what a host asks before it adapts a model.

    reads: the kinds of input that the method's deltas can meet.
    """

    reads: ClassVar[tuple[type[Inputs], ...]] = LOW_RANK_READS

    def method(self, sites: int, uniform_parameters: int) -> Method:
        """The method for a model with `sites` adapted modules and Σ (in + out) = `uniform_parameters`."""
        raise NotImplementedError

    # -- what only methods with another form of ΔW have to say: see `structural` ---------------------------------------

    def adapts(self, name: str) -> bool:
        """Can the method adapt a linear module of this name? "all-linear" means those that it can."""
        return True

    def completed(self, model: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
        """Options that the model itself answers, of those that were left out."""
        return {}

    def make_shared(self, sites: Sequence[Site]) -> Stored | None:
        """The parameters that all deltas of an adapter share; the model owns them."""
        return None


def budget_of(settings: Any, sites: int, uniform_parameters: int) -> Budget:
    """The budget that `r`, `total_ranks` and `total_parameters` ask for; the most specific one is used.

    `r` (average rank per module) replaces LoRA of rank r: r · sites ranks in total, and at most LoRA's parameters,
    `r · uniform_parameters` with uniform_parameters = Σ_sites (in + out).
    """
    ranks, parameters = settings.total_ranks, getattr(settings, "total_parameters", None)
    if ranks is not None and parameters is not None:
        raise BudgetError(f"total_ranks={ranks} and total_parameters={parameters}: give one of the two")
    if ranks is None and parameters is None:
        return Budget(settings.r * sites, settings.r * uniform_parameters)
    return Budget(ranks, parameters)


def in_blocks(make: Callable[..., Made], settings: Any, site: Site, sizes: Sequence[int], **parts: Any) -> Made:
    """A delta with blocks of these sizes, the first of them active; `parts` are `init`, `scale` and what this kind of
    delta adds."""
    return make(
        site.in_features, site.out_features, sizes,
        name=site.name, seed=settings.seed, dropout=settings.lora_dropout, dtype=site.dtype, inputs=site.inputs,
        active=1, **parts,
    )  # fmt: skip


def matching(patterns: Mapping[str, Value], name: str) -> Value | None:
    """Value of the first pattern that matches a full module name or its ending, as peft's `rank_pattern` does."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)
