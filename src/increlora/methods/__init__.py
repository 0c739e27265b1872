"""Adaptive methods: records that name a delta and what happens to it during a run."""

from .adalora import AdaLora
from .adalora_paper import AdaLoraPaper
from .base import Method, Penalty, Settings, Site
from .increlora import IncreLora
from .increlora_paper import IncreLoraPaper
from .lora import PlainLora
from .prilora import PriLora
from .sora import Sora
from .sora_paper import SoraPaper

__all__ = [
    "AdaLora", "AdaLoraPaper", "IncreLora", "IncreLoraPaper", "Method", "Penalty", "PlainLora", "PriLora", "Settings",
    "Site", "Sora", "SoraPaper",
]  # fmt: skip
