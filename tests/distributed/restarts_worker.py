"""One of two processes that restart square matrices: under DDP, under FSDP2, and resumed before the first restart."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from increlora import MoraConfig
from increlora.ops.parallel import full
from increlora.runtime import controllers_of
from tests.distributed.fsdp_worker import sharded
from tests.distributed.launch import report
from tests.distributed.pruning_worker import Batch, batches_of, optimizer_of
from tests.distributed.resuming import load, saving
from tests.reference.toy import toy_loss, toy_network

STEPS, SAVED = 12, 2  # restarts after 5 and 10 steps
CASES: dict[str, dict[str, Any]] = {
    "permute": {}, "cycle": {"restart_maps": "cycle"}, "rotation": {"operator": "rotation", "dead_inputs": "fold"},
}  # fmt: skip


def toy_model(**options: Any) -> nn.Module:
    return get_peft_model(toy_network(), MoraConfig(
        **{"r": 2, "restart_steps": 5, "restart_warmup": 2, "total_steps": STEPS, "seed": 2} | options,
        target_modules=["up", "down"],
    ))  # fmt: skip


def train(
    model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, *,
    first: int = 0, after: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:  # fmt: skip
    for step, (x, y) in list(enumerate(batches[:STEPS]))[first:]:
        toy_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    (controller,) = controllers_of(model)
    return {
        "now": {n: full(d.lora_M0.detach()).clone() for n, d in zip(controller.names, controller.deltas, strict=True)},
        "past": {n: d.lora_past for n, d in zip(controller.names, controller.deltas, strict=True)},
    }


def under_fsdp(process: int, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A straight run that saves on its way, and the run that goes on from there."""
    straight, resumed = sharded(toy_model(**options)), sharded(toy_model(**options))
    optimizer, fresh = optimizer_of(straight), optimizer_of(resumed)
    found = train(straight, batches_of(process), optimizer, after=saving(straight, optimizer, folder, at=SAVED))
    load(resumed, fresh, folder)
    return found, train(resumed, batches_of(process), fresh, first=SAVED + 1)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process, found = dist.get_rank(), {}
    for name, options in CASES.items():
        model = toy_model(**options)
        found[f"ddp {name}"] = train(DistributedDataParallel(model), batches_of(process), optimizer_of(model))
        found[f"fsdp {name}"], found[f"resumed {name}"] = under_fsdp(process, Path(folder, name), **options)
    report(folder, process, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
