"""increlora: which rank, for which layer? Low-rank adapters that decide while the model is fine-tuned.

from peft import get_peft_model
from increlora import IncreLoraConfig

model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear"))   # r: average rank per module
Trainer(model=model, args=args, train_dataset=data).train()                       # ranks grow by themselves
"""

from .errors import IncreloraError
from .hosts.allocation import allocation_to_lora_config
from .hosts.engines import check_export
from .hosts.export import export_lora
from .hosts.merge import export_merged
from .hosts.peft import (
    AdaLoraConfig,
    IncreLoraConfig,
    MeloraConfig,
    PlainLoraConfig,
    PriloraConfig,
    SoraConfig,
    attach,
    rank_summary,
)  # fmt: skip
from .hosts.warm_start import warm_start
from .runtime import regularization_loss

__version__ = "0.1.0"
__all__ = [
    "AdaLoraConfig",
    "IncreLoraConfig",
    "IncreloraError",
    "MeloraConfig",
    "PlainLoraConfig",
    "PriloraConfig",
    "SoraConfig",
    "allocation_to_lora_config",
    "attach",
    "check_export",
    "export_lora",
    "export_merged",
    "rank_summary",
    "regularization_loss",
    "warm_start",
]
