"""One of two processes that prune entries: under DDP, under FSDP2, resumed, and with a module used by one of them."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from increlora import PriLoraConfig
from increlora.deltas import LowRankDelta
from increlora.methods import PriLora, Site
from increlora.ops.parallel import full
from increlora.rules.input_norms import InputNorms
from increlora.runtime import controllers_of
from tests.distributed.fsdp_worker import sharded
from tests.distributed.launch import report
from tests.distributed.pruning_worker import Batch, batches_of, optimizer_of
from tests.distributed.resuming import load, saving
from tests.reference.toy import toy_loss, toy_network

STEPS, SAVED = 12, 4  # prunings after 3, 6, 9 and 12
CASES: dict[str, dict[str, Any]] = {"default": {}, "held": {"regrow": False, "group": "matrix"}}


def toy_model(**options: Any) -> nn.Module:
    return get_peft_model(toy_network(), PriLoraConfig(
        **{"r": 2, "first_r": 1.0, "interval_steps": 3, "total_steps": STEPS, "seed": 2} | options,
        target_modules=["up", "down"],
    ))  # fmt: skip


def train(
    model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, *,
    first: int = 0, after: Callable[[int], None] = lambda step: None, parts: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Which entries of A are zero after each step, all modules in one row; `parts` micro-batches a step."""
    gone = []
    for step, (x, y) in list(enumerate(batches[:STEPS]))[first:]:
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (toy_loss(model(part_x), part_y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        gone.append(zeros(model))
        after(step)
    return gone


def zeros(model: nn.Module) -> Tensor:
    (controller,) = controllers_of(model)
    return torch.cat([(full(delta.lora_A0.detach()) == 0).flatten() for delta in controller.deltas])


def outcome(model: nn.Module, gone: list[Tensor]) -> dict[str, Any]:
    (controller,) = controllers_of(model)
    return {
        "zeros": torch.stack(gone),
        "parameters": {n: full(p.detach()).clone() for n, p in model.named_parameters() if ".lora_delta." in n},
        "statistics": torch.cat([d.statistics[0] for d in controller.deltas]),
    }


def under_ddp(process: int, *, parts: int = 1, **options: Any) -> dict[str, Any]:
    model = toy_model(**options)
    wrapped = DistributedDataParallel(model)
    return outcome(model, train(wrapped, batches_of(process), optimizer_of(model), parts=parts))


def under_fsdp(process: int, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A straight run that saves on its way, and the run that goes on from there."""
    straight, resumed = sharded(toy_model(**options)), sharded(toy_model(**options))
    optimizer, fresh = optimizer_of(straight), optimizer_of(resumed)
    found = outcome(
        straight, train(straight, batches_of(process), optimizer, after=saving(straight, optimizer, folder, at=SAVED))
    )
    load(resumed, fresh, folder)
    return found, outcome(resumed, train(resumed, batches_of(process), fresh, first=SAVED + 1))


def uneven_use(process: int) -> Tensor:
    """Norms of two modules after two steps: the first is used by one process alone, the second by none in step 2."""
    deltas: dict[str, LowRankDelta] = {}
    for name in ("one", "two"):
        deltas[name] = PriLora(r=1).method(1, 7).make_delta(Site(name, 4, 3, 1, 7, torch.float64))  # type: ignore[assignment]
    for delta in deltas.values():
        delta.reserve_statistics(0, 5, torch.float64)
    norms = InputNorms(list(deltas.values()), 0, beta=0.9)
    norms.lay_out(afresh=True)
    for step in range(2):
        if process == 0:
            norms.collect(0, torch.full((1, 4), 3.0 + step, dtype=torch.float64))
        if step == 0:
            norms.collect(1, torch.full((1, 4), 3.0 + process, dtype=torch.float64))
        norms.update()
        norms.forget()
    return norms.flat


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process = dist.get_rank()
    found: dict[str, Any] = {"uneven": uneven_use(process)}
    for name, options in CASES.items():
        straight, resumed = under_fsdp(process, Path(folder, name), **options)
        found |= {f"fsdp {name}": straight, f"resumed {name}": resumed, f"ddp {name}": under_ddp(process, **options)}
    found["accumulated default"] = under_ddp(process, parts=2)
    report(folder, process, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
