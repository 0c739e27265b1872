"""Tiny models with adapters that grow within a few steps."""

import torch
from peft import PeftModel
from torch import Tensor, nn

from increlora import IncreLoraConfig, attach, rank_summary
from tests.hosts.bases import BUILDERS, Mlp, build_llama, inputs_for, logits, seeded
from tests.switches import departing

__all__ = [
    "BUILDERS", "Mlp", "adapter_only", "build_llama", "grow", "growing", "inputs_for", "logits", "mid_growth", "seeded",
]  # fmt: skip


def adapter_only(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def grow(model: nn.Module, kind: str, *, steps: int = 5, total_steps: int = 40, lr: float = 0.05) -> nn.Module:
    """A few optimizer steps of a run of `total_steps`, towards random outputs: enough for ranks to be granted."""
    optimizer = torch.optim.AdamW(adapter_only(model), lr=lr)
    attach(model, optimizer, total_steps=total_steps)
    for step in range(steps):
        output = model(**inputs_for(kind))
        output = output if isinstance(output, Tensor) else output.logits
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(output.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def growing(**options: object) -> IncreLoraConfig:
    """A config whose ranks grow at every second step from step 2 on, with a reserve that learns in advance."""
    chosen = {
        "r": 3,
        "warmup_steps": 1,
        "interval_steps": 2,
        "top_h": 2,
        "lora_alpha": 6,
        "seed": 1,
        "reserve": "trained",
        "newborn": "published",
        "orthogonality": 0.1,
    } | options
    return departing(IncreLoraConfig, **chosen)


def mid_growth(model: PeftModel) -> bool:
    """Has the model grown, is there still a reserve, and is its budget unspent?"""
    ranks = rank_summary(model)
    spent = ranks.budget_ranks is not None and ranks.active >= ranks.budget_ranks
    return ranks.active > len(ranks.modules) and ranks.reserve > 0 and not spent
