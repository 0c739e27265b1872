"""Our methods as ordinary peft tuners; the only place that imports peft."""

from .config import AdaLoraConfig, IncreLoraConfig, MeloraConfig, PlainLoraConfig, PriloraConfig, SoraConfig
from .drive import attach, rank_summary
from .model import AdapterModel
from .register import register_methods, tell_ranks

register_methods()
tell_ranks()

__all__ = [
    "AdaLoraConfig", "AdapterModel", "IncreLoraConfig", "MeloraConfig", "PlainLoraConfig", "PriloraConfig",
    "SoraConfig", "attach", "rank_summary",
]  # fmt: skip
