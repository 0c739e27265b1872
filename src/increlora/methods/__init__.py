"""Methods by name. Adding one is a line here and a file beside it."""

from .adalora import AdaLora
from .base import Method, Site
from .increlora import IncreLora
from .lora import Lora
from .lorta import Lorta
from .melora import Melora
from .prilora import Prilora
from .rules import EntryPruning, GateShrinking, PenaltyRule, RankPruning, ScoreRule
from .sora import Sora

METHODS = {
    "adalora": AdaLora, "increlora": IncreLora, "lora": Lora, "lorta": Lorta, "melora": Melora, "prilora": Prilora,
    "sora": Sora,
}  # fmt: skip

__all__ = [
    "METHODS", "AdaLora", "EntryPruning", "GateShrinking", "IncreLora", "Lora", "Lorta", "Melora", "Method",
    "PenaltyRule", "Prilora", "RankPruning", "ScoreRule", "Site", "Sora",
]  # fmt: skip
