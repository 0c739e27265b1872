"""Our methods as ordinary peft tuners; the only place that imports peft."""

from .config import CONFIGS
from .drive import attach, block_states, rank_summary
from .mixtures import refuse_mixtures
from .model import AdapterModel
from .register import read_old_types, register_methods, tell_ranks

register_methods()
read_old_types()
tell_ranks()
refuse_mixtures()

__all__ = ["CONFIGS", "AdapterModel", "attach", "block_states", "rank_summary"]
