"""Methods by name. Adding one is a line here and a file beside it."""

from .adalora import AdaLora
from .base import GateShrinking, Method, PenaltyRule, RankPruning, ScoreRule, Site
from .increlora import IncreLora
from .lora import Lora
from .melora import Melora
from .sora import Sora

METHODS = {"adalora": AdaLora, "increlora": IncreLora, "lora": Lora, "melora": Melora, "sora": Sora}

__all__ = [
    "METHODS", "AdaLora", "GateShrinking", "IncreLora", "Lora", "Melora", "Method", "PenaltyRule", "RankPruning",
    "ScoreRule", "Site", "Sora",
]  # fmt: skip
