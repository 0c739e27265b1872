"""increlora: which rank, for which layer? Low-rank adapters that decide while the model is fine-tuned.

from peft import get_peft_model
from increlora import IncreLoraConfig

model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear"))   # r: average rank per module
Trainer(model=model, args=args, train_dataset=data).train()                       # ranks grow by themselves
"""

from .errors import IncreloraError
from .hosts.export import export_lora
from .hosts.peft import IncreLoraConfig, PlainLoraConfig, attach, rank_summary
from .runtime import regularization_loss

__version__ = "0.1.0"
__all__ = [
    "IncreLoraConfig",
    "IncreloraError",
    "PlainLoraConfig",
    "attach",
    "export_lora",
    "rank_summary",
    "regularization_loss",
]
