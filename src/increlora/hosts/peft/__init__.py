"""Our methods as ordinary peft tuners; the only place that imports peft."""

from .config import CONFIGS
from .drive import attach, block_states, rank_summary
from .model import AdapterModel
from .register import patch_peft, register_methods

register_methods()
patch_peft()

__all__ = ["CONFIGS", "AdapterModel", "attach", "block_states", "rank_summary"]
