"""The one owner of an adapter: its config, the method made of it once, its deltas, and its controller."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...decide.budget import Budget
from ...deltas import BlockDelta, Delta, Status, Stored, Vectors
from ...deltas.inputs import as_json
from ...methods import Site
from ...runtime import Controller, register
from .bases import check_readable

SHARED = "shared_factors"  # attribute of the model with what all modules of an adapter share
FOR_INFERENCE = (
    "this adapter was loaded or made for inference, and nothing would decide about its ranks in training: load it with "
    "is_trainable=True (a config: leave out `inference_mode`), or freeze it by requires_grad_(False)"
)


class Handle:
    """One adapter of one model, or of a folder.

    Attributes:
        config: the peft config.   method: made of it, once.   deltas: by module name, in model order.
        start: ranks that a run begins with.   shared: parameters that all modules share, or None.
        controller: drives the adapter while it can be trained; not copied with a model.   users: see `threads`.
    Args:
        sites: the modules to adapt; their totals are filled in here.
    Raises: ConfigError, BudgetError if the method cannot be had at these sites.
    """

    def __init__(self, config: Any, sites: Iterable[Site]) -> None:
        self.config = config
        self.controller: Controller | None = None
        self.users: dict[int, int] = {}
        sites = list(sites)
        self.peers = tuple((site.name, site.in_features, site.out_features) for site in sites)
        self.totals = max(1, len(sites)), max(1, sum(m + n for _, m, n in self.peers))
        settings = config.settings()
        self.method = settings.method(*self.totals)
        self.shared: Stored | None = None
        self.shared = settings.make_shared([self.completed(site) for site in sites])
        self.deltas: dict[str, Delta] = {site.name: self.make_delta(site) for site in sites}
        self.start = sum(delta.rank for delta in self.deltas.values())

    def completed(self, site: Site) -> Site:
        """The site with the totals. Raises ConfigError if the method's deltas cannot read the module's input."""
        check_readable(self.config, site.name, site.inputs)
        number, parameters = self.totals
        return replace(site, sites=number, uniform_parameters=parameters, peers=self.peers, shared=self.shared)

    def make_delta(self, site: Site) -> Delta:
        return self.method.make_delta(self.completed(site))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"controller": None, "users": {}}

    @property
    def first(self) -> Delta | None:
        """The delta of the first module."""
        return next(iter(self.deltas.values()), None)

    @property
    def blocks(self) -> dict[str, BlockDelta]:
        """The deltas that have blocks: of an adaptive method all."""
        return {name: delta for name, delta in self.deltas.items() if isinstance(delta, BlockDelta)}

    @property
    def stored(self) -> dict[str, Stored]:
        """All that a checkpoint holds of the adapter, by module name."""
        return {**self.deltas, **({SHARED: self.shared} if self.shared is not None else {})}

    @property
    def shared_parameters(self) -> int:
        """How many numbers the modules share."""
        return sum(p.numel() for p in self.shared.parameters()) if self.shared is not None else 0

    @property
    def parameters(self) -> int:
        """How many numbers count against a budget: those of the active ranks, and the shared ones."""
        return self.shared_parameters + sum(delta.rank * delta.cost for delta in self.deltas.values())

    def drive(self) -> None:
        """Give the adapter its controller, if its method needs one; for inference one that lets nobody train it."""
        if self.config.inference_mode:
            if self.method.adaptive and self.deltas:
                idle = replace(self.method, rules=(), penalty=None, clock=None)
                self.controller = register(Controller(idle, self.blocks, refusal=FOR_INFERENCE))
            return
        from .. import transformers as trainer_host  # not before there is an adapter: it imports what Trainers need

        trainer_host.install()
        if self.method.adaptive and self.deltas:
            self.controller = register(Controller(self.method, self.blocks, on_change=self.describe))
        self.describe()

    @property
    def steps(self) -> int:
        """Optimizer steps of the run so far."""
        return max((delta.steps for delta in self.deltas.values()), default=0)

    def describe(self) -> None:
        """Have the config say what the deltas are now: their states are the truth, the config repeats them."""
        config, deltas, budget = self.config, self.deltas, self.method.budget
        config.shapes = {name: [delta.in_features, delta.out_features] for name, delta in deltas.items()}
        config.inputs = {n: as_json(d.inputs) for n, d in deltas.items() if not isinstance(d.inputs, Vectors)}
        config.ranks = {name: delta.rank for name, delta in deltas.items()}
        config.blocks = {name: [int(s) for s in delta.state.status] for name, delta in self.blocks.items()}
        config.parameters = self.parameters
        config.budget = {"ranks": budget.ranks, "parameters": budget.parameters}


def described_states(config: Any, name: str, delta: BlockDelta) -> list[Status] | None:
    """The block states in a copy of a live config; None if a change of its options (`dataclasses.replace`) made other
    blocks."""
    found = config.blocks.get(name, ())
    if len(found) != len(delta.sizes) or not {*found} <= {*Status}:
        return None
    states = [Status(s) for s in found]
    rank = sum(size for size, state in zip(delta.sizes, states, strict=True) if state is Status.ACTIVE)
    return states if rank == config.ranks.get(name) else None


def warn_of_budget(ranks: Mapping[str, int], budget: Budget, steps: int) -> None:
    """Warn of an adapter that is saved or exported after so many steps with other ranks than its budget: its run ended
    before its schedule. While a Trainer writes its checkpoints nothing is said."""
    total = sum(ranks.values())
    if not (steps and budget.exact) or budget.ranks in (None, total):
        return
    from ..transformers import trainer_runs

    if not trainer_runs():
        warnings.warn(
            f"this adapter has {total} ranks and a budget of {budget.ranks}: after {steps} steps its schedule is not "
            f"over; train on from here, take a checkpoint of a later step, or train anew and state the length that the "
            f"run really has",
            stacklevel=2,
        )
