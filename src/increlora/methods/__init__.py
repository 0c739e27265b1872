"""Methods by name. Adding one is a line here and a file beside it."""

from .adalora import AdaLora
from .base import EntryPruning, Method, PenaltyRule, RankPruning, ScoreRule, Site
from .increlora import IncreLora
from .lora import Lora
from .prilora import Prilora

METHODS = {"adalora": AdaLora, "increlora": IncreLora, "lora": Lora, "prilora": Prilora}

__all__ = [
    "METHODS", "AdaLora", "EntryPruning", "IncreLora", "Lora", "Method", "PenaltyRule", "Prilora", "RankPruning",
    "ScoreRule", "Site",
]  # fmt: skip
