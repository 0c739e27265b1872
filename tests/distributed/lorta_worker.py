"""One of two processes: LoRTA under DDP and FSDP2, plain, accumulated, with both kinds of activation checkpointing."""

import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from increlora import LortaConfig
from increlora.errors import DriveError
from increlora.ops.parallel import full
from increlora.structural.lorta.delta import TensorBank
from tests.distributed.launch import report
from tests.distributed.llama import llama, tokens

STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "find unused": {"find_unused_parameters": True}, "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True}, "no_sync": {}, "checkpointed": {}, "query only": {},
    "small buckets": {"bucket_cap_mb": 0.0001},
}  # fmt: skip
ACCUMULATION = {"no_sync": 2}
CHECKPOINTING = {"checkpointed": False, "sharded, checkpointed": False}  # use_reentrant
SHARDED = ("sharded", "sharded, checkpointed")
TARGETS = {"query only": ["q_proj"]}


def model_of(name: str) -> nn.Module:
    """The same in every process."""
    targets = TARGETS.get(name, "all-linear")
    config = LortaConfig(r=3, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(llama().double(), config).train()
    if name in CHECKPOINTING or name == "reentrant":
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING.get(name, True)})
    return model


def factors(model: nn.Module) -> dict[str, Tensor]:
    (bank,) = (m for m in model.modules() if isinstance(m, TensorBank))
    return {name: full(p.detach()).clone() for name, p in bank.named_parameters()}


def train(model: nn.Module, wrapped: nn.Module, process: int | None, accumulation: int = 1) -> dict[str, Tensor]:
    """The factors after a run on this process's half of each batch; None: on all of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = slice(None) if process is None else slice(process, None, 2)
    for step in range(STEPS):
        for micro in range(accumulation):
            ids = tokens(4, seed=step * accumulation + micro)[rows]
            last = micro + 1 == accumulation
            if hasattr(wrapped, "require_backward_grad_sync"):
                wrapped.require_backward_grad_sync = last
            (wrapped(input_ids=ids, labels=ids).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return factors(model)


def run(name: str, process: int) -> dict[str, Tensor]:
    model = model_of(name)
    if name in SHARDED:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        return train(model, fully_shard(model), process)
    return train(model, DistributedDataParallel(model, **SETTINGS.get(name, {})), process, ACCUMULATION.get(name, 1))


def refused(process: int) -> str:
    """What re-entrant checkpointing ends in."""
    try:
        run("reentrant", process)
    except DriveError as error:
        return str(error)
    return ""


def unguarded(process: int) -> dict[str, Tensor] | str:
    """What it would end in."""
    with patch("increlora.structural.lorta.delta.refuse_reentrant_checkpointing"):
        try:
            return run("reentrant", process)
        except RuntimeError as error:
            return str(error)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process = dist.get_rank()
    found: dict[str, Any] = {name: run(name, process) for name in (*SETTINGS, *SHARDED)}
    found["refused"] = refused(process)
    found["unguarded"] = unguarded(process)
    report(folder, process, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
