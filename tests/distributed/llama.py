"""A Llama of two layers with random weights, and tokens to train it on."""

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from increlora import IncreLoraConfig

STEPS, MODULES, BUDGET = 12, 6, 12
SETTINGS: dict[str, Any] = {
    "r": 2, "capacity": 4, "top_h": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM",
    "warmup_steps": 2, "interval_steps": 2, "birth_warmup": 3, "total_ranks": BUDGET,
}  # fmt: skip


def llama() -> nn.Module:
    """The frozen base model, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def adapted_llama(**settings: Any) -> nn.Module:
    return get_peft_model(llama(), IncreLoraConfig(**SETTINGS | settings))


def tokens(rows: int, seed: int = 0) -> Tensor:
    """(rows, 12) token ids."""
    return torch.randint(64, (rows, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Output in evaluation mode on two rows nobody trains on."""
    return model.eval()(input_ids=tokens(2, seed=99)).logits.float()
