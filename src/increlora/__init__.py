"""increlora: which rank, for which layer? Low-rank adapters that decide while the model is fine-tuned.

from peft import get_peft_model
from increlora import IncreLoraConfig

model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear"))   # r: average rank per module
Trainer(model=model, args=args, train_dataset=data).train()                       # ranks grow by themselves
"""

from typing import Any

from .errors import IncreLoraError
from .export.allocation import allocation_to_lora_config
from .export.engines import check_export
from .export.lora import export_lora
from .export.merged import export_merged
from .export.warm_start import warm_start
from .hosts.peft import CONFIGS, attach, block_states, rank_summary
from .runtime import regularization_loss

__version__ = "0.1.0"
__all__ = [
    "IncreLoraError", "allocation_to_lora_config", "attach", "block_states", "check_export", "export_lora",
    "export_merged", "rank_summary", "regularization_loss", "warm_start",
]  # fmt: skip
__all__ += [config_cls.__name__ for config_cls in CONFIGS.values()]


def __getattr__(name: str) -> Any:
    """The config classes, one for every method in `registry.METHODS`."""
    for config_cls in CONFIGS.values():
        if config_cls.__name__ == name:
            return config_cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
