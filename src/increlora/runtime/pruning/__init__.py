"""Pruning: what happens to the parameters after the host's step. Deciding is left to `schedules` and `selection`."""

from collections.abc import Mapping

from ...deltas import BlockDelta
from ...methods import EntryPruning, Method
from .base import Change, Pruner
from .entries import EntryPruner
from .ranks import RankPruner

__all__ = ["Change", "EntryPruner", "Pruner", "RankPruner", "pruner_of"]


def pruner_of(method: Method, deltas: Mapping[str, BlockDelta]) -> Pruner | None:
    """The runtime side of the method's pruning rule; None without one."""
    if isinstance(method.prune, EntryPruning):
        return EntryPruner(method.prune, deltas)
    return None if method.prune is None else RankPruner(method.prune, method.budget, deltas)
