"""Which optimizers can be followed: one torch optimizer that steps once per step and holds every adapter parameter."""

from collections.abc import Container, Mapping

import torch
from torch.optim import Optimizer

from ..deltas import BlockDelta
from ..errors import DriveError


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
    for name, delta in deltas.items():
        for i in range(len(delta.sizes)):
            for letter, p in delta.block(i).items():
                if p.requires_grad and id(p) not in held:
                    raise DriveError(
                        f"{name}.lora_{letter}{i} is not in the optimizer that steps the other adapter parameters: "
                        f"build one optimizer from all parameters with requires_grad, after get_peft_model"
                    )
