"""One of two processes that train LoRA-Mini: under DDP, and sharded by FSDP2, resumed from torch's checkpoint."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from increlora import LoraMiniConfig
from increlora.ops.parallel import full
from tests.distributed.fsdp_worker import sharded
from tests.distributed.launch import report
from tests.distributed.pruning_worker import batches_of, optimizer_of, train
from tests.distributed.resuming import load, saving
from tests.reference.toy import toy_network

SAVED = 5


def toy_model(**options: Any) -> nn.Module:
    chosen = {"r": 1, "inner_in": 3, "inner_out": 3, "target_modules": ["up", "down"], "seed": 2} | options
    return get_peft_model(toy_network(), LoraMiniConfig(**chosen))


def outcome(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: full(t.detach()).clone() for name, t in tensors.items() if ".lora_delta." in name}


def under_ddp(process: int, **options: Any) -> dict[str, Any]:
    model = toy_model()
    train(DistributedDataParallel(model, **options), batches_of(process), optimizer_of(model))
    return outcome(model)


def under_fsdp(process: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A straight run that saves on its way, and the run that goes on from there with other frozen factors at first."""
    straight, resumed = sharded(toy_model(forward="sequential")), sharded(toy_model(forward="sequential", seed=9))
    optimizer, fresh = optimizer_of(straight), optimizer_of(resumed)
    train(straight, batches_of(process), optimizer, after=saving(straight, optimizer, folder, at=SAVED))
    load(resumed, fresh, folder)
    train(resumed, batches_of(process), fresh, first=SAVED + 1)
    return outcome(straight), outcome(resumed)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process = dist.get_rank()
    found = {"ddp": under_ddp(process), "ddp, nothing broadcast": under_ddp(process, broadcast_buffers=False)}
    found["fsdp"], found["resumed"] = under_fsdp(process, Path(folder, "checkpoint"))
    report(folder, process, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
