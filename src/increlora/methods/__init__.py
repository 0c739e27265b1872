"""Methods by name. Adding one is a line here and a file beside it."""

from .adalora import AdaLora
from .base import Method, PenaltyRule, RankPruning, ScoreRule, Site
from .increlora import IncreLora
from .lora import Lora

METHODS = {"adalora": AdaLora, "increlora": IncreLora, "lora": Lora}

__all__ = ["METHODS", "AdaLora", "IncreLora", "Lora", "Method", "PenaltyRule", "RankPruning", "ScoreRule", "Site"]
