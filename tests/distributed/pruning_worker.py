"""One of two processes that prune: under DDP, also with gradient checkpointing, under FSDP2, and under FSDP2 resumed
from torch's checkpoint."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from increlora import AdaLoraConfig, SoraConfig
from increlora.ops.parallel import full
from increlora.runtime import controllers_of
from tests.distributed.fsdp_worker import sharded
from tests.distributed.launch import report
from tests.distributed.resuming import load, saving
from tests.reference.toy import toy_batches, toy_loss, toy_network

STEPS, SAVED = 16, 6  # cuts at 3, 6 and 9
Batch = tuple[Tensor, Tensor]


METHODS: dict[str, Callable[..., Any]] = {
    "adalora": partial(AdaLoraConfig, orthogonality=0.05),
    "sora": partial(SoraConfig, gate_penalty=0.05, close_after=1),
}


def toy_model(method: str) -> nn.Module:
    return get_peft_model(toy_network(), METHODS[method](
        r=2, warmup_steps=1, interval_steps=3, settle_steps=7, total_steps=STEPS, target_modules=["up", "down"], seed=2,
    ))  # fmt: skip


def batches_of(process: int | None) -> list[Batch]:
    """Half of each batch for one process; None: all of it, for one process alone."""
    part = slice(None) if process is None else slice(4 * process, 4 * process + 4)
    return [(x[part], y[part]) for [(x, y)] in toy_batches(3, STEPS)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(
    model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, *,
    first: int = 0, after: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    for step, (x, y) in list(enumerate(batches))[first:]:
        toy_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def outcome(model: nn.Module) -> dict[str, Any]:
    (controller,) = controllers_of(model)
    return {
        "kept": {name: list(d.state.kept) for name, d in zip(controller.names, controller.deltas, strict=True)},
        "parameters": {n: full(p.detach()).clone() for n, p in model.named_parameters() if ".lora_delta." in n},
        "statistics": torch.cat([d.statistics[0] for d in controller.deltas]),
        "events": [(e.step, e.kind, e.module, e.ranks) for e in controller.events],
    }


class Recomputed(nn.Module):
    """Re-entrant gradient checkpointing: the backward pass of the whole model runs within that of one node."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x.requires_grad_(), use_reentrant=True)


def under_ddp(
    method: str, process: int, wrapped: Callable[[nn.Module], nn.Module] = lambda model: model
) -> dict[str, Any]:
    model = toy_model(method)
    train(DistributedDataParallel(wrapped(model)), batches_of(process), optimizer_of(model))
    return outcome(model)


def under_fsdp(method: str, process: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A straight run that saves on its way, and the run that goes on from there."""
    straight, resumed = sharded(toy_model(method)), sharded(toy_model(method))
    optimizer, fresh = optimizer_of(straight), optimizer_of(resumed)
    train(straight, batches_of(process), optimizer, after=saving(straight, optimizer, folder, at=SAVED))
    load(resumed, fresh, folder)
    train(resumed, batches_of(process), fresh, first=SAVED + 1)
    return outcome(straight), outcome(resumed)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process = dist.get_rank()
    found = {}
    for method in METHODS:
        straight, resumed = under_fsdp(method, process, Path(folder, method))
        ddp = {"ddp": under_ddp(method, process), "ddp, recomputed": under_ddp(method, process, Recomputed)}
        found[method] = ddp | {"fsdp": straight, "resumed": resumed}
    report(folder, process, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
