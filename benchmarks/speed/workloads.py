"""What is trained: models of usual shapes with random weights, and one batch for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and what is adapted in it.

    Attributes:
        build: the model, in evaluation mode.   targets: regular expression over module names.   task: as peft names it.
        stack: the list of layers that holds all that is adapted.   modules: how many these are.
    """

    build: Callable[[], nn.Module]
    targets: str
    task: str | None
    stack: str
    modules: int

    def fresh(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        return self.build().to(device)

    def batch(self, size: int, length: int, device: str) -> Batch:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 1000, (size, length), generator=generator)
        labels = ids if self.task == "CAUSAL_LM" else torch.randint(0, 2, (size,), generator=generator)
        return {"input_ids": ids.to(device), "labels": labels.to(device)}


def bert(layers: int, width: int, heads: int) -> Workload:
    config = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    return Workload(
        build=lambda: BertForSequenceClassification(BertConfig(**config, num_attention_heads=heads)),
        targets=r".*encoder.*(query|key|value|dense)", task="SEQ_CLS", stack="bert.encoder.layer", modules=6 * layers,
    )  # fmt: skip


def llama(layers: int, width: int, heads: int, key_heads: int, inner: int, **options: Any) -> Workload:
    config = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "vocab_size": 8192}
    config |= {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    dtype = options.get("dtype", torch.float32)
    return Workload(
        build=lambda: LlamaForCausalLM(LlamaConfig(**config)).to(dtype), targets=r".*layers.*_proj", task="CAUSAL_LM",
        stack="model.layers", modules=7 * layers,
    )  # fmt: skip


class Chain(nn.Module):
    """Many tiny linear maps in a row: what a step costs here is paid per module, not per token."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(modules))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = input_ids[:, :1].float().expand(-1, 16)
        for layer in self.layers:
            x = layer(x)
        return type("Output", (), {"loss": x.square().mean()})


def chain(modules: int) -> Workload:
    return Workload(lambda: Chain(modules), r"layers\.\d+", None, "layers", modules)


WORKLOADS: dict[str, Workload] = {
    "minilm": bert(6, 384, 12),
    "bert": bert(12, 768, 12),
    "llama": llama(4, 1024, 16, 4, 2816),
    "chain-36": chain(36),
    "chain-250": chain(250),
    "chain-1000": chain(1000),
    "7b-layers": llama(4, 4096, 32, 8, 11008, dtype=torch.bfloat16),  # for accelerators
}
