"""Probes of distributed training: two processes under gloo, each with its half of every batch.

Starting a process means importing torch and transformers, so all methods share two: `forkserver` imports once, forks
twice. Each probe has a process group of its own, hence a failure of one method leaves the next alone.
"""

import datetime
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from increlora.runtime import controllers_of

from .outcome import Outcome, check, outcome_of, same
from .subjects import Subject, check_driven, layers, subject_of, train

PROCESSES = 2
PATIENCE = datetime.timedelta(seconds=60)  # for the other process
Found = dict[tuple[str, str], Outcome]  # by probe and method


def ddp(subject: Subject) -> None:
    """`DistributedDataParallel`: all processes decide alike, meet the budget, and hold the same bits."""
    model = subject.adapted()
    train(model, call=DistributedDataParallel(model), rows=own_rows())
    check_driven(model, subject)
    check_agreed(model)


def fsdp2(subject: Subject) -> None:
    """`fully_shard`, every parameter in pieces: the run of `DistributedDataParallel`."""
    model, sharded = subject.adapted(), subject.adapted()
    train(model, call=DistributedDataParallel(model), rows=own_rows())
    for layer in layers(sharded).values():
        fully_shard(layer)
    fully_shard(sharded)
    check(any(isinstance(p, DTensor) for p in sharded.parameters()), "nothing is sharded")
    train(sharded, rows=own_rows())
    check_driven(sharded, subject)
    found = whole(sharded)
    for name, value in whole(model).items():
        same(found[name], value, name, 1e-6)


PROBES: dict[str, Callable[[Subject], None]] = {"DDP": ddp, "FSDP2": fsdp2}


def own_rows() -> slice:
    return slice(dist.get_rank(), None, PROCESSES)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Adapter parameters that are in use, unsharded."""
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in named.items()}


def check_agreed(model: nn.Module) -> None:
    """The same ranks and the same bits in every process, although each has seen other rows."""
    own, mine = [c.ranks for c in controllers_of(model)], whole(model)
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, (own, mine))
    for ranks, values in everyone:
        check(ranks == own, f"ranks differ between processes: {own} and {ranks}")
        for name, value in values.items():
            same(mine[name], value, f"{name} in the other process", 0)


# -- starting them ---------------------------------------------------------------------------------------------------


def worker(process: int, folder: str, methods: Sequence[str]) -> Found:
    """What one process finds out; it runs in a process of its own."""
    torch.set_num_threads(1)
    found: Found = {}
    for name, probe in PROBES.items():
        for method in methods:
            store = dist.FileStore(str(Path(folder, f"{name}-{method}")), PROCESSES)
            dist.init_process_group("gloo", store=store, rank=process, world_size=PROCESSES, timeout=PATIENCE)
            found[name, method] = outcome_of(probe, subject_of(method))
            dist.destroy_process_group()
    return found


def in_processes(methods: Sequence[str], work: Callable[..., Found] = worker) -> Found:
    """The outcomes of all methods; of the two processes' the worse."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        tasks = [pool.submit(work, process, folder, list(methods)) for process in range(PROCESSES)]
        first, second = (task.result() for task in tasks)
    return {key: first[key] if first[key].verdict != "yes" else second[key] for key in first}
