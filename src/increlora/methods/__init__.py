"""Adaptive methods: records that name a delta and what happens to it during a run."""

from .adalora import AdaLora
from .base import Method, Penalty, Settings, Site
from .increlora import IncreLora
from .lora import PlainLora
from .prilora import PriLora
from .sora import Sora

__all__ = ["AdaLora", "IncreLora", "Method", "Penalty", "PlainLora", "PriLora", "Settings", "Site", "Sora"]
