"""Methods by name. Adding one is a line here and a file beside it."""

from .base import Method, PenaltyRule, ScoreRule, Site
from .increlora import IncreLora
from .lora import Lora

METHODS = {"increlora": IncreLora, "lora": Lora}

__all__ = ["METHODS", "IncreLora", "Lora", "Method", "PenaltyRule", "ScoreRule", "Site"]
