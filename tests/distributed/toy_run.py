"""A toy run that one process, DDP and FSDP2 can all make: the same model, batches and loop, and a log of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn

from increlora import IncreLoraConfig, attach, regularization_loss
from increlora.decide.allocation import Grant, Plan
from increlora.deltas import Status
from increlora.ops.parallel import full, is_sharded, laid_out_like, local
from increlora.runtime import Controller
from tests.reference.toy import toy_batches, toy_loss, toy_network
from tests.switches import departing

STEPS, MODULES = 18, 6
Grants = list[list[tuple[int, int, int]]]  # per event: (module, position among its free blocks, ranks)
SETTINGS: dict[str, Any] = {
    "r": 3, "total_ranks": 18, "top_h": 2, "capacity": 6, "target_modules": ["up", "down"], "init_lora_weights": False,
    "total_steps": STEPS, "warmup_steps": 2, "interval_steps": 2, "birth_warmup": 4, "orthogonality": 0.1,
}  # fmt: skip


def toy_model(config: Any = None, *, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """The toy network with an adapter that grows from 6 to 18 ranks in six events."""
    return get_peft_model(toy_network(dtype=dtype), config or departing(IncreLoraConfig, **SETTINGS | settings))


def paper_config() -> Any:
    return IncreLoraConfig.paper(
        3, target_modules=["up", "down"], warmup_steps=2, interval_steps=2, top_h=2, birth_warmup=4, total_steps=STEPS
    )


@dataclass
class Log:
    """What one process saw.

    Attributes:
        grants: what the allocator granted at each event.   scores: (modules,) per step, NaN where none was taken.
        ranks: active ranks at the end.   parameters: whole tensors at the end.   losses: own loss per micro-batch.
        equal: after each step, are the parameters of all processes the same bits?
        disturbed: idle tensors that moved, had a gradient or an optimizer state, as step and name.
        skipped: steps left out because of a non-finite gradient.
    """

    grants: Grants = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    skipped: int = 0


def run(
    model: nn.Module,
    batches: Sequence[Sequence[tuple[Tensor, Tensor]]],
    *,
    wrapped: nn.Module | None = None,
    replay: Grants | None = None,
    clip: float | None = None,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda model, x, y: toy_loss(model(x), y),
    on_step: Callable[[int, Controller, torch.optim.Optimizer], None] | None = None,
    first: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Log:
    """Train `model` (through `wrapped`) on this process's batches, from step `first` on.

    `replay` forces the grants of another run; `clip` also adds the penalty to the loss, as a plain loop that clips
    does; `optimizer` is AdamW unless given.
    """
    log = Log()
    optimizer = optimizer or adamw(model)
    controller = attach(model, optimizer, record=True)
    follow(controller, log, replay)
    idle: dict[str, Tensor] = {}
    for step, micro_batches in enumerate(batches[first:], first):
        for i, (x, y) in enumerate(micro_batches):
            with without_sync(wrapped, i + 1 < len(micro_batches)):
                loss = loss_of(wrapped or model, x, y) / len(micro_batches)
                log.losses.append(loss.item())
                if clip and i == 0:
                    loss = loss + regularization_loss(model)
                loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        log.disturbed += [f"{step} {name}" for name in disturbed(controller, optimizer, idle)]
        optimizer.zero_grad()
        log.equal.append(same_everywhere(model))
        if on_step is not None:
            on_step(step, controller, optimizer)
    log.scores = [[m["score"] for m in entry["modules"].values()] for entry in controller.records]
    log.ranks = dict(controller.ranks)
    log.parameters = adapter(model)
    log.skipped = controller.health.skipped
    return log


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def follow(controller: Controller, log: Log, replay: Grants | None) -> None:
    """Note every plan in the log; with `replay` those plans are made instead of the allocator's own."""
    grower, forced = controller.rules[0], iter(replay or [])
    allocate = grower.rule.allocate

    def noted(importance, holdings) -> Plan:
        plan = allocate(importance, holdings)
        if replay is not None:
            plan = forced_plan(next(forced), last=len(log.grants) + 1 == len(replay))
        log.grants.append([(g.module, g.block, g.ranks) for g in plan.grants])
        return plan

    grower.rule = replace(grower.rule, allocate=noted)


def forced_plan(grants: list[tuple[int, int, int]], *, last: bool) -> Plan:
    return Plan(tuple(Grant(module, position, ranks) for module, position, ranks in grants), (), last)


def without_sync(wrapped: nn.Module | None, more_follow: bool) -> AbstractContextManager:
    return wrapped.no_sync() if more_follow and hasattr(wrapped, "no_sync") else nullcontext()


def disturbed(controller: Controller, optimizer: torch.optim.Optimizer, idle: dict[str, Tensor]) -> list[str]:
    """Dormant tensors that are not as drawn or not free of gradient and state; retired ones that moved since `idle`;
    e of the reserve with a gradient or a state."""
    found = []
    for delta in controller.deltas:
        for i in delta.indices(Status.DORMANT):
            for letter, p in delta.block(i).items():
                drawn = laid_out_like(delta.draw(letter, i).to(p.dtype), p)
                if p.grad is not None or p in optimizer.state or not torch.equal(local(p.detach()), local(drawn)):
                    found.append(f"{delta.name}.lora_{letter}{i}")
        for i in delta.indices(Status.RESERVE):
            e = delta.block(i)["E"]
            if e.grad is not None or e in optimizer.state:
                found.append(f"{delta.name}.lora_E{i}")
        for i in delta.indices(Status.RETIRED):
            for letter, p in delta.block(i).items():
                name = f"{delta.name}.lora_{letter}{i}"
                if not torch.equal(local(p.detach()), idle.setdefault(name, local(p.detach()).clone())):
                    found.append(name)
    return found


def same_everywhere(model: nn.Module) -> bool:
    """Do all processes hold the same bits? (Where each holds its own part, there is nothing to compare.)"""
    tensors = [p.detach() for p in trainable(model).values()]
    if not dist.is_initialized() or is_sharded(tensors[0]):
        return True
    own = torch.cat([t.flatten() for t in tensors])
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    return all(torch.equal(own, other) for other in others)


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors, whole, by name."""
    return {name: full(p.detach()).clone() for name, p in trainable(model).items()}


def batches_of(process: int | None = None, *, accumulation: int = 1, dtype: torch.dtype = torch.float64):
    """The run's batches; with `process`, that process's half of each."""
    rows = slice(None) if process is None else slice(process, None, 2)
    return [
        [(x[rows], y[rows]) for x, y in micro_batches]
        for micro_batches in toy_batches(0, STEPS, accumulation, dtype=dtype)
    ]
