"""What DDP sends in a step, per adapted module: its buckets are counted by a communication hook.

    .venv/bin/python benchmarks/ddp_traffic.py

MiniLM's shape with 36 adapted modules, float32, a group of one process: buckets are the same in larger ones."""

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel

from increlora import IncreLoraConfig

TARGETS = r".*encoder.*(query|key|value|dense)"
SHAPE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
ROWS = {
    "peft LoRA, r = 8": LoraConfig(r=8, target_modules=TARGETS),
    "IncreLoRA, r = 8, capacity 8": IncreLoraConfig(r=8, capacity=8, init_r=8, target_modules=TARGETS, total_steps=100),
    "IncreLoRA, r = 8, capacity 32 (default)": IncreLoraConfig(r=8, target_modules=TARGETS, total_steps=100),
    "IncreLoRA, r = 8, capacity 64": IncreLoraConfig(r=8, capacity=64, target_modules=TARGETS, total_steps=100),
}


def sent(config: Any) -> int:
    """Bytes of all buckets of one backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(BertModel(BertConfig(**SHAPE), add_pooling_layer=False), config)
    found = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found.append(bucket.buffer().nbytes)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, hook)
    wrapped(input_ids=torch.zeros(1, 4, dtype=torch.long)).last_hidden_state.sum().backward()
    return sum(found)


def main() -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29531"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    found = {name: sent(config) for name, config in ROWS.items()}
    print("| DDP sends in a step | MiB | ÷ LoRA |")
    print("| --- | --- | --- |")
    for name, size in found.items():
        print(f"| {name} | {size / 2**20:.1f} | {size / next(iter(found.values())):.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
