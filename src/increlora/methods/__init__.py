"""Adaptive methods: records that name a delta and what happens to it during a run."""

from .adalora import AdaLora
from .base import Method, Site
from .increlora import IncreLora
from .lora import Lora
from .prilora import Prilora
from .rules import EntryPruning, GateShrinking, PenaltyRule, RankPruning, Restarts, ScoreRule
from .sora import Sora

__all__ = [
    "AdaLora", "EntryPruning", "GateShrinking", "IncreLora", "Lora", "Method", "PenaltyRule", "Prilora", "RankPruning",
    "Restarts", "ScoreRule", "Site", "Sora",
]  # fmt: skip
