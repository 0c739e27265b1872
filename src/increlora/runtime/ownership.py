"""Which optimizers can be followed: one torch optimizer that steps once per step and holds every adapter parameter.

What steps copies of the parameters cannot be: flat ones (DeepSpeed's ZeRO, FSDP1), or those of another type.
"""

import gc
import math
from collections.abc import Container, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..deltas import BlockDelta
from ..errors import DriveError
from ..ops.parallel import in_process_group, is_sharded

FOLLOWED = "train with a plain optimizer, on one process or under DDP, FSDP2 (`fully_shard`) or DeepSpeed without ZeRO"
NOT_HELD = (
    "of an optimizer that holds its parameters: build the optimizer from model.parameters() after get_peft_model, or "
    "call `increlora.attach(model, optimizer, total_steps=…)` before training; what steps copies of the parameters "
    f"(DeepSpeed's ZeRO, FSDP1, optimizers with master weights) cannot be followed: {FOLLOWED}"
)


def check_optimizer(optimizer: Optimizer, deltas: Mapping[str, BlockDelta], former: Container[Optimizer]) -> None:
    """Raise DriveError for an optimizer that cannot be followed: LBFGS, one that was left for another (`former`), or
    one that holds only some of the parameters of `deltas` (by module name)."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise DriveError("LBFGS evaluates the loss many times per step; use AdamW, Adam, SGD, RMSprop or Adagrad")
    if optimizer in former:
        raise DriveError(
            f"two optimizers step the parameters of {next(iter(deltas))}: put all adapter parameters into one optimizer"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for delta in deltas.values() for p in delta.block_parameters()):
        raise DriveError(f"{next(iter(deltas))}: {type(optimizer).__name__} steps, and no step {NOT_HELD}")
    for name, delta in deltas.items():
        for i in range(len(delta.sizes)):
            for letter, p in delta.block(i).items():
                if p.shape != delta.shape(letter, delta.sizes[i]) or getattr(p, "_fsdp_flattened", False):
                    raise DriveError(f"{name}.lora_{letter}{i} is part of a flat tensor, as under FSDP1: {FOLLOWED}")
                if p.requires_grad and id(p) not in held:
                    raise DriveError(
                        f"{name}.lora_{letter}{i} is not in the optimizer that steps the other adapter parameters: "
                        f"build one optimizer from all parameters with requires_grad, after get_peft_model"
                    )


def holder_of(parameters: Iterable[nn.Parameter]) -> Optimizer | None:
    """An optimizer, of all there are, that holds one of these parameters. Looks at every object of the process."""
    wanted = {id(p) for p in parameters}
    known = (found for found in gc.get_objects() if issubclass(type(found), Optimizer))
    return next((found for found in known if holds(found, wanted)), None)


def holds(optimizer: Optimizer, ids: Container[int]) -> bool:
    return any(id(p) in ids for group in getattr(optimizer, "param_groups", ()) for p in group["params"])


def may_hold_flat(optimizer: Optimizer, deltas: Sequence[BlockDelta]) -> bool:
    """Does it hold a flat tensor in which all parameters of `deltas` have room, be it a part for each process?"""
    blocks = [(delta, size) for delta in deltas for size in delta.sizes]
    needed = sum(math.prod(delta.shape(letter, size)) for delta, size in blocks for letter in delta.letters)
    flat = [p.numel() for group in optimizer.param_groups for p in group["params"] if p.dim() == 1]
    return max(flat, default=0) * (dist.get_world_size() if in_process_group() else 1) >= needed


def may_hold_copies(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Does it hold tensors of all the shapes of these parameters, or of these alone, as master weights have them?"""
    held = {p.shape for group in optimizer.param_groups for p in group["params"]}
    ours = {p.shape for p in parameters}
    return held <= ours or ours <= held


def are_parts(parameters: Iterable[nn.Parameter]) -> bool:
    """Are these parameters views of one tensor, or emptied? Flat copies are made so."""
    own = [p for p in parameters if not is_sharded(p)]
    return any(not p.numel() for p in own) or len({p.untyped_storage().data_ptr() for p in own}) < len(own)
