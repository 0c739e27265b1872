"""Saving and resuming through torch's distributed checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer


def saving(model: nn.Module, optimizer: Optimizer, folder: Path, *, at: int) -> Callable[[int], None]:
    """What to call after every step: saves after step `at`."""

    def save(step: int) -> None:
        if step == at:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)

    return save


def load(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Give a fresh model and its optimizer what was saved."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
