"""Methods by name. Adding one is a line here and a file beside it."""

from .adalora import AdaLora
from .base import Method, Site
from .increlora import IncreLora
from .lora import Lora
from .lora_mini import LoraMini
from .lorta import Lorta
from .melora import Melora
from .mora import Mora
from .prilora import Prilora
from .rules import EntryPruning, GateShrinking, PenaltyRule, RankPruning, Restarts, ScoreRule
from .sora import Sora

METHODS = {
    "adalora": AdaLora, "increlora": IncreLora, "lora": Lora, "lora_mini": LoraMini, "lorta": Lorta, "melora": Melora,
    "mora": Mora, "prilora": Prilora, "sora": Sora,
}  # fmt: skip

__all__ = [
    "METHODS", "AdaLora", "EntryPruning", "GateShrinking", "IncreLora", "Lora", "LoraMini", "Lorta", "Melora", "Method",
    "Mora", "PenaltyRule", "Prilora", "RankPruning", "Restarts", "ScoreRule", "Site", "Sora",
]  # fmt: skip
