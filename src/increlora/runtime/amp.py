"""Loss scaling: how large it is, and whether this step overflowed."""

import torch
from torch.optim import Optimizer

from ..callers import running


def loss_scale() -> float:
    """Scale of the loss in the backward passes before the optimizer step now running; 1 without a GradScaler.

    Backward hooks see scaled gradients, and nothing on the optimizer says by how much once they are unscaled, so the
    scaler is looked up among the callers: `scaler.step(optimizer)` is always one of them. Reads one device scalar.
    """
    frame = running(torch.amp.GradScaler.step)
    # `f_locals` of any other frame would keep its tensors alive
    scaler = frame.f_locals["self"] if frame is not None else None
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def gradient_scale(optimizer: Optimizer) -> float:
    """Scale that is still on `.grad` inside the step: fused optimizers divide by it themselves."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def overflowed(optimizer: Optimizer) -> bool:
    """Did loss scaling overflow in this step? Fused optimizers run their hooks even then."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item() > 0)
