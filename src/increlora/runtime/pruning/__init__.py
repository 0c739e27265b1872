"""Pruning: what happens to the parameters after the host's step. Deciding is left to `schedules` and `selection`."""

from collections.abc import Mapping

from ...deltas import BlockDelta
from ...methods import EntryPruning, GateShrinking, Method, RankPruning, Restarts
from .base import Change, Pruner
from .entries import EntryPruner
from .gates import GatePruner
from .ranks import RankPruner
from .restarts import Restarter

__all__ = ["Change", "EntryPruner", "GatePruner", "Pruner", "RankPruner", "Restarter", "pruner_of"]


def pruner_of(method: Method, deltas: Mapping[str, BlockDelta]) -> Pruner | None:
    """The runtime side of the method's pruning rule; None without one."""
    match method.prune:
        case None:
            return None
        case RankPruning():
            return RankPruner(method.prune, method.budget, deltas)
        case GateShrinking():
            return GatePruner(method.prune, method.budget, deltas)
        case EntryPruning():
            return EntryPruner(method.prune, deltas)
        case Restarts():
            return Restarter(method.prune, deltas)
